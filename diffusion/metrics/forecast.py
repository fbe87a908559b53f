"""Forecasts as samples, against what came: CRPS and coverage.

The continuous ranked probability score of samples x_1 .. x_n (sorted) and an outcome y (Gneiting
and Raftery 2007, https://doi.org/10.1198/016214506000001437, eq. 21, with the samples'
distribution):

    (1)  CRPS = mean_i |x_i - y| - sum_i (2 i - n - 1) x_i / n^2

in the outcome's unit; of one sample it is the absolute error. The central interval of level p is
[q((1 - p)/2), q((1 + p)/2)] of the samples; its coverage, how often it holds the outcome, should
be p.
"""

import numpy as np
from jaxtyping import Float


def crps(
    samples: Float[np.ndarray, "windows samples leads"], outcome: Float[np.ndarray, "windows leads"]
) -> Float[np.ndarray, "windows leads"]:
    """Eq. 1; lower is better."""
    x, n = np.sort(samples.astype(np.float64), axis=1), samples.shape[1]
    weights = (2 * np.arange(1, n + 1) - n - 1) / n**2
    return np.abs(x - outcome[:, None]).mean(1) - np.einsum("n,wnl->wl", weights, x)


def interval(
    samples: Float[np.ndarray, "windows samples leads"], level: float
) -> tuple[Float[np.ndarray, "windows leads"], Float[np.ndarray, "windows leads"]]:
    """The central interval of `level`, in (0, 1)."""
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=1)
    return low, high


def coverage(
    samples: Float[np.ndarray, "windows samples leads"],
    outcome: Float[np.ndarray, "windows leads"],
    level: float,
) -> float:
    """The share of outcomes within their interval."""
    low, high = interval(samples, level)
    return float(((low <= outcome) & (outcome <= high)).mean())
