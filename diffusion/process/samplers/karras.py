r"""Euler, Euler ancestral and Heun, as EDM (arXiv:2206.00364) and k-diffusion state them.

With y = x/alpha and s = sigma/alpha the probability-flow ODE is dy/ds = (y - D)/s (EDM eq. 1). One
Euler step,

    y' = y + (s' - s) (y - D)/s,                                                               (1)

is DDIM with eta = 0; ancestral Euler steps down to s_down and adds s_up z,

    s_up = eta s' sqrt(1 - s'^2/s^2),   s_down = sqrt(s'^2 - s_up^2),                          (2)

which is DDIM with that eta. Both are made by ``ddim``, in x rather than y, and differ from it in
the times only. Heun (EDM Algorithms 1 and 2) averages the slopes at both ends, and before each step
may raise the noise ("churn") while S_tmin <= s <= S_tmax:

    g = min(S_churn/n, sqrt(2) - 1),  s^ = s (1 + g),  y^ = y + S_noise sqrt(s^^2 - s^2) z     (3)
    d = dy/ds at s^,  y' = y^ + (s' - s^) d,  d' = dy/ds at s',  y'' = y^ + (s' - s^)(d + d')/2  (4)

the last step, to s' = 0, being Euler. y^ is evaluated at the time whose level is s^ (levels above
the schedule's are cut to it). Where alpha = 0 at the first level, s is infinite; Heun then works in
y = x/(alpha + sigma), s = sigma/(alpha + sigma), where dy/ds = e - D with e = (x - alpha D)/sigma:
the straight paths of rectified flow. Diffusers' HeunDiscreteScheduler has no churn.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion.process.samplers.base import Evaluate, Memory, Row, Sampler, finite, need_signal
from diffusion.process.samplers.ddim import from_grid
from diffusion.process.samplers.grid import Grid, default_spacing, make_grid
from diffusion.process.schedules import Schedule


def euler(
    schedule: Schedule, steps: int | None = None, *, spacing: str | None = None, **options
) -> Sampler:
    """Eq. 1; ``spacing`` None is linspace for discrete schedules, karras for EDM's.

    On rectified flow this is the Euler step of its own ODE. ``options`` go to ``grid.make_grid``.
    Discrete times are whole steps; k-diffusion's are fractional under linspace.
    """
    return euler_ancestral(schedule, steps, eta=0.0, spacing=spacing, **options)


def euler_ancestral(
    schedule: Schedule,
    steps: int | None = None,
    *,
    eta: float | int = 1.0,
    spacing: str | None = None,
    **options,
) -> Sampler:
    """Eq. 2; options as ``euler``."""
    spacing = spacing or default_spacing(schedule, "linspace")
    return from_grid(make_grid(schedule, steps, spacing=spacing, **options), eta)


def heun(
    schedule: Schedule,
    steps: int | None = None,
    *,
    churn: float | int = 0.0,
    churn_min: float | int = 0.0,
    churn_max: float | int = float("inf"),
    churn_noise: float | int = 1.0,
    coordinates: str | None = None,
    spacing: str | None = None,
    **options,
) -> Sampler:
    """Eq. 3-4: 2 ``steps`` - 1 evaluations to clean data. EDM's CIFAR-10 is 18 steps, no churn.

    ``churn``, ``churn_min``, ``churn_max``, ``churn_noise`` are S_churn, S_tmin, S_tmax, S_noise
    (levels in sigma/alpha). ``coordinates``: "sigma", "flow", or None, which is "flow" where the
    first level has no signal. Raises ValueError for sigma coordinates or churn there.
    """
    spacing = spacing or default_spacing(schedule, "linspace")
    grid = make_grid(schedule, steps, spacing=spacing, **options)
    coordinates = coordinates or ("flow" if grid.alpha[0] == 0 else "sigma")
    if coordinates not in ("sigma", "flow"):
        raise ValueError(f"coordinates={coordinates!r} is unknown: choose sigma or flow")
    if coordinates == "sigma" or churn:
        need_signal(grid, "heun")
    gain = np.zeros(grid.steps)
    if churn:
        inside = (grid.ratio[:-1] >= churn_min) & (grid.ratio[:-1] <= churn_max)
        gain = np.where(inside, min(churn / grid.steps, np.sqrt(2) - 1), 0.0)
    rows = []
    for i in range(grid.steps):
        rows.append(_predictor(schedule, grid, i, gain[i], churn_noise, coordinates))
        if grid.sigma[i + 1] > 0:
            rows.append(_corrector(grid, i, rows[-1], coordinates))
    table = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    if np.issubdtype(grid.times.dtype, np.integer) and np.all(table["t"] % 1 == 0):
        table["t"] = table["t"].astype(np.int64)
    finite(table)
    return Sampler(
        rows=table,
        step=_step,
        start=lambda x: (x * 0, x * 0),
        ends=np.flatnonzero(table["end"]),
        prior_std=grid.prior_std,
        stochastic=bool(np.any(table["churn"])),
    )


def _norm(alpha: float, sigma: float, coordinates: str) -> float:
    return alpha if coordinates == "sigma" else alpha + sigma


def _predictor(
    schedule: Schedule, grid: Grid, i: int, gain: float, churn_noise: float | int, coordinates: str
) -> dict:
    t, alpha, sigma = float(grid.times[i]), grid.alpha[i], grid.sigma[i]
    scale_in, churn = 1 / _norm(alpha, sigma, coordinates), 0.0
    if gain > 0:
        level = sigma / alpha
        t = float(schedule.time(-2 * np.log(level * (1 + gain))))
        alpha, sigma = float(schedule.alpha(np.asarray(t))), float(schedule.sigma(np.asarray(t)))
        share = alpha / _norm(alpha, sigma, coordinates)  # of x/alpha in y
        scale_in = share / grid.alpha[i]
        churn = share * churn_noise * np.sqrt(max((sigma / alpha) ** 2 - level**2, 0))
    norm = _norm(alpha, sigma, coordinates)
    norm_out = _norm(grid.alpha[i + 1], grid.sigma[i + 1], coordinates)
    return {
        "t": t,
        "begin": float(grid.times[i]),  # of x_t before the churn
        "index": i,
        "alpha": alpha,
        "sigma": sigma,
        "scale_in": scale_in,
        "scale": norm,
        "scale_out": norm_out,
        "churn": churn,
        "drift": float(coordinates == "flow"),
        "step": grid.sigma[i + 1] / norm_out - sigma / norm,
        "corrector": False,
        "end": grid.sigma[i + 1] == 0,
    }


def _corrector(grid: Grid, i: int, predictor: dict, coordinates: str) -> dict:
    norm = predictor["scale_out"]
    return predictor | {
        "t": float(grid.times[i + 1]) if i + 1 < grid.steps else grid.final_time,
        "alpha": grid.alpha[i + 1],
        "sigma": grid.sigma[i + 1],
        "scale_in": 1 / norm,
        "scale": norm,
        "churn": 0.0,
        "corrector": True,
        "end": True,
    }


def _step(
    evaluate: Evaluate, x: Array, memory: Memory, row: Row, noise: Array | None
) -> tuple[Array, Memory]:
    """Memory: y^ and d of this step's predictor."""
    base, slope = memory
    y = row["scale_in"] * x
    if noise is not None:
        y = y + row["churn"] * noise
    x = row["scale"] * y
    x0, _ = evaluate(x, row["t"])
    here = (x - row["alpha"] * x0) / row["sigma"] - row["drift"] * x0
    base = jnp.where(row["corrector"], base, y)
    mean = jnp.where(row["corrector"], (slope + here) / 2, here)
    return row["scale_out"] * (base + row["step"] * mean), (base, here)
