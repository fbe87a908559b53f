"""Samplers: constructors by name, and ``sample``, the one loop that runs them.

s = SAMPLERS["ddim"](schedule, steps=50)
x0 = sample(s, denoise, s.prior_std * noise, keys)
"""

from collections.abc import Callable

from diffusion.process.samplers.ancestral import ddpm
from diffusion.process.samplers.base import Sampler, estimates, sample, step_noise
from diffusion.process.samplers.ddim import ddim
from diffusion.process.samplers.dpm_solver import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m
from diffusion.process.samplers.few_steps import consistency, meanflow
from diffusion.process.samplers.flow import dopri5, euler_maruyama
from diffusion.process.samplers.grid import SPACINGS, Grid, make_grid
from diffusion.process.samplers.karras import euler, euler_ancestral, heun
from diffusion.process.samplers.lcm import lcm, tcd
from diffusion.process.samplers.multistep import deis, dpm2, lms
from diffusion.process.samplers.plms import plms, pndm
from diffusion.process.samplers.unipc import unipc

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": unipc,
    "pndm": pndm,
    "plms": plms,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "euler_maruyama": euler_maruyama,
    "dopri5": dopri5,
    "meanflow": meanflow,
    "consistency": consistency,
    "lms": lms,
    "deis": deis,
    "dpm2": dpm2,
    "lcm": lcm,
    "tcd": tcd,
}

__all__ = [
    "SAMPLERS",
    "SPACINGS",
    "Grid",
    "Sampler",
    "estimates",
    "make_grid",
    "sample",
    "step_noise",
]
