"""Rank-generic layers of the U-Net and the autoencoder: convolution, norm, residual block, sizes.

Arrays are (batch, *space, channels) with one, two or three spatial axes, as read from the input.

Sinusoidal time embedding (DDPM, https://arxiv.org/abs/2006.11239, appendix B), half = dim // 2:

    (1)  w_i = max_period^(-i / (half - freq_shift)), i < half;   emb(t) = [sin(w t), cos(w t)]

DDPM has freq_shift = 1 and this order; ADM, LDM and Stable Diffusion freq_shift = 0 and [cos, sin].

Residual block (DDPM; the scale-shift variant is ADM's, https://arxiv.org/abs/2105.05233, eq. 3):

    (2)  h   = conv1(resample(silu(norm1(x))))
    (3)  h   = norm2(h + W silu(temb))   or   norm2(h) * (1 + a) + b,  [a, b] = W silu(temb)
    (4)  out = shortcut(resample(x)) + conv2(dropout(silu(h)))
"""

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key, Num

from diffusion.models import convolution
from diffusion.models.group_norm import GroupNorm

Padding = int | tuple[int, int] | None

# DDPM's `default_init` (`diffusion_tf/nn.py`): scale 1, and 1e-10 where it says "zero".
default_init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
zero_init = nn.initializers.variance_scaling(1e-10, "fan_avg", "uniform")

Dense = functools.partial(nn.Dense, kernel_init=default_init)


class Conv(nn.Module):
    """Convolution over every spatial axis with the same odd kernel, stride and padding.

    `padding` None keeps the size at stride 1 (kernel_size // 2 on both sides); an int pads both
    sides; (low, high) pads them apart. Rematerialisation policies know the output as "conv".
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: Padding = None
    use_bias: bool = True
    kernel_init: Callable[..., Any] = default_init
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *space channels"]
    ) -> Float[Array, "batch *out_space features"]:
        rank = x.ndim - 2
        shape = (self.kernel_size,) * rank + (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = (
            self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        )
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = convolution.conv(x, kernel, self.strides, self._padding())
        if bias is not None:
            y = y + jnp.expand_dims(bias, tuple(range(rank + 1)))
        return checkpoint_name(y, "conv")

    def _padding(self) -> tuple[int, int]:
        padding = self.kernel_size // 2 if self.padding is None else self.padding
        return (padding, padding) if isinstance(padding, int) else padding


class Dropout(nn.Module):
    """Dropout whose mask depends on the example's own key and the layer's place, on nothing else.

    `keys` None: deterministic. Each layer folds a hash of its module path into the key, so that one
    key per example serves the network, and masks are the same for any batch size and device count.
    """

    rate: int | float

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *rest"], keys: Key[Array, "batch"] | None = None
    ) -> Float[Array, "batch *rest"]:
        if keys is None or self.rate == 0:
            return x
        place = zlib.crc32("/".join(self.path).encode())
        keep = 1.0 - self.rate

        def mask(key: Key[Array, ""]) -> Array:
            return jax.random.bernoulli(jax.random.fold_in(key, place), keep, x.shape[1:])

        return jnp.where(jax.vmap(mask)(keys), x / keep, jnp.zeros_like(x))


def upsample(
    x: Num[Array, "batch *space channels"], factor: int = 2
) -> Num[Array, "batch *out_space channels"]:
    """Nearest-neighbour upsampling of every spatial axis.

    Broadcast and reshape: `jax.image.resize` lowers to gathers, and to scatters in the gradient.
    """
    batch, *space, channels = x.shape
    for axis in range(len(space)):
        x = jnp.expand_dims(x, 2 * axis + 2)
    x = jnp.broadcast_to(x, (batch, *(n for size in space for n in (size, factor)), channels))
    return x.reshape(batch, *(size * factor for size in space), channels)


def average_pool(
    x: Float[Array, "batch *space channels"], factor: int = 2
) -> Float[Array, "batch *out_space channels"]:
    """Mean of blocks, `factor` places an axis. ValueError for sizes it does not divide."""
    batch, *space, channels = x.shape
    if any(size % factor for size in space):
        raise ValueError(
            f"size {tuple(space)} is not a multiple of {factor}: pad or crop the input to one"
        )
    x = x.reshape(batch, *(n for size in space for n in (size // factor, factor)), channels)
    return x.mean(tuple(range(2, 2 * len(space) + 1, 2)))


def fir_upsample(x: Float[Array, "batch *space channels"]) -> Float[Array, "batch *out channels"]:
    """Doubles every spatial axis through the filter [1, 3, 3, 1] / 4: linear, zero outside (NCSN++,
    https://arxiv.org/abs/2011.13456, appendix H)."""
    for axis in range(1, x.ndim - 1):
        shifted = [_taps(x, axis, 1, start, x.shape[axis]) for start in (0, 2)]
        pair = jnp.stack([3 * x + other for other in shifted], axis + 1) / 4
        x = pair.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])
    return x


def fir_downsample(
    x: Float[Array, "batch *space channels"], padding: int = 1
) -> Float[Array, "batch *out channels"]:
    """Halves every spatial axis through [1, 3, 3, 1] / 8, after `padding` zeros on both sides."""
    for axis in range(1, x.ndim - 1):
        size = (x.shape[axis] + 2 * padding - 2) // 2
        taps = [_taps(x, axis, padding, start, size, 2) for start in range(4)]
        x = (taps[0] + 3 * taps[1] + 3 * taps[2] + taps[3]) / 8
    return x


def _taps(x: Array, axis: int, padding: int, start: int, size: int, step: int = 1) -> Array:
    """`size` places of a zero-padded axis, every `step`-th from `start`."""
    around = [(padding, padding) if i == axis else (0, 0) for i in range(x.ndim)]
    stop = start + step * (size - 1) + 1
    return jax.lax.slice_in_dim(jnp.pad(x, around), start, stop, step, axis)


class Downsample(nn.Module):
    """Halves every spatial axis: a strided convolution, or an average where `use_conv` is False.

    `padding` 1 is symmetric (ADM, LDM); (0, 1) is TensorFlow's SAME (DDPM, the LDM autoencoder).
    """

    features: int
    padding: Padding = 1
    use_conv: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *space channels"]
    ) -> Float[Array, "batch *out_space features"]:
        if not self.use_conv:
            return average_pool(x)
        return Conv(self.features, strides=2, padding=self.padding, dtype=self.dtype, name="conv")(
            x
        )


class Upsample(nn.Module):
    """Doubles every spatial axis (nearest), then a convolution unless `use_conv` is False."""

    features: int
    use_conv: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *space channels"]
    ) -> Float[Array, "batch *out_space features"]:
        x = upsample(x)
        return Conv(self.features, dtype=self.dtype, name="conv")(x) if self.use_conv else x


RESAMPLE = {
    None: lambda x: x,
    "up": upsample,
    "down": average_pool,
    "up_fir": fir_upsample,
    "down_fir": fir_downsample,
}


class ResBlock(nn.Module):
    """Residual block, eqs. 2-4.

    features: output channels; a 1x1 convolution is the shortcut where the input has others.
    scale_shift: the time embedding scales and shifts after norm2 (ADM), or is added before it.
    resample: a key of RESAMPLE: doubles or halves the size inside the block (BigGAN, ADM).
    resample_proj: the shortcut has its convolution also where only the size differs (EDM).
    zero_conv: conv2 starts at (nearly) zero, so that the block starts as its shortcut.
    """

    features: int
    groups: int = 32
    epsilon: float = 1e-5
    dropout: int | float = 0.0
    scale_shift: bool = False
    resample: str | None = None
    zero_conv: bool = True
    resample_proj: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *space channels"],
        temb: Float[Array, "batch embedding"] | None = None,
        keys: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch *out_space features"]:
        norm = functools.partial(GroupNorm, self.groups, self.epsilon, self.dtype)
        conv = functools.partial(Conv, self.features, dtype=self.dtype)
        resample = RESAMPLE[self.resample]
        h = conv(name="conv1")(resample(norm(name="norm1")(x, silu=True)))
        h = self._condition(h, temb, norm(name="norm2"))
        h = Dropout(self.dropout, name="dropout")(h, keys)
        h = conv(kernel_init=zero_init if self.zero_conv else default_init, name="conv2")(h)
        x = resample(x)
        if x.shape[-1] != self.features or (self.resample and self.resample_proj):
            x = conv(kernel_size=1, name="conv_shortcut")(x)
        return x + h

    def _condition(self, h: Array, temb: Array | None, norm: Any) -> Array:
        """silu of eq. 3."""
        if temb is None:
            return norm(h, silu=True)
        width = self.features * (2 if self.scale_shift else 1)
        shift = Dense(width, dtype=self.dtype, name="time_emb_proj")(nn.silu(temb))
        if not self.scale_shift:
            return norm(h, shift, silu=True)
        return norm(h, scale_shift=tuple(jnp.split(shift, 2, axis=-1)), silu=True)


def timestep_embedding(
    t: Num[Array, "batch"],
    dim: int,
    flip_sin_to_cos: bool = True,
    freq_shift: int | float = 0,
    max_period: int | float = 10000,
) -> Float[Array, "batch {dim}"]:
    """Eq. 1, in promote_types(t.dtype, float32); an odd `dim` ends in a zero."""
    half = dim // 2
    dtype = jnp.promote_types(t.dtype, jnp.float32)
    # The references round each step to float32; at t = 1000 rounding elsewhere would show as 1e-5.
    exponent = np.arange(half, dtype=dtype) * np.asarray(-math.log(max_period), dtype)
    frequency = np.exp(exponent / np.asarray(half - freq_shift, dtype))
    angle = t.astype(dtype)[:, None] * jnp.asarray(frequency)[None]
    parts = (
        [jnp.cos(angle), jnp.sin(angle)] if flip_sin_to_cos else [jnp.sin(angle), jnp.cos(angle)]
    )
    embedding = jnp.concatenate(parts, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))
