r"""DDPM's ancestral sampler (arXiv:2006.11239, Algorithm 2).

    x_s ~ N(posterior mean with x_0 = D(x_t, t), V)                            (1), DDPM eq. 7, 11

for consecutive levels t, s of the grid (all T of them in DDPM; fewer are Improved DDPM's
re-spacing, arXiv:2102.09672 §4, where eq. 7 is applied to the levels kept). The variance V is

    fixed_small   the posterior's, b^2 sigma_s^2 / sigma_t^2   (DDPM's beta~)
    fixed_large   b^2, which is beta_t for neighbours
    learned       exp(f log b^2 + (1 - f) log beta~), f = (v + 1) / 2     (2), Improved DDPM eq. 15

and no noise is added in the step that reaches clean data. Diffusers' "fixed_large" takes the
logarithm of beta where the authors do; its samples are the same.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion.process import gaussian
from diffusion.process.likelihood import check_variance
from diffusion.process.samplers.base import Evaluate, Memory, Row, Sampler, finite, linear
from diffusion.process.samplers.grid import Grid, default_spacing, make_grid
from diffusion.process.schedules import Schedule


def ddpm(
    schedule: Schedule,
    steps: int | None = None,
    *,
    variance: str = "fixed_small",
    spacing: str | None = None,
    **options,
) -> Sampler:
    """Ancestral sampling; ``steps`` None is every step of a discrete schedule.

    ``variance``: fixed_small, fixed_large or learned, which needs a denoise that returns
    (x_0, variance output). ``spacing`` None is linspace for discrete schedules. ``options`` go to
    ``grid.make_grid``.
    """
    check_variance(variance)
    if steps is None and options.get("times") is None:
        steps = schedule.num_steps
    spacing = spacing or default_spacing(schedule, "linspace")
    grid = make_grid(schedule, steps, spacing=spacing, **options)
    table = gaussian.transition(grid.alpha, grid.sigma)
    if variance == "learned":
        return _learned(grid, table)
    chosen = table["variance" if variance == "fixed_small" else "noise_variance"]
    noise = np.sqrt(np.where(grid.sigma[1:] > 0, chosen, 0.0))
    return linear(grid, table["x"], table["x0"][:, None], noise)


def _learned(grid: Grid, table: dict[str, np.ndarray]) -> Sampler:
    small = table["variance"].copy()
    # As the authors clip: the last variance is 0, its logarithm taken from the step before.
    small[small == 0] = small[-2] if grid.steps > 1 else table["noise_variance"][-1]
    rows = {
        "t": grid.times,
        "index": np.arange(grid.steps),
        "x": table["x"],
        "x0": table["x0"],
        "log_small": np.log(small),
        "log_large": np.log(table["noise_variance"]),
        "noisy": (grid.sigma[1:] > 0).astype(np.float64),
    }
    finite(rows)
    return Sampler(
        rows=rows,
        step=_learned_step,
        start=lambda x: (),
        ends=np.arange(grid.steps),
        prior_std=grid.prior_std,
        stochastic=True,
        learned_variance=True,
    )


def _learned_step(
    evaluate: Evaluate, x: Array, memory: Memory, row: Row, noise: Array
) -> tuple[Array, Memory]:
    x0, output = evaluate(x, row["t"])
    fraction = (output.astype(x.dtype) + 1) / 2
    log_variance = fraction * row["log_large"] + (1 - fraction) * row["log_small"]
    deviation = row["noisy"] * jnp.exp(0.5 * log_variance)
    return row["x"] * x + row["x0"] * x0 + deviation * noise, memory
