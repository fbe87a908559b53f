"""CRPS and coverage against closed forms."""

import numpy as np
from scipy.stats import norm

from diffusion.metrics import forecast


def test_crps_of_a_gaussian_is_its_closed_form():
    """Gneiting and Raftery 2007, eq. 21 for N(mean, std^2)."""
    level = (np.arange(4000) + 0.5) / 4000
    mean, std, y = np.array([0.0, 2.0, -1.0]), np.array([1.0, 0.5, 3.0]), np.array([0.3, 2.0, 4.0])
    samples = (mean + std * norm.ppf(level)[:, None]).T[:, :, None]
    z = (y - mean) / std
    wanted = std * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    np.testing.assert_allclose(forecast.crps(samples, y[:, None])[:, 0], wanted, rtol=1e-3)


def test_crps_is_the_mean_difference_of_pairs_and_of_one_sample_its_error():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3, 7, 2)), rng.normal(size=(3, 2))
    pairs = np.abs(x[:, :, None] - x[:, None]).mean((1, 2))
    wanted = np.abs(x - y[:, None]).mean(1) - pairs / 2
    np.testing.assert_allclose(forecast.crps(x, y), wanted, rtol=1e-12)
    np.testing.assert_allclose(forecast.crps(x[:, :1], y), np.abs(x[:, 0] - y))


def test_intervals_cover_what_they_say():
    rng = np.random.default_rng(1)
    samples, outcome = rng.normal(size=(400, 200, 3)), rng.normal(size=(400, 3))
    for level in (0.5, 0.9):
        low, high = forecast.interval(samples, level)
        np.testing.assert_allclose([low.mean(), high.mean()], norm.interval(level), atol=0.03)
        assert abs(forecast.coverage(samples, outcome, level) - level) < 0.05
    assert forecast.coverage(samples + 10, outcome, 0.9) == 0
