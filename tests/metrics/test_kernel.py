"""Kernel distance: the estimator by its definition, its mean without bias, its interval."""

import numpy as np
import pytest

from diffusion.metrics.kernel import kernel_distance, unbiased_mmd


def by_definition(x, y):
    def k(a, b):
        return (np.dot(a, b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = np.mean([k(x[i], x[j]) for i in range(n) for j in range(n) if i != j])
    yy = np.mean([k(y[i], y[j]) for i in range(m) for j in range(m) if i != j])
    return xx + yy - 2 * np.mean([k(a, b) for a in x for b in y])


def test_estimate_is_the_definition():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((9, 5)), rng.standard_normal((7, 5)) + 0.3
    assert unbiased_mmd(x, y) == pytest.approx(by_definition(x, y), rel=1e-12)


def test_estimate_has_no_bias_at_any_size():
    # x, y ~ N(0, 1), N(a, 1) in one dimension: E k(x, y) = E (x y + 1)^3 in closed form.
    shift = 0.5
    true = (1 + 3) + (1 + 3 * ((1 + shift**2) ** 2 + shift**2) + self_third(shift))
    true -= 2 * (1 + 3 * (1 + shift**2))
    rng = np.random.default_rng(0)
    draws = [
        unbiased_mmd(rng.standard_normal((10, 1)), shift + rng.standard_normal((10, 1)))
        for _ in range(10_000)
    ]
    error = np.std(draws) / np.sqrt(len(draws))
    assert abs(np.mean(draws) - true) < 4 * error
    assert error < 0.1 * true


def self_third(shift):
    return (shift**3 + 3 * shift) ** 2  # (E y^3)^2 for y ~ N(shift, 1)


def test_equal_distributions_lie_about_zero_and_different_ones_above():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 2000, 8))
    same = kernel_distance(x, y, subsets=20, subset_size=200)
    other = kernel_distance(x + 0.5, y, subsets=20, subset_size=200)
    assert same.low < 0 < same.high
    assert other.low > 0.1
    assert (same.subsets, same.subset_size) == (20, 200)


def test_interval_is_about_as_wide_as_the_spread_over_fresh_samples():
    rng = np.random.default_rng(2)
    shift = np.array([0.4, 0.0])[:, None, None]
    draws = [rng.standard_normal((2, 500, 4)) + shift for _ in range(40)]
    fresh = [unbiased_mmd(*pair) for pair in draws]
    got = kernel_distance(*draws[0], subsets=5, subset_size=500)
    # Small blocks carry more noise of second order: the interval may be wider, not narrower.
    assert 0.6 < (got.high - got.low) / (2 * 1.96 * np.std(fresh)) < 2.0


def test_small_sets_use_their_own_size_and_have_no_interval():
    x = np.random.default_rng(0).standard_normal((15, 3))
    got = kernel_distance(x, x[:12], subsets=3)
    assert got.subset_size == 12
    assert np.isnan(got.low) and np.isfinite(got.value)


def test_bad_sets_are_refused():
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        kernel_distance(np.zeros((5, 3)), np.zeros((5, 4)))
    with pytest.raises(ValueError, match="two of each"):
        kernel_distance(np.zeros((1, 3)), np.zeros((5, 3)))
