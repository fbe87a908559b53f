"""Wilson's interval against published values; the bootstrap against the normal theory of a mean."""

import numpy as np
import pytest

from diffusion.metrics.intervals import beside, bootstrap, centred, mean_interval, stated, wilson


def test_wilson_matches_published_values():
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
    for successes, trials, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        estimate = wilson(successes, trials)
        assert estimate.value == successes / trials
        np.testing.assert_allclose([estimate.low, estimate.high], [low, high], atol=6e-5)


@pytest.mark.parametrize("successes", [0, 7])
def test_wilson_is_closed_at_the_ends(successes):
    """At k = 0 the other end is z^2 / (n + z^2); at k = n it is the mirror image."""
    estimate = wilson(successes, 7)
    width = 1.959964**2 / (7 + 1.959964**2)
    expected = [0, 0, width] if successes == 0 else [1 - width, 1, 1]
    np.testing.assert_allclose([estimate.low, estimate.value, estimate.high], expected, rtol=1e-6)
    assert {estimate.low, estimate.high} & {0, 1}  # exactly


@pytest.mark.parametrize("successes, trials", [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_impossible_counts(successes, trials):
    with pytest.raises(ValueError, match="trials >= 1"):
        wilson(successes, trials)


def test_bootstrap_of_a_mean_has_the_width_of_the_standard_error():
    x = np.random.default_rng(0).standard_normal(400)
    estimate = bootstrap(lambda rows: float(x[rows].mean()), 400, replicates=2000, seed=1)
    assert estimate.value == pytest.approx(x.mean())
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * x.std() / 20, rel=0.1)


def test_centred_removes_the_bias_of_the_replicates():
    estimate = centred(1.0, np.linspace(4.0, 6.0, 201))
    np.testing.assert_allclose([estimate.low, estimate.high], [0.05, 1.95])


def test_bootstrap_needs_two_examples():
    with pytest.raises(ValueError, match="count=1"):
        bootstrap(lambda rows: 0.0, 1)


def test_a_mean_of_normal_values_has_its_interval():
    rng = np.random.default_rng(0)
    inside = [
        found.low < 2 < found.high
        for found in (mean_interval(2 + 3 * rng.standard_normal(50)) for _ in range(1000))
    ]
    assert 0.92 < np.mean(inside) < 0.97
    assert np.isnan(mean_interval(np.ones(1)).low)


def test_what_is_written_is_read_and_a_number_alone_has_no_interval():
    found = beside({"a": wilson(1, 2), "b": mean_interval(np.ones(1))})
    assert found["a"] == 0.5 and found["b"] == 1.0 and list(found["intervals"]) == ["a"]
    assert stated(found, "a") == wilson(1, 2)[1:3] and stated(found, "b") is None
    assert stated({"mean": 3.0, "standard_error": 0.5}, "mean") == pytest.approx((2.02, 3.98))
    both = {"mean": 3.0, "standard_error": 9.0, "intervals": {"mean": [2, 4]}}
    assert stated(both, "mean") == (2, 4)
