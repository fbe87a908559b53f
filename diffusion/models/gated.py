"""The first half of gated feed-forward layers (https://arxiv.org/abs/2002.05202, eq. 6).

    (1)  z = h gelu(g),   [h, g] = W x
    (2)  dh = gelu(g) dz,   dg = h (Phi(g) + g phi(g)) dz

with the normal distribution's Phi and its density phi.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax import lax
from jaxtyping import Array, Float

from diffusion.models import target
from diffusion.models.layers import default_init


class GatedDense(nn.Module):
    """The two halves of a dense layer of 2 `features`: [h, g] of eq. 1.

    For GPUs two products and not one that is split: that one's gradient is the halves' written side
    by side, once more as much memory as the layer itself.
    """

    features: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> tuple[Array, Array]:
        kernel = self.param("kernel", default_init, (x.shape[-1], 2 * self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (2 * self.features,), jnp.float32)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        if target.current().platform == "gpu":
            kernels, biases = jnp.split(kernel, 2, axis=-1), jnp.split(bias, 2)
            return tuple(x @ w + b[None, None] for w, b in zip(kernels, biases))  # pyright: ignore
        return tuple(jnp.split(x @ kernel + bias[None, None], 2, axis=-1))  # pyright: ignore


def geglu(h: Float[Array, "*shape"], gate: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Eq. 1. For GPUs its gradient is eq. 2, of h and g alone: left to itself XLA writes what it
    made of g for the way back too (experiments/results/targets)."""
    aim = target.current()
    if aim.platform == "gpu" and not aim.forward_mode:
        return _of_two(h, gate)
    return h * nn.gelu(gate, approximate=False)


@jax.custom_vjp
def _of_two(h: Array, gate: Array) -> Array:
    """In one pass: rounded once, at its end."""
    g, normal = _normal(gate)
    return (h.astype(g.dtype) * g * normal).astype(h.dtype)


def _normal(gate: Array) -> tuple[Array, Array]:
    """g, wide, and Phi(g)."""
    g = gate.astype(jnp.promote_types(gate.dtype, jnp.float32))
    return g, 0.5 * (1 + lax.erf(g * np.sqrt(0.5).astype(g.dtype)))


def _forward(h, gate):
    return _of_two(h, gate), (h, gate)


def _backward(saved, dz):
    h, gate = saved
    g, normal = _normal(gate)
    dz, density = dz.astype(g.dtype), jnp.exp(-0.5 * g * g) * np.sqrt(0.5 / np.pi).astype(g.dtype)
    dgate = dz * h.astype(g.dtype) * (normal + g * density)
    return (dz * g * normal).astype(h.dtype), dgate.astype(gate.dtype)


_of_two.defvjp(_forward, _backward)
