"""The blocks of `models/transformer.py`, and what its ends share with them.

Equation numbers are that file's.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from diffusion.models.attention import Attention, FeedForward
from diffusion.models.layers import Dense

# Xavier's bound of one (width, 3 width) matrix: variance 2 / (width + 3 width).
qkv_init = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")


class Block(nn.Module):
    """Eq. 5; `c` is eq. 2's, or with "single" W silu(c) of eq. 4, (batch, 6 width)."""

    width: int
    heads: int
    mult: int | float
    modulation: str
    cross: bool
    norm: str
    qk_norm: bool
    activation: str
    epsilon: float
    mlp_epsilon: float | None
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        u: Float[Array, "batch tokens width"],
        c: Float[Array, "batch conditions"],
        context: Float[Array, "batch keys width"] | None = None,
        context_mask: Bool[Array, "batch keys"] | None = None,
        angles: Float[Array, "tokens half"] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        if self.modulation == "zero":
            six = zero_dense(6 * self.width, self.dtype, "modulation")(nn.silu(c))
        else:
            six = c + table(self, 6, self.width)[None].astype(c.dtype)
        b1, s1, g1, b2, s2, g2 = jnp.split(six[:, None], 6, axis=-1)
        norm = functools.partial(make_norm, self.norm, dtype=self.dtype)
        attend = functools.partial(
            Attention,
            self.heads,
            self.width // self.heads,
            qkv_bias=True,
            qkv_init=qkv_init,
            dtype=self.dtype,
        )
        qk_norm = self.norm if self.qk_norm else None
        h = norm(self.epsilon, name="norm1")(u) * (1 + s1) + b1
        u = u + g1 * attend(qk_norm=qk_norm, name="attn1")(h, angles=angles)
        if self.cross:
            u = u + attend(out_init=nn.initializers.zeros, name="attn2")(u, context, context_mask)
        h = norm(self.mlp_epsilon or self.epsilon, name="norm2")(u) * (1 + s2) + b2
        return u + g2 * FeedForward(self.activation, self.mult, self.dtype, name="ff")(h)


def folded(
    block: Any, u: Array, frames: int, over: int, told: tuple[Any, ...], angles: Array | None
) -> Array:
    """`block` on u's (batch, frames x places) tokens: over 1 those of each frame, 2 of each place.

    told: c, context and its mask, (batch, ...) each or None.
    """
    if frames == 1 and over == 1:
        return block(u, *told, angles)
    batch, _, width = u.shape
    u = u.reshape(batch, frames, -1, width)
    u = u if over == 1 else u.swapaxes(1, 2)
    each = [a if a is None else jnp.repeat(a, u.shape[1], axis=0) for a in told]
    out = block(u.reshape(-1, u.shape[2], width), *each, angles).reshape(u.shape)
    return (out if over == 1 else out.swapaxes(1, 2)).reshape(batch, -1, width)


def make_norm(kind: str, epsilon: float, dtype: Any, name: str) -> nn.Module:
    """Over channels: "layer" has no parameters, "rms" a scale."""
    if kind == "rms":
        return nn.RMSNorm(epsilon, dtype, name=name)
    return nn.LayerNorm(epsilon, dtype, use_bias=False, use_scale=False, name=name)


def zero_dense(features: int, dtype: Any, name: str) -> nn.Module:
    return Dense(features, kernel_init=nn.initializers.zeros, dtype=dtype, name=name)


def table(module: nn.Module, rows: int, width: int) -> Array:
    """Eq. 4's, flat; PixArt starts it from N(0, 1 / width)."""
    init = nn.initializers.normal(width**-0.5)
    return module.param("table", init, (rows, width)).reshape(-1)
