"""Fidelity and coverage apart: improved precision and recall, density and coverage.

Around each point of a set lies a ball that reaches to its k-th nearest neighbour in the set; the
union of the balls stands for the set's support. With real x_i (N), generated y_j (M) and B(x_i) the
ball of x_i, Kynkaanniemi et al. 2019 (arXiv:1904.06991, eqs. 1-2; k = 3) define

    precision = fraction of j with y_j in some B(x_i),
    recall    = fraction of i with x_i in some B(y_j),                                          (1)

and Naeem et al. 2020 (arXiv:2002.09797, eqs. 3-4; k = 5)

    density   = 1/(k M) sum_j #{i : y_j in B(x_i)},
    coverage  = fraction of i with some y_j in B(x_i).                                          (2)

Density may exceed 1. A real outlier's large ball makes precision generous; density and coverage are
robust to it. Distances are taken a block of rows at a time, so memory is `block` times the set,
never its square. The numbers depend on N, M and k: compare only equal ones.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from diffusion.metrics.intervals import Estimate, mean_interval, wilson


class PrecisionRecall(NamedTuple):
    """The four numbers of eqs. (1) and (2)."""

    precision: float
    recall: float
    density: float
    coverage: float


def neighbour_radii(
    x: Float[np.ndarray, "points dim"], k: int, block: int = 1024
) -> Float[np.ndarray, "points"]:
    """Squared distance from each point to its k-th nearest other point."""
    if not 1 <= k < len(x):
        raise ValueError(f"k={k} with {len(x)} points: the k-th neighbour needs more than k points")
    # Each point is its own 0-th neighbour, so the k-th other one is at position k.
    return np.concatenate([np.partition(d, k, axis=1)[:, k] for d in _squared(x, x, block)])


def balls_holding(
    points: Float[np.ndarray, "points dim"],
    centres: Float[np.ndarray, "balls dim"],
    radii: Float[np.ndarray, "balls"],
    block: int = 1024,
) -> Int[np.ndarray, "points"]:
    """How many of the balls (squared `radii`, closed) hold each point."""
    return np.concatenate([(d <= radii).sum(axis=1) for d in _squared(points, centres, block)])


class PerPoint(NamedTuple):
    """What each point adds to the four numbers, which are the means of these."""

    precision: Float[np.ndarray, "samples"]  # whether a sample lies in a real ball
    recall: Float[np.ndarray, "references"]  # whether a real point lies in a sample's ball
    density: Float[np.ndarray, "samples"]  # real balls that hold a sample, over k
    coverage: Float[np.ndarray, "references"]  # whether a sample lies in a real point's ball


def per_point(
    samples: Float[np.ndarray, "samples dim"],
    reference: Float[np.ndarray, "references dim2"],
    *,
    k: int = 3,
    k_density: int = 5,
    block: int = 1024,
) -> PerPoint:
    """The terms of eqs. (1) and (2); arguments and errors as for `precision_recall`."""
    if samples.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features of {samples.shape[1]} and {reference.shape[1]} dimensions: take samples and "
            "reference through the same feature network"
        )
    # Centring keeps |x|² + |y|² - 2 x·y from cancelling where features lie far from 0.
    centre = np.mean(reference, axis=0, dtype=np.float64)
    fake, real = (np.asarray(a, np.float64) - centre for a in (samples, reference))
    real_radii = neighbour_radii(real, k, block)
    precision = balls_holding(fake, real, real_radii, block) > 0
    recall = balls_holding(real, fake, neighbour_radii(fake, k, block), block) > 0
    wide = real_radii if k == k_density else neighbour_radii(real, k_density, block)
    density = balls_holding(fake, real, wide, block) / k_density
    nearest = np.concatenate([d.min(axis=1) for d in _squared(real, fake, block)])
    terms = (precision, recall, density, nearest <= wide)
    return PerPoint(*(term.astype(np.float64) for term in terms))


def precision_recall(
    samples: Float[np.ndarray, "samples dim"],
    reference: Float[np.ndarray, "references dim2"],
    *,
    k: int = 3,
    k_density: int = 5,
    block: int = 1024,
) -> PrecisionRecall:
    """Precision and recall with neighbourhoods of `k`, density and coverage of `k_density`.

    Raises:
      ValueError: features of different dimensions, or too few points for the neighbourhoods.
    """
    terms = per_point(samples, reference, k=k, k_density=k_density, block=block)
    return PrecisionRecall(*(float(term.mean()) for term in terms))


def with_intervals(terms: PerPoint, confidence: float = 0.95) -> dict[str, Estimate]:
    """Each of the four with an interval, given the balls: Wilson's for fractions, else eq. (3) of
    `intervals`. It says what other points, not other balls, would change."""
    found = {}
    for name, term in terms._asdict().items():
        fraction = name != "density"
        found[name] = (
            wilson(int(term.sum()), term.size, confidence)
            if fraction
            else mean_interval(term, confidence)
        )
    return found


def _squared(x: np.ndarray, y: np.ndarray, block: int):
    """Squared distances from x to y, (block, len(y)) at a time, in float64."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    norms = np.square(y).sum(axis=1)
    for start in range(0, len(x), block):
        rows = x[start : start + block]
        squared = np.square(rows).sum(axis=1)[:, None] + norms - 2 * rows @ y.T
        yield np.maximum(squared, 0.0)
