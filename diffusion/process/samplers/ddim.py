r"""DDIM (arXiv:2010.02502), and everything that equals it.

    x_s = alpha_s D + sqrt(sigma_s^2 - tau^2) e + tau z,   e = (x_t - alpha_t D) / sigma_t     (1)
    tau = eta (sigma_s / sigma_t) b,   b^2 = sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2

(eq. 12 and 16 there, for any alpha and sigma). eta = 0 is the probability-flow ODE by an Euler step
in sigma/alpha, equally an Euler step of rectified flow; eta = 1 is ancestral sampling with the
posterior's variance. (1) never divides by alpha, so it serves zero terminal SNR.

Deviation: e is computed from D after clipping, as in Improved DDPM; Diffusers does so only with
use_clipped_model_output=True: `clip` is its default, which clips D alone. Under linspace spacing
Diffusers steps to the level of t - T // steps, which is not the next evaluated one; here, as in the
paper, it is.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion.process.samplers.base import Evaluate, Memory, Row, Sampler, linear, linear_step
from diffusion.process.samplers.grid import Grid, make_grid
from diffusion.process.schedules import Schedule


def ddim(
    schedule: Schedule,
    steps: int | None = None,
    *,
    eta: float | int = 0.0,
    clip: float | int = 0.0,
    **options,
) -> Sampler:
    """DDIM of ``steps`` (50) steps with noise ``eta`` in [0, 1].

    ``clip`` > 0: the D of eq. 1, but not that of its e, is held in [-clip, clip].
    ``options`` go to ``grid.make_grid``: ``spacing`` (leading for discrete schedules; LDM's is
    leading with ``steps_offset=1, final="first"``), ``final``, ``times``.
    """
    grid = make_grid(schedule, steps, **options)
    made = from_grid(grid, eta)
    if not clip:
        return made
    if clip < 0:
        raise ValueError(f"clip={clip}, but it must be above 0, or 0 for none")

    def step(evaluate: Evaluate, x: Array, memory: Memory, row: Row, noise: Any):
        seen = []

        def kept(x_t: Array, t: Any) -> tuple[Array, Any]:
            seen.append(evaluate(x_t, t)[0])
            return seen[0], None

        out, memory = linear_step(kept, x, memory, row, noise)
        return out + row["alpha"] * (jnp.clip(seen[0], -clip, clip) - seen[0]), memory

    rows = {**made.rows, "alpha": grid.alpha[1:]}
    return dataclasses.replace(made, rows=rows, step=step)


def from_grid(grid: Grid, eta: float | int) -> Sampler:
    """Eq. 1 on this grid."""
    if not 0 <= eta <= 1:
        raise ValueError(
            f"eta={eta}, but it must lie in [0, 1]: 0 is deterministic, 1 is ancestral"
        )
    alpha, sigma = grid.alpha, grid.sigma
    shrink = (alpha[:-1] * sigma[1:]) / (alpha[1:] * sigma[:-1])
    tau = eta * sigma[1:] * np.sqrt(np.maximum(1 - shrink**2, 0))
    x = np.sqrt(np.maximum(sigma[1:] ** 2 - tau**2, 0)) / sigma[:-1]
    return linear(grid, x, (alpha[1:] - alpha[:-1] * x)[:, None], tau)
