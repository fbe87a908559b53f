"""PatchGAN: a discriminator that says of each patch of an image whether it is real.

Pix2pix (https://arxiv.org/abs/1611.07004, section 3.2.2), as taming-transformers and LDM have it
(`taming/modules/discriminator/model.py`). With C_k a 4-wide convolution to k channels padded by 1,
N a norm, L a leaky ReLU of slope 0.2, and w the channels:

    (1)  h = L(C_w(x))                                        stride 2
    (2)  h = L(N(C_{w min(2^i, 8)}(h))),   i = 1 .. layers    stride 2, the last of them 1
    (3)  logits = C_1(h)                                      stride 1

Initial kernels are N(0, 0.02^2); batch-norm scales N(1, 0.02^2); biases 0 (PyTorch draws those of
the first and the last convolution uniformly).

Batch normalisation (https://arxiv.org/abs/1502.03167, algorithms 1 and 2): over batch and space,

    (4)  y = (h - m) / sqrt(v + 1e-5) * scale + bias;   running m, v <- 0.9 running + 0.1 batch's

with the batch's biased v in y and its unbiased v in the running one, as PyTorch. Statistics are
those of the arrays at hand: of one device's under `pmap` (as LDM's), of the global batch under
`jit`. "group" norm has none across examples, and so gives the same result for any number of
devices.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from diffusion.models.group_norm import GroupNorm
from diffusion.models.layers import Conv

NORMS = ("batch", "group")
STATISTICS = "batch_stats"  # the collection of the running statistics
normal_init = nn.initializers.normal(0.02)


class BatchNorm(nn.Module):
    """Eq. 4. `train`: by the batch's statistics; the running ones move where they are mutable."""

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *space channels"], train: bool
    ) -> Float[Array, "batch *space channels"]:
        shape = x.shape[-1:]
        scale = self.param("scale", _around_one, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        running_mean = self.variable(STATISTICS, "mean", jnp.zeros, shape)
        running_var = self.variable(STATISTICS, "var", jnp.ones, shape)
        out_dtype = self.dtype or jnp.result_type(x, scale)
        wide = jnp.promote_types(out_dtype, jnp.float32)
        x, scale, bias = promote_dtype(x, scale, bias, dtype=wide)
        mean, var = running_mean.value.astype(wide), running_var.value.astype(wide)
        if train:
            axes = tuple(range(x.ndim - 1))
            mean, var = x.mean(axes), x.var(axes)
            self._update(running_mean, mean)
            count = x.size // x.shape[-1]
            self._update(running_var, var * (count / max(count - 1, 1)))
        inverse = scale / jnp.sqrt(var + self.epsilon)
        lead = tuple(range(x.ndim - 1))
        mean, inverse, bias = (jnp.expand_dims(v, lead) for v in (mean, inverse, bias))
        return ((x - mean) * inverse + bias).astype(out_dtype)

    def _update(self, running: nn.Variable, value: Array) -> None:
        if self.is_mutable_collection(STATISTICS) and not self.is_initializing():
            old = running.value
            running.value = self.momentum * old + (1 - self.momentum) * value.astype(old.dtype)


def _around_one(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    return 1.0 + normal_init(key, shape, dtype)


class PatchDiscriminator(nn.Module):
    """`apply(variables, x, train) -> logits (batch, *patches, 1)`, float32 or wider; eqs. 1-3.

    channels: w. layers: of eq. 2; 3 (LDM; 2 for VQ f8 and f16) sees patches of 70 (34) pixels.
    norm: "batch" or "group". With "batch", `variables` holds "batch_stats" beside "params", and a
        training step calls `apply(variables, x, train=True, mutable=["batch_stats"])`, which
        returns (logits, {"batch_stats": ...}); `train=False` normalises by the running statistics.
        With "group" there is no such collection and `train` changes nothing.
    groups: of "group". dtype: what to compute in; parameters and statistics stay float32.
    """

    channels: int = 64
    layers: int = 3
    norm: str = "batch"
    groups: int = 32
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *space channels"], train: bool = False
    ) -> Float[Array, "batch *patches 1"]:
        """ValueError for an unknown norm, and for images too small to leave a patch."""
        self._check(x)
        h = nn.leaky_relu(self._conv(self.channels, 2, "conv_0")(x), 0.2)
        for i in range(1, self.layers + 1):
            width = self.channels * min(2**i, 8)
            bias = self.norm != "batch"  # batch norm has its own
            h = self._conv(width, 2 if i < self.layers else 1, f"conv_{i}", bias)(h)
            h = nn.leaky_relu(self._normalise(h, train, f"norm_{i}"), 0.2)
        logits = self._conv(1, 1, "conv_out")(h)
        return logits.astype(jnp.promote_types(x.dtype, jnp.float32))

    def _conv(self, features: int, strides: int, name: str, use_bias: bool = True) -> Conv:
        return Conv(features, 4, strides, 1, use_bias, normal_init, self.dtype, name=name)

    def _normalise(self, h: Array, train: bool, name: str) -> Array:
        if self.norm == "batch":
            return BatchNorm(dtype=self.dtype, name=name)(h, train)
        return GroupNorm(self.groups, dtype=self.dtype, name=name)(h)

    def _check(self, x: Array) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm={self.norm!r} must be one of {list(NORMS)}")
        smallest = 3 * 2**self.layers
        if min(x.shape[1:-1]) < smallest:
            raise ValueError(
                f"image size {tuple(x.shape[1:-1])} is too small for layers={self.layers}, which "
                f"needs {smallest} pixels a side: use larger images or fewer layers"
            )
