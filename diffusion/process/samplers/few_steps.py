r"""Samplers of networks that were trained for one to four evaluations (`process/few_steps.py`).

    meanflow      DDIM's step from t to s with the x_0 of the jump from t to s: exact for an exact
                  network, whatever the steps (arXiv:2505.13447 eq. 12)
    consistency   x_s = alpha_s f(x_t, t) + sigma_s z, with fresh noise z
                  (multistep consistency sampling, arXiv:2303.01469 algorithm 1)

The last jump ends at clean data; the network is told the schedule's least time, which for a
discrete schedule is a little before it (DDPM's t = 1).
"""

import dataclasses

import numpy as np

from diffusion.process.samplers.base import Sampler, linear
from diffusion.process.samplers.ddim import from_grid
from diffusion.process.samplers.grid import Grid, default_spacing, make_grid
from diffusion.process.schedules import Schedule


def meanflow(schedule: Schedule, steps: int | None = None, **options) -> Sampler:
    """``steps`` (1) jumps of a network of two times; ``options`` go to ``grid.make_grid``.

    Discrete schedules start at their last level (spacing trailing).
    """
    grid = _grid(schedule, steps, options)
    made = from_grid(grid, eta=0)
    last = schedule.time_range[0] if np.isnan(grid.final_time) else grid.final_time
    whole = grid.times.dtype == np.int64 and last == round(last)
    ends = np.append(grid.times[1:], int(last) if whole else float(last))
    return dataclasses.replace(made, rows={**made.rows, "s": ends})


def consistency(schedule: Schedule, steps: int | None = None, **options) -> Sampler:
    """``steps`` (1) evaluations of a consistency function; ``options`` as for ``meanflow``."""
    grid = _grid(schedule, steps, options)
    return linear(grid, np.zeros(grid.steps), grid.alpha[1:, None], grid.sigma[1:])


def _grid(schedule: Schedule, steps: int | None, options: dict) -> Grid:
    """As ``make_grid``; on EDM's levels the last of n + 1 is left out, for it has no noise left."""
    steps = 1 if steps is None and "times" not in options else steps
    options = {"spacing": default_spacing(schedule, "trailing"), **options}
    if options["spacing"] != "karras" or "times" in options:
        return make_grid(schedule, steps, **options)
    times = make_grid(schedule, (steps or 1) + 1, **options).times[:-1]
    return make_grid(schedule, **{**options, "times": times})
