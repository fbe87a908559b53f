r"""LMS, DEIS and DPM-Solver-2: higher orders on the noise estimate, in s = sigma/alpha.

With y = x/alpha the probability-flow ODE is dy/ds = e, the noise estimate (`karras.py`). From level
s_0 to s, with estimates e_0, e_1, ... at the levels s_0, s_1, ... (s_1 the one before s_0),

    y' = y + sum_k c_k e_k,                                                             (1)
    c_k = int_{s_0}^{s} prod_{j != k} (u(z) - u(s_j))/(u(s_k) - u(s_j)) dz

LMS (k-diffusion) takes u = s and four estimates, DEIS (arXiv:2204.13902, log-rho) u = log s and up
to three. DPM-Solver-2 (arXiv:2206.00927, "KDPM2" in Diffusers) evaluates half-way in log s:

    y_m = y + (s_m - s_0) e_0,   y' = y + (s - s_0) e(y_m),   s_m = sqrt(s_0 s)         (2)

The step to clean data is an Euler step in DPM-Solver-2.
"""

import math
from typing import Any

import numpy as np

from diffusion.process.samplers.base import Sampler, need_signal
from diffusion.process.samplers.grid import Grid, default_spacing, make_grid
from diffusion.process.samplers.plms import EULER, assemble, transfer
from diffusion.process.schedules import Schedule


def lms(schedule: Schedule, steps: int | None = None, *, order: int = 4, **options) -> Sampler:
    """Eq. 1 in s. ``order`` 1 to 4; ``options`` go to ``grid.make_grid`` (linspace by default)."""
    grid = _grid(schedule, steps, "lms", options)
    _check_order(order, 4)
    levels = grid.ratio
    rows = []
    for i in range(grid.steps):
        past = levels[i::-1][:order]
        rows.append(transfer(grid, schedule, i, i + 1, _weights(past, levels[i + 1], False)))
    return assemble(grid, rows)


def deis(
    schedule: Schedule,
    steps: int | None = None,
    *,
    order: int = 2,
    lower_order_final: bool = True,
    **options,
) -> Sampler:
    """Eq. 1 in log s. ``order`` 1 to 3; below 15 steps the last are of order 1 and 2 with
    ``lower_order_final``. ``options`` go to ``grid.make_grid`` (uniform, final "first")."""
    defaults: dict[str, Any] = {"spacing": default_spacing(schedule, "uniform"), "final": "first"}
    grid = _grid(schedule, steps, "deis", {**defaults, **options})
    _check_order(order, 3)
    levels, rows = grid.ratio, []
    for i in range(grid.steps):
        left = grid.steps - i  # steps, this one too
        most = left if lower_order_final and grid.steps < 15 and left <= 2 else order
        past = levels[i::-1][: min(order, most)]
        rows.append(transfer(grid, schedule, i, i + 1, _weights(past, levels[i + 1], True)))
    return assemble(grid, rows)


def dpm2(schedule: Schedule, steps: int | None = None, **options) -> Sampler:
    """Eq. 2: 2 ``steps`` - 1 evaluations to clean data."""
    grid = _grid(schedule, steps, "dpm2", options)
    rows = []
    for i in range(grid.steps):
        if grid.sigma[i + 1] == 0:
            rows.append(transfer(grid, schedule, i, i + 1, EULER))
            continue
        middle = 0.5 * (grid.half_logsnr[i] + grid.half_logsnr[i + 1])
        alpha, sigma = (1 + np.exp(-2 * middle)) ** -0.5, (1 + np.exp(2 * middle)) ** -0.5
        first = transfer(grid, schedule, i, i + 1, EULER)
        alpha_t, sigma_t = grid.alpha[i], grid.sigma[i]
        ahead = {"x": alpha / alpha_t, "e": sigma - alpha * sigma_t / alpha_t, "end": False}
        here = {"t": float(schedule.time(2 * middle)), "alpha": alpha, "sigma": sigma}
        rows += [first | ahead, first | here | {"push": False}]
    return assemble(grid, rows)


def _grid(schedule: Schedule, steps: int | None, name: str, options: dict[str, Any]) -> Grid:
    given: dict[str, Any] = {"spacing": default_spacing(schedule, "linspace"), **options}
    grid = make_grid(schedule, steps, **given)
    need_signal(grid, name)
    return grid


def _check_order(order: int, most: int) -> None:
    if not 1 <= order <= most:
        raise ValueError(f"order={order}, but only 1 to {most} are known")


def _weights(past: np.ndarray, target: float, logarithmic: bool) -> list[float]:
    """c_k of eq. 1 over s - s_0, which `transfer` multiplies with; the latest estimate first."""
    if len(past) == 1 or target == past[0]:
        return [float(weight) for weight in EULER]
    # A polynomial in v = s/s_0 - 1, or in v = log(s/s_0): int v^m ds from s_0 to s.
    nodes = np.log(past / past[0]) if logarithmic else past / past[0] - 1
    ratio = target / past[0]
    found = []
    for k, node in enumerate(nodes):
        rest = np.delete(nodes, k)
        basis = np.poly(rest) / np.prod(node - rest)
        moments = [_moment(m, ratio, logarithmic) for m in range(len(nodes))][::-1]
        found.append(float(basis @ moments) / (ratio - 1))
    return found + [0.0] * (5 - len(found))


def _moment(m: int, ratio: float, logarithmic: bool) -> float:
    """int_1^ratio v^m dz with v = z - 1, or log z."""
    if not logarithmic:
        return (ratio - 1) ** (m + 1) / (m + 1)
    if ratio == 0:  # z log(z)^j vanishes there
        return -((-1) ** m) * math.factorial(m)
    logs = np.log(ratio)
    terms = [
        (-1) ** (m - j) * math.factorial(m) / math.factorial(j) * logs**j for j in range(m + 1)
    ]
    return ratio * sum(terms) - (-1) ** m * math.factorial(m)
