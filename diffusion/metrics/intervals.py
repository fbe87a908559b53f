"""Intervals for the numbers that the other metrics report.

A fraction k/n has Wilson's score interval (Wilson 1927, JASA 22:209), the set of p that a two-sided
z test does not refuse, which stays inside [0, 1] and is sensible at k = 0 and k = n:

    (k/n + z²/2n ± z sqrt(k/n (1 - k/n)/n + z²/4n²)) / (1 + z²/n)                               (1)

A statistic that is not a mean (a Frechet distance, a recall) has the bootstrap (Efron 1979): it is
computed again on resampled examples. Resampling with replacement repeats the bias that such
statistics have at finite n, so the replicates lie around value + bias, not around the value; only
their spread is taken,

    [value + q_lo - mean, value + q_hi - mean]                                                  (2)

with q the quantiles of the replicates. The interval says how much another sample of the same size
would move the number; it does not correct the bias itself.

A mean of independent values x has the normal interval

    mean ± z s / sqrt(n),    s² = sum (x - mean)² / (n - 1).                                    (3)

In JSON an interval stands beside its number, {"fid": 3.2, "intervals": {"fid": [3.0, 3.5]}}:
`beside` writes that, and `stated` reads it, and what files of earlier versions have.
"""

import math
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float


class Estimate(NamedTuple):
    """A number with its interval; `low` and `high` are NaN where none could be given."""

    value: float
    low: float
    high: float
    confidence: float = 0.95


def beside(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    """{name: value, "intervals": {name: [low, high]}}; no interval of what is not finite."""
    known = {name: [e.low, e.high] for name, e in estimates.items() if np.isfinite(e[1:3]).all()}
    return {**{name: float(e.value) for name, e in estimates.items()}, "intervals": known}


def stated(found: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """The interval of `found[name]`, wherever it stands in `found`; None where there is none.

    As `beside` writes it; of earlier versions {"interval": {name: [low, high]}}, {"value" or
    "mean", "interval": [low, high]}, {"value", "low", "high"}, {name, name_interval: [low, high]}
    and {"mean", "standard_error"} (95%, normal).
    """
    every = found.get("intervals", found.get("interval"))
    ends: Any = found.get(f"{name}_interval")
    if isinstance(every, Mapping):
        ends = every.get(name, ends)
    elif name in ("value", "mean"):
        ends = every or ends or (found.get("low"), found.get("high"))
    error: Any = found.get("standard_error")
    if name == "mean" and not every and is_number(error):
        ends = found["mean"] - 1.96 * error, found["mean"] + 1.96 * error
    if isinstance(ends, list | tuple) and len(ends) == 2 and all(map(is_number, ends)):
        return float(ends[0]), float(ends[1])
    return None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Estimate:
    """Fraction `successes / trials` with Wilson's interval, eq.

    (1). ValueError unless 0 <= k <= n, n > 0.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"successes={successes}, trials={trials}: a fraction needs trials >= 1 and "
            "0 <= successes <= trials; evaluate at least one sample"
        )
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p, n = successes / trials, trials
    centre = p + z**2 / (2 * n)
    half = z * float(np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)))
    scale = 1 + z**2 / n
    low, high = (centre - half) / scale, (centre + half) / scale
    # At k = 0 and k = n the bound is exactly 0 or 1; rounding must not put the value outside.
    return Estimate(p, min(max(low, 0.0), p), max(min(high, 1.0), p), confidence)


def mean_interval(values: Float[np.ndarray, "n"], confidence: float = 0.95) -> Estimate:
    """Mean of independent values with the interval of eq. (3), which is NaN for a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, float("nan"), float("nan"), confidence)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    half = float(z * np.std(values, ddof=1) / np.sqrt(len(values)))
    return Estimate(mean, mean - half, mean + half, confidence)


def centred(
    value: float, replicates: Float[np.ndarray, "replicates"], confidence: float = 0.95
) -> Estimate:
    """`value` with the quantiles of `replicates` moved to lie around it, eq. (2)."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail]) - np.mean(replicates)
    return Estimate(float(value), float(value + low), float(value + high), confidence)


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    count: int,
    *,
    replicates: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Interval of `statistic(indices)` by resampling `count` examples, eq. (2).

    `statistic` takes an int array of example indices, with repeats, and gives a number; its value
    at `arange(count)` is the estimate.
    """
    if count < 2:
        raise ValueError(f"count={count}: resampling needs at least two examples")
    rng = np.random.default_rng(seed)
    draws = [statistic(rng.integers(0, count, count)) for _ in range(replicates)]
    return centred(statistic(np.arange(count)), np.asarray(draws, np.float64), confidence)
