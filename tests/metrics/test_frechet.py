"""Frechet distance: closed forms, singular covariances, streaming statistics, small-sample bias."""

import numpy as np
import pytest
import scipy.linalg

from diffusion.metrics import frechet


def spectral(eigenvalues, seed):
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(eigenvalues),) * 2))
    return (q * np.asarray(eigenvalues)) @ q.T


def features(count, dim, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, dim)) @ rng.standard_normal((dim, dim)) + 5


def test_diagonal_gaussians_in_closed_form():
    m1, m2 = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 0.0])
    v1, v2 = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
    want = np.sum((m1 - m2) ** 2) + np.sum((np.sqrt(v1) - np.sqrt(v2)) ** 2)  # 5 + 1 + 0 + 4
    got = frechet.gaussian_frechet_distance(m1, np.diag(v1), m2, np.diag(v2))
    assert want == 10.0
    assert got == pytest.approx(want, rel=1e-12)


def test_gaussians_that_do_not_commute_match_the_matrix_square_root():
    s1, s2 = spectral([1.0, 2.0, 5.0, 0.5], 0), spectral([3.0, 0.1, 1.0, 2.0], 1)
    root = scipy.linalg.sqrtm(s1 @ s2)  # the form of pytorch-fid, well-conditioned here
    want = 4 * 0.25 + np.trace(s1 + s2 - 2 * root.real)
    got = frechet.gaussian_frechet_distance(np.zeros(4), s1, np.full(4, 0.5), s2)
    assert got == pytest.approx(want, rel=1e-10)
    assert want > 1.5  # the covariance term is not a rounding error of the mean term


def test_two_dimensional_gaussians_in_closed_form():
    # For 2 x 2: tr sqrt(A) = sqrt(tr A + 2 sqrt(det A)), with A = S1 S2.
    s1, s2 = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    product = s1 @ s2
    cross = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    got = frechet.gaussian_frechet_distance(np.zeros(2), s1, np.zeros(2), s2)
    assert got == pytest.approx(np.trace(s1 + s2) - 2 * cross, rel=1e-12)


def test_identical_sets_are_at_zero():
    stats = frechet.feature_statistics(features(500, 20))
    assert frechet.frechet_distance(stats, stats) < 1e-10 * np.trace(stats.covariance)


@pytest.mark.parametrize("rank1, rank2", [(3, 3), (3, 32), (0, 5), (0, 0)])
def test_singular_covariances_in_closed_form(rank1, rank2):
    q = spectral(np.ones(32), 0) @ np.linalg.qr(features(32, 32, 1))[0]
    v1, v2 = np.arange(1.0, 33), np.arange(32.0, 0, -1)
    v1[rank1:], v2[rank2:] = 0, 0
    got = frechet.gaussian_frechet_distance(
        np.zeros(32), (q * v1) @ q.T, np.zeros(32), (q * v2) @ q.T
    )
    want = np.sum((np.sqrt(v1) - np.sqrt(v2)) ** 2)
    assert isinstance(got, float)
    assert got == pytest.approx(want, rel=1e-6, abs=1e-9)


def test_fewer_samples_than_dimensions_is_finite_and_zero_against_itself():
    a, b = (frechet.feature_statistics(features(10, 64, seed)) for seed in (0, 1))
    assert np.isfinite(frechet.frechet_distance(a, b))
    assert frechet.frechet_distance(a, a) < 1e-9 * np.trace(a.covariance)


@pytest.mark.parametrize("batch", [7, 64, 1000])
def test_streamed_statistics_equal_those_of_the_whole(batch):
    x = features(10_000, 16).astype(np.float32) + 100  # far from 0: sums of squares would cancel
    stats = frechet.empty_statistics(16)
    for start in range(0, len(x), batch):
        stats = stats.update(x[start : start + batch])
    assert stats.count == 10_000
    x = x.astype(np.float64)
    np.testing.assert_allclose(stats.mean, x.mean(0), rtol=1e-10)
    np.testing.assert_allclose(stats.covariance, np.cov(x, rowvar=False), rtol=1e-10, atol=1e-10)


def test_statistics_of_two_processes_merge_to_those_of_one():
    x = features(1001, 8)
    whole = frechet.feature_statistics(x)
    parts = [frechet.feature_statistics(x[i::2]) for i in range(2)]
    merged = frechet.merge_all([frechet.empty_statistics(8), *parts])
    assert merged.count == 1001
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-10)
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-10)


def test_extrapolation_removes_the_bias_of_small_samples():
    rng = np.random.default_rng(0)
    reference = frechet.FeatureStatistics(2, np.zeros(16), np.eye(16))  # the true N(0, 1)
    x = rng.standard_normal((4000, 16))
    fit = frechet.frechet_at_infinity(x, reference, smallest=200)
    assert fit.counts[0] == 200 and fit.counts[-1] == 4000
    assert fit.distances[0] > 0.2  # biased far from the true value, 0
    assert abs(fit.value) < 0.02
    assert 0 < fit.standard_error < 0.02


def test_extrapolation_needs_more_samples_than_the_smallest_subset():
    stats = frechet.feature_statistics(features(50, 8))
    with pytest.raises(ValueError, match="generate more samples"):
        frechet.frechet_at_infinity(features(8, 8), stats)


@pytest.mark.parametrize("shift, scale", [(0.5, 1.0), (0.0, 2.0)])
def test_interval_is_about_as_wide_as_the_spread_over_fresh_samples(shift, scale):
    reference = frechet.FeatureStatistics(2, np.zeros(4), np.eye(4))
    rng = np.random.default_rng(0)
    draws = [scale * rng.standard_normal((300, 4)) + shift for _ in range(200)]
    fresh = [frechet.frechet_distance(frechet.feature_statistics(x), reference) for x in draws]
    interval = frechet.frechet_interval(draws[0], reference, replicates=200)
    assert interval.value == pytest.approx(fresh[0])
    assert interval.low < interval.value < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * np.std(fresh), rel=0.3)


def test_too_few_samples_are_said():
    assert "singular" in frechet.sample_count_warning(64, 64)
    assert "biased" in frechet.sample_count_warning(1000, 64)
    assert frechet.sample_count_warning(50_000, 64) is None
    assert frechet.sample_count_warning(1000, 64, recommended=1000, strict=True) is None
    with pytest.raises(ValueError, match="64 samples for features of 64 dimensions"):
        frechet.sample_count_warning(64, 64, strict=True)


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match="1 of 3 rows"):
        frechet.feature_statistics(np.array([[0.0, 1.0], [np.nan, 0.0], [1.0, 1.0]]))
    with pytest.raises(ValueError, match="no rows"):
        frechet.feature_statistics(np.zeros((0, 4)))
    with pytest.raises(ValueError, match="two samples"):
        _ = frechet.feature_statistics(np.zeros((1, 4))).covariance
    with pytest.raises(ValueError, match="3 and 4 differ"):
        frechet.merge(frechet.empty_statistics(3), frechet.empty_statistics(4))
    with pytest.raises(ValueError, match="3 and 4 differ"):
        frechet.gaussian_frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))
