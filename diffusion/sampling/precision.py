"""A sampler's state in float64 around a network in float32, as EDM has them.

NVlabs/edm: generate.py keeps x and the noise levels in float64 and hands the network float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.process.gaussian import Denoise

STATES = ("float32", "float64")


def in_float32(denoise: Denoise) -> Denoise:
    """For a state in float64: what `denoise` makes of it in float32."""

    def wrapped(x_t: jax.Array, *times: jax.Array) -> Any:
        narrow = [x.astype(jnp.float32) for x in (x_t, *times)]
        with jax.enable_x64(False):
            found = denoise(*narrow)
        return jax.tree.map(lambda x: x.astype(jnp.float64), found)

    return wrapped


def with_float64(function: Callable[..., Any], state: str) -> Callable[..., Any]:
    """The function, where `state` is "float64" with 64 bits allowed while it is traced and runs."""
    if state == "float32":
        return function

    def wide(*given: Any) -> Any:
        with jax.enable_x64(True):
            return function(*given)

    return wide
