"""Precision, recall, density, coverage: hand-made sets and a transcription of the definitions."""

import numpy as np
import pytest

from diffusion.metrics.precision_recall import (
    neighbour_radii,
    per_point,
    precision_recall,
    with_intervals,
)


def by_definition(fake, real, k, k_density):
    def distances(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=-1)

    def radius(a, k):
        return np.sort(distances(a, a), axis=1)[:, k]

    cross = distances(fake, real)
    inside = cross <= radius(real, k)[None]
    back = cross <= radius(fake, k)[:, None]
    wide = cross <= radius(real, k_density)[None]
    density = wide.sum() / (k_density * len(fake))
    return inside.any(1).mean(), back.any(0).mean(), density, wide.any(0).mean()


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_numbers_are_the_definitions_for_any_block(block):
    rng = np.random.default_rng(0)
    fake, real = 0.7 * rng.standard_normal((60, 3)) + 40.3, rng.standard_normal((50, 3)) + 40
    got = precision_recall(fake, real, k=3, k_density=5, block=block)
    np.testing.assert_allclose(got, by_definition(fake, real, 3, 5), rtol=1e-12)
    assert got.precision > got.recall + 0.05  # narrow samples: faithful, not complete


def test_radii_on_a_line():
    x = np.array([[0.0], [1.0], [3.0], [7.0]])
    np.testing.assert_allclose(neighbour_radii(x, 1), [1, 1, 4, 16])
    np.testing.assert_allclose(neighbour_radii(x, 2), [9, 4, 9, 36])


def test_a_set_covers_itself_and_nothing_far_away():
    x = np.random.default_rng(0).standard_normal((40, 2))
    same = precision_recall(x, x)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert precision_recall(x + 100, x) == (0, 0, 0, 0)


def test_a_dropped_mode_costs_recall_and_coverage_only():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((400, 2)) + 100 * (np.arange(400) % 2)[:, None]
    got = precision_recall(rng.standard_normal((400, 2)), real)
    assert got.precision > 0.9
    assert got.recall == pytest.approx(0.5, abs=0.05)
    assert got.coverage == pytest.approx(0.5, abs=0.05)


def test_bad_sets_are_refused():
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        precision_recall(np.zeros((9, 3)), np.zeros((9, 4)))
    with pytest.raises(ValueError, match="k=3 with 3 points"):
        precision_recall(np.zeros((9, 3)), np.zeros((3, 3)))


def test_intervals_hold_the_values_and_are_as_wide_as_the_spread():
    rng = np.random.default_rng(1)
    real = rng.standard_normal((300, 2))
    draws = [per_point(1.3 * rng.standard_normal((300, 2)), real) for _ in range(100)]
    found = with_intervals(draws[0])
    assert found.keys() == {"precision", "recall", "density", "coverage"}
    for name, estimate in found.items():
        assert estimate.low < estimate.value < estimate.high
        assert estimate.value == getattr(draws[0], name).mean()
    for name in ("precision", "density"):  # the balls are those of the reference, which stays
        spread = np.std([getattr(draw, name).mean() for draw in draws])
        width = found[name].high - found[name].low
        assert width == pytest.approx(2 * 1.96 * spread, rel=0.35), name
