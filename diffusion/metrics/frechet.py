"""Frechet distance between feature distributions, with streaming statistics.

Heusel et al. 2017 (arXiv:1706.08500, eq. 6) compare two sets of features by the Frechet
(2-Wasserstein) distance of the Gaussians with their means m and covariances S,

    d² = |m1 - m2|² + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2).                                       (1)

The product S1 S2 is not symmetric, and its matrix square root is what turns NaN or complex when a
covariance is singular (fewer samples than dimensions). With symmetric roots S = R R^T from an
eigendecomposition, R = U diag(lambda)^(1/2), the trace is one of a symmetric matrix, and that is a
sum of singular values:

    tr (S1 S2)^(1/2) = tr (R1^T S2 R1)^(1/2) = sum_i sigma_i(R1^T R2),                          (2)

real and non-negative whatever the rank. The singular values carry rounding errors of eps |S|, where
the square roots of the eigenvalues of R1^T S2 R1 would carry sqrt(eps) |S|.

Statistics are a count n, a mean m and a scatter matrix M = sum (x - m)(x - m)^T, in float64 on the
host. Two sets merge exactly (Chan, Golub & LeVeque 1979, STAN-CS-79-773):

    d = m_b - m_a;  n = n_a + n_b;  m = m_a + d n_b/n;  M = M_a + M_b + d d^T n_a n_b/n.        (3)

The estimate is biased upwards by about c/n. Chong & Forsyth 2020 (arXiv:1911.07023) compute it at
several n and extrapolate a line in 1/n to 1/n = 0.

"FID" is this distance on the features of one Inception-v3 only; on any other network it is a
Frechet distance.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion.metrics.intervals import Estimate, centred

RECOMMENDED_COUNT = 50_000


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Count, mean (dim,) and scatter (dim, dim) of feature vectors, float64 on the host."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance (dim, dim), divided by count - 1 as every published FID is."""
        if self.count < 2:
            raise ValueError(f"count={self.count}: a covariance needs at least two samples")
        return self.scatter / (self.count - 1)

    def update(self, features: Float[np.ndarray, "batch dim"]) -> "FeatureStatistics":
        """The statistics of these and of `features` together."""
        return merge(self, feature_statistics(features))


def empty_statistics(dim: int) -> FeatureStatistics:
    """Statistics of no vectors: the start of a stream."""
    return FeatureStatistics(0, np.zeros(dim), np.zeros((dim, dim)))


def feature_statistics(features: Float[np.ndarray, "batch dim"]) -> FeatureStatistics:
    """Statistics of one batch of features.

    ValueError for an empty batch, or for NaN or infinite features.
    """
    x = np.asarray(features, np.float64)
    if x.shape[0] == 0:
        raise ValueError("features has no rows: statistics need at least one feature vector")
    if not np.isfinite(x).all():
        bad = int((~np.isfinite(x).all(axis=1)).sum())
        raise ValueError(
            f"features holds {bad} of {x.shape[0]} rows that are not finite: "
            "look for NaN among the images or in the feature network's weights"
        )
    mean = x.mean(axis=0)
    return FeatureStatistics(x.shape[0], mean, (x - mean).T @ (x - mean))


def merge(a: FeatureStatistics, b: FeatureStatistics) -> FeatureStatistics:
    """Statistics of the union of two disjoint sets, eq. (3)."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"feature dimensions {a.mean.size} and {b.mean.size} differ: "
            "merge statistics of one feature network only"
        )
    count = a.count + b.count
    if count == 0:
        return a
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    scatter = a.scatter + b.scatter + np.outer(delta, delta) * (a.count * b.count / count)
    return FeatureStatistics(count, mean, scatter)


def merge_all(parts: Iterable[FeatureStatistics]) -> FeatureStatistics:
    """Statistics of the union of all parts (batches, or what each process counted), in order."""
    return reduce(merge, parts)


def symmetric_root(covariance: Float[np.ndarray, "dim dim"]) -> Float[np.ndarray, "dim rank"]:
    """R with R R^T = covariance, a column for each eigenvalue above rounding error."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    # A singular covariance has eigenvalues of +-eps |S|; their roots would be sqrt(eps) |S|.
    kept = values > values.size * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors[:, kept] * np.sqrt(values[kept])


def gaussian_frechet_distance(
    mean1: Float[np.ndarray, "dim"],
    covariance1: Float[np.ndarray, "dim dim"],
    mean2: Float[np.ndarray, "dim2"],
    covariance2: Float[np.ndarray, "dim2 dim2"],
) -> float:
    """Squared Frechet distance of two Gaussians, eqs. (1) and (2); any rank; never below 0."""
    if np.shape(mean1) != np.shape(mean2):
        raise ValueError(
            f"feature dimensions {np.size(mean1)} and {np.size(mean2)} differ: "
            "take samples and reference through the same feature network"
        )
    m1, s1, m2, s2 = (np.asarray(a, np.float64) for a in (mean1, covariance1, mean2, covariance2))
    cross = np.linalg.svd(symmetric_root(s1).T @ symmetric_root(s2), compute_uv=False).sum()
    distance = np.sum((m1 - m2) ** 2) + np.trace(s1) + np.trace(s2) - 2 * cross
    return max(float(distance), 0.0)  # of identical sets, rounding may leave -1e-15


def frechet_distance(samples: FeatureStatistics, reference: FeatureStatistics) -> float:
    """Frechet distance, eq. (1), between two sets of features given by their statistics."""
    return gaussian_frechet_distance(
        samples.mean, samples.covariance, reference.mean, reference.covariance
    )


def sample_count_warning(
    count: int, dim: int, recommended: int = RECOMMENDED_COUNT, strict: bool = False
) -> str | None:
    """What is wrong with a Frechet distance of `count` samples in `dim` dimensions, or None.

    `strict` raises it as a ValueError where count <= dim, since the covariance is then singular and
    the number mostly bias.
    """
    if count <= dim:
        text = (
            f"{count} samples for features of {dim} dimensions: the covariance is singular and the "
            f"Frechet distance mostly bias; use more than {dim} samples (best {recommended}), or "
            "the kernel distance (KID), which is unbiased"
        )
        if strict:
            raise ValueError(text)
        return text
    if count < recommended:
        return (
            f"{count} samples: below {recommended} the Frechet distance is biased upwards and "
            "compares only with numbers from as many samples; see its value at infinitely many"
        )
    return None


class Extrapolation(NamedTuple):
    """Frechet distance at infinitely many samples, the fit's standard error, and its points."""

    value: float
    standard_error: float
    counts: np.ndarray
    distances: np.ndarray


def frechet_at_infinity(
    features: Float[np.ndarray, "samples dim"],
    reference: FeatureStatistics,
    *,
    points: int = 15,
    smallest: int | None = None,
    seed: int = 0,
) -> Extrapolation:
    """Frechet distance to `reference` extrapolated in 1/n to n = infinity (arXiv:1911.07023).

    `smallest` is the smallest subset (default: a tenth of the samples, and more than the
    dimensions). The bias of `reference` itself stays: take it over the whole data set. ValueError
    with too few samples.
    """
    count, dim = features.shape
    start = max(count // 10, dim + 1) if smallest is None else smallest
    if points < 3 or not 2 <= start < count:
        raise ValueError(
            f"smallest={start}, points={points} with {count} samples of {dim} dimensions: "
            "extrapolation needs 3 points or more, between 2 samples and all; generate more samples"
        )
    counts = np.unique(np.linspace(start, count, points).astype(np.int64))
    rng = np.random.default_rng(seed)
    subsets = (features[rng.permutation(count)[:n]] for n in counts)
    distances = np.array([frechet_distance(feature_statistics(x), reference) for x in subsets])
    design = np.stack([np.ones(counts.size), 1.0 / counts], axis=1)
    fit, *_ = np.linalg.lstsq(design, distances, rcond=None)
    variance = np.sum((distances - design @ fit) ** 2) / max(counts.size - 2, 1)
    error = np.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0])
    return Extrapolation(float(fit[0]), float(error), counts, distances)


def frechet_interval(
    features: Float[np.ndarray, "samples dim"],
    reference: FeatureStatistics,
    *,
    replicates: int = 100,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Frechet distance to `reference` with a bootstrap interval over the samples."""
    x = np.asarray(features, np.float64)
    value = frechet_distance(feature_statistics(x), reference)
    rng = np.random.default_rng(seed)
    draws = [
        frechet_distance(
            _weighted(x, rng.multinomial(len(x), np.full(len(x), 1 / len(x)))), reference
        )
        for _ in range(replicates)
    ]
    interval = centred(value, np.asarray(draws), confidence)
    return interval._replace(low=max(interval.low, 0.0))


def _weighted(x: np.ndarray, weights: np.ndarray) -> FeatureStatistics:
    """Statistics of the rows of x, row i taken weights[i] times, without copying the repeats."""
    count = int(weights.sum())
    mean = weights @ x / count
    centred_x = x - mean
    return FeatureStatistics(count, mean, centred_x.T @ (centred_x * weights[:, None]))
