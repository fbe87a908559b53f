"""Samplers: constructors by name, and ``sample``, the one loop that runs them.

s = SAMPLERS["ddim"](schedule, steps=50)
x0 = sample(s, denoise, s.prior_std * noise, keys)
"""

from collections.abc import Callable

from diffusion.process.samplers.ancestral import ddpm
from diffusion.process.samplers.base import Sampler, sample, step_noise
from diffusion.process.samplers.ddim import ddim
from diffusion.process.samplers.grid import SPACINGS, Grid, make_grid

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ddpm": ddpm,
    "ddim": ddim,
}

__all__ = ["SAMPLERS", "SPACINGS", "Grid", "Sampler", "make_grid", "sample", "step_noise"]
