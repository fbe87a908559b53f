"""Kernel distance between feature sets (KID on Inception features).

Binkowski et al. 2018 (arXiv:1801.01401, section 4) take the squared maximum mean discrepancy under
the cubic kernel

    k(x, y) = (x·y / dim + 1)³                                                                  (1)

by its unbiased estimate over n samples x and n references y (Gretton et al. 2012, eq. 4),

    MMD² = sum_{i≠j} [k(x_i, x_j) + k(y_i, y_j)] / (n (n - 1)) - 2 sum_ij k(x_i, y_j) / n².      (2)

It is right on average at every n, so small sets compare, and may come out below 0. The value is the
mean over random subsets, as the paper and torch-fidelity have it, and `std` the deviation between
them. Those subsets share examples, so the interval comes from disjoint blocks instead, whose
estimates are independent: value ± z s / sqrt(blocks).
"""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

MIN_BLOCKS = 10


class KernelDistance(NamedTuple):
    """Mean and deviation over subsets, and the mean's interval (NaN below 20 examples)."""

    value: float
    std: float
    low: float
    high: float
    subsets: int
    subset_size: int


def polynomial_kernel(
    x: Float[np.ndarray, "n dim"], y: Float[np.ndarray, "m dim"]
) -> Float[np.ndarray, "n m"]:
    """Eq. (1)."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def unbiased_mmd(x: Float[np.ndarray, "n dim"], y: Float[np.ndarray, "m dim"]) -> float:
    """Eq. (2), in float64; n and m may differ. ValueError with fewer than two of either."""
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"{n} samples and {m} references: the estimate needs two of each")
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    within_x, within_y = polynomial_kernel(x, x), polynomial_kernel(y, y)
    within = (within_x.sum() - np.trace(within_x)) / (n * (n - 1))
    within += (within_y.sum() - np.trace(within_y)) / (m * (m - 1))
    return float(within - 2 * polynomial_kernel(x, y).mean())


def kernel_distance(
    samples: Float[np.ndarray, "n dim"],
    reference: Float[np.ndarray, "m dim2"],
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> KernelDistance:
    """Squared kernel distance; sets below `subset_size` are taken with subsets of their own size.

    Raises:
      ValueError: features of different dimensions, or fewer than two of either set.
    """
    if samples.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features of {samples.shape[1]} and {reference.shape[1]} dimensions: take samples and "
            "reference through the same feature network"
        )
    size = min(subset_size, len(samples), len(reference))
    rng = np.random.default_rng(seed)
    draws = [
        unbiased_mmd(
            samples[rng.choice(len(samples), size, replace=False)],
            reference[rng.choice(len(reference), size, replace=False)],
        )
        for _ in range(subsets)
    ]
    value = float(np.mean(draws))
    half = _half_width(samples, reference, size, confidence, rng)
    return KernelDistance(value, float(np.std(draws)), value - half, value + half, subsets, size)


def _half_width(samples, reference, size: int, confidence: float, rng) -> float:
    """Half the interval, from disjoint blocks of at most `size`, at least `MIN_BLOCKS` of them."""
    shortest = min(len(samples), len(reference))
    size = min(size, shortest // MIN_BLOCKS)
    if size < 2:
        return float("nan")
    blocks = shortest // size
    rows, columns = (
        rng.permutation(len(a))[: blocks * size].reshape(blocks, size) for a in (samples, reference)
    )
    estimates = [unbiased_mmd(samples[i], reference[j]) for i, j in zip(rows, columns)]
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    return float(z * np.std(estimates, ddof=1) / np.sqrt(blocks))
