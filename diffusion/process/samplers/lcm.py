r"""Samplers of few-step models: latent consistency (LCM) and trajectory consistency (TCD).

LCM (arXiv:2310.04378, section 4.1) weighs the estimate D by the boundary condition, and noises it:

    f = c_skip x + c_out D,   c_skip = d^2/(u^2 + d^2),   c_out = u/sqrt(u^2 + d^2)           (1)
    x' = alpha' f + sigma' z,   the last being f itself

with u = ``timestep_scaling`` t and d = 1/2. TCD (arXiv:2402.19159, algorithm 4) goes to an earlier
level r = floor((1 - eta) t') by the noise estimate e, and back up by noise:

    x_r = alpha_r D + sigma_r e,   x' = (alpha'/alpha_r) x_r + sqrt(1 - (alpha'/alpha_r)^2) z    (2)

Both visit n of the ``original_steps`` times k T/original_steps - 1 that such models are trained on.
"""

from typing import Any

import numpy as np

from diffusion.process.samplers.base import Sampler, linear
from diffusion.process.samplers.grid import Grid, make_grid
from diffusion.process.schedules import Schedule


def lcm(
    schedule: Schedule,
    steps: int | None = None,
    *,
    original_steps: int = 50,
    timestep_scaling: float | int = 10.0,
    times: np.ndarray | None = None,
) -> Sampler:
    """Eq. 1; 4 ``steps`` by default. ValueError where there are more than ``original_steps``."""
    grid = _grid(schedule, steps, original_steps, times)
    last = np.arange(grid.steps) == grid.steps - 1
    skip, out = boundary(timestep_scaling * grid.times.astype(np.float64))
    alpha = np.where(last, 1.0, grid.alpha[1:])
    noise = np.where(last, 0.0, grid.sigma[1:])
    return linear(grid, alpha * skip, (alpha * out)[:, None], noise)


def boundary(u: Any) -> tuple[Any, Any]:
    """(c_skip, c_out) of eq. 1."""
    return 0.25 / (u**2 + 0.25), u / (u**2 + 0.25) ** 0.5


def tcd(
    schedule: Schedule,
    steps: int | None = None,
    *,
    eta: float | int = 0.3,
    original_steps: int = 50,
    times: np.ndarray | None = None,
) -> Sampler:
    """Eq. 2; ``eta``, gamma in the paper, from 0, no noise, to 1. 4 ``steps`` by default."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}, but it must lie in [0, 1]")
    grid = _grid(schedule, steps, original_steps, times)
    after = np.append(grid.times[1:], 0)
    early = np.floor((1 - eta) * after).astype(np.int64)
    alpha_r, sigma_r = np.asarray(schedule.alpha(early)), np.asarray(schedule.sigma(early))
    up = np.asarray(schedule.alpha(after)) / alpha_r if eta else np.ones(grid.steps)
    up[-1] = 1.0
    alpha, sigma = grid.alpha[:-1], grid.sigma[:-1]
    x0 = up * (alpha_r - sigma_r * alpha / sigma)
    return linear(grid, up * sigma_r / sigma, x0[:, None], np.sqrt(np.maximum(1 - up**2, 0)))


def _grid(schedule: Schedule, steps: int | None, original: int, times: np.ndarray | None) -> Grid:
    if schedule.num_steps is None:
        raise ValueError("lcm and tcd count a schedule's steps, and this one has none: use ddim")
    if times is None:
        steps = 4 if steps is None else steps
        if not 1 <= steps <= original <= schedule.num_steps:
            raise ValueError(
                f"steps={steps}, but of original_steps={original} and {schedule.num_steps} levels "
                "there must be 1 or more, in this order: lower steps"
            )
        known = np.arange(1, original + 1)[::-1] * (schedule.num_steps // original) - 1
        times = known[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)]
    return make_grid(schedule, times=times)
