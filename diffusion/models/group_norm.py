"""Group normalisation, with what stands around it in a residual block.

Over space and a group's channels (https://arxiv.org/abs/1803.08494, eq. 1), of x + shift:

    (1)  y = (x + shift - mean) / sqrt(var + epsilon) * scale + bias

ADM (https://arxiv.org/abs/2105.05233, eq. 3) scales and shifts it once more; SiLU may follow. For
GPUs all of that is one multiply-add an element, whose factors are small:

    (2)  u = a x + b,   y = silu(u) or u,   a and b one for each example and channel

Memory's bandwidth is what it costs there. One pass over x makes the moments, in which a shift is
a shift of the channels' means; a second makes y. Backward, one pass over x and dy makes the sums

    (3)  db = sum dz,   da = sum dz x,   dz = dy y'(u)

and one more dx = a dz + what the moments' derivatives add, a multiply-add of x. XLA would write dz
once and read it twice: more than to compute it twice. `target.forward_mode` takes (1).
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import lax
from jaxtyping import Array, Float, Num

from diffusion.models import target


class GroupNorm(nn.Module):
    """Group normalisation, eq. 1; in promote_types(dtype, float32), output in the compute dtype.

    ValueError where `groups` does not divide the channels.
    """

    groups: int = 32
    epsilon: float = 1e-5
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *space channels"],
        shift: Float[Array, "batch channels"] | None = None,
        scale_shift: tuple[Float[Array, "batch channels"], Float[Array, "batch channels"]]
        | None = None,
        silu: bool = False,
    ) -> Float[Array, "batch *space channels"]:
        """`shift` comes before; scale_shift = (scale, shift): y (1 + scale) + shift after it."""
        channels = x.shape[-1]
        if channels % self.groups:
            raise ValueError(
                f"groups={self.groups} does not divide {channels} channels: choose a multiple of "
                "groups, or fewer groups"
            )
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        out_dtype = self.dtype or jnp.result_type(x, scale)
        wide = jnp.promote_types(out_dtype, jnp.float32)
        scale, bias = promote_dtype(scale, bias, dtype=wide)
        aim = target.current()
        if aim.platform == "gpu" and not aim.forward_mode:
            told = {"scale": scale, "bias": bias, "shift": shift, "scale_shift": scale_shift}
            y: Array = in_few_passes(self.groups, self.epsilon, silu, x, told)
            return y.astype(out_dtype)
        x = x if shift is None else x + over_space(shift, x)
        x = x.astype(wide)
        # Space first, then a group's channels: two plain reductions in a channels-last layout.
        mean, inverse = _statistics(self.groups, self.epsilon, *_moments(x))
        y = (x - over_space(mean, x)) * over_space(inverse * scale[None], x)
        y = (y + over_space(bias[None], x)).astype(out_dtype)
        if scale_shift is not None:
            y = y * (1 + over_space(scale_shift[0], y)) + over_space(scale_shift[1], y)
        return nn.silu(y) if silu else y


def _moments(x: Array) -> tuple[Array, Array]:
    """Of each example's channels: the means of x and of its square over space."""
    space = tuple(range(1, x.ndim - 1))
    return x.mean(space), jnp.square(x).mean(space)


def _statistics(groups: int, epsilon: float, mean: Array, square: Array) -> tuple[Array, Array]:
    """A group's mean and 1 / its deviation, for each channel, of the channels' moments."""
    batch, channels = mean.shape
    mean, square = jnp.stack([mean, square]).reshape(2, batch, groups, -1).mean(-1)
    inverse = lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0) + epsilon)
    return tuple(jnp.repeat(m, channels // groups, axis=-1) for m in (mean, inverse))  # pyright: ignore


def over_space(v: Num[Array, "batch channels"], x: Num[Array, "..."]) -> Num[Array, "..."]:
    """`v` with singleton spatial axes, to be broadcast against `x`."""
    return jnp.expand_dims(v, tuple(range(1, x.ndim - 1)))


# -- for GPUs -------------------------------------------------------------------------------------


def _factors(groups: int, epsilon: float, mean: Array, square: Array, told: Any) -> Any:
    """a and b of eq. 2."""
    shift = told["shift"]
    shift = jnp.zeros_like(mean) if shift is None else shift.astype(mean.dtype)
    # E (x + s)^2 = E x^2 + s (2 E x + s)
    moments = mean + shift, square + shift * (2 * mean + shift)
    of_group, inverse = _statistics(groups, epsilon, *moments)
    a = inverse * told["scale"][None]
    b = told["bias"][None] + (shift - of_group) * a
    if told["scale_shift"] is not None:
        factor, offset = (v.astype(mean.dtype) for v in told["scale_shift"])
        a, b = a * (1 + factor), b * (1 + factor) + offset
    return a, b


def _multiply_add(x: Array, a: Array, b: Array) -> Array:
    return x.astype(a.dtype) * over_space(a, x) + over_space(b, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def in_few_passes(
    groups: int,
    epsilon: float,
    silu: bool,
    x: Float[Array, "batch *space channels"],
    told: dict[str, Any],
) -> Float[Array, "batch *space channels"]:
    """Eq. 2, in the dtype of the scale. `told`: scale, bias, and shift and scale_shift or None."""
    return _forward(groups, epsilon, silu, x, told)[0]


def _forward(groups, epsilon, silu, x, told):
    moments = _moments(x.astype(told["scale"].dtype))
    of = functools.partial(_factors, groups, epsilon)
    (a, b), back = jax.vjp(of, *moments, told)
    u = _multiply_add(x, a, b)
    return nn.silu(u) if silu else u, (x, a, b, back)


def _backward(groups, epsilon, silu, saved, dy):
    x, a, b, back = saved
    wide = x.astype(a.dtype)
    space = tuple(range(1, x.ndim - 1))

    def dz(a, b):
        if not silu:
            return dy
        u = _multiply_add(x, a, b)
        s = nn.sigmoid(u)
        return dy * s * (1 + u * (1 - s))

    first = dz(a, b)
    da, db = (first * wide).sum(space), first.sum(space)
    # Of factors that the compiler cannot tell to be the same: it would keep the first dz, else.
    a, b, da, db = lax.optimization_barrier((a, b, da, db))
    dmean, dsquare, dtold = back((da, db))
    places = math.prod(x.shape[1:-1])
    of_moments = _multiply_add(x, 2 * dsquare / places, dmean / places)
    return (dz(a, b) * over_space(a, x) + of_moments).astype(x.dtype), dtold


in_few_passes.defvjp(_forward, _backward)
