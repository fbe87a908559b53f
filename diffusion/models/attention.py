"""Attention and the transformer blocks of the U-Net and the text encoders.

Scaled dot-product attention (https://arxiv.org/abs/1706.03762, eq. 1), per head, over tokens:

    (1)  out = softmax(q k^T / sqrt(head_dim)) v

Transformer block of LDM (https://arxiv.org/abs/2112.10752, appendix E.2.1; pre-norm):

    (2)  x = x + attn1(norm1(x));   x = x + attn2(norm2(x), context);   x = x + ff(norm3(x))

Gated feed-forward (https://arxiv.org/abs/2002.05202, eq. 6):

    (3)  ff(x) = W2 (a * gelu(g)),   [a, g] = W1 x

Tokens of a grid are its places in row-major order, for any number of spatial axes.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from diffusion.models import target
from diffusion.models.gated import GatedDense, geglu
from diffusion.models.group_norm import GroupNorm
from diffusion.models.layers import Conv, Dense, default_init, zero_init
from diffusion.models.positions import rotate
from diffusion.models.tpu import tpu_applies, tpu_attention

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": nn.gelu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "silu": nn.silu,
}

# Below this many keys the score matrix is small, and XLA's own fusion as fast as a cuDNN call.
CUDNN_MIN_KEYS = 256


def dot_product_attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    mask: Bool[Array, "#batch #heads #queries keys"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch queries heads head_dim"]:
    """Eq. 1; softmax in promote_types(dtype, float32). `mask` True: the query may look at the key.

    `implementation` "xla", "cudnn" or "pallas" forces the kernel; None takes that of `target.py`
    where it applies.
    """
    kernel = implementation or chosen_kernel(q, k, v, mask)
    if kernel == "xla":
        return _xla_attention(q, k, v, mask)
    if kernel == "pallas":
        return tpu_attention(q, k, v)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=kernel)  # pyright: ignore


def chosen_kernel(q: Array, k: Array, v: Array, mask: Array | None) -> str:
    """One of "xla", "cudnn" and "pallas", for the target.

    Flash attention is for scores that are not small, without a mask: cuDNN wants one as a bias,
    which restricts the lengths when training. Neither kernel has a forward mode. Half precision
    alone; cuDNN's widths as in
    `jax/_src/cudnn/fused_attention_stablehlo.py::check_is_flash_attention`.
    """
    aim, half = target.current(), q.dtype in (jnp.bfloat16, jnp.float16)
    if mask is not None or aim.forward_mode or not (half and q.dtype == k.dtype == v.dtype):
        return "xla"
    if aim.platform == "tpu" and tpu_applies(q, k):
        return "pallas"
    fits = k.shape[1] >= CUDNN_MIN_KEYS and q.shape[-1] % 8 == 0
    return "cudnn" if fits and q.shape[-1] <= aim.cudnn_head_dim else "xla"


def _xla_attention(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Not `jax.nn`'s, whose softmax is in float32 also for float64."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=wide)
    scores = scores * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


class Attention(nn.Module):
    """Multi-head attention over tokens, from `x` to itself or to `context`.

    `mask`: (batch, keys), or what broadcasts to (batch, heads, queries, keys); True: may be looked
    at. The output width is that of `x`, or out_features; `heads * head_dim` need not be. qk_norm:
    "layer" or "rms", over the channels of each head's q and k. angles: rotary positions, for
    self-attention.
    """

    heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = True
    out_init: Callable[..., Any] = default_init
    qkv_init: Callable[..., Any] = default_init
    qk_norm: str | None = None
    out_features: int | None = None
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        context: Float[Array, "batch keys context_width"] | None = None,
        mask: Bool[Array, "#batch keys"] | Bool[Array, "#batch #heads #tokens keys"] | None = None,
        angles: Float[Array, "tokens half"] | None = None,
    ) -> Float[Array, "batch tokens out_width"]:
        context = x if context is None else context
        inner = self.heads * self.head_dim
        project = functools.partial(
            Dense, inner, use_bias=self.qkv_bias, kernel_init=self.qkv_init, dtype=self.dtype
        )
        q, k, v = (
            project(name=name)(tokens).reshape(*tokens.shape[:2], self.heads, self.head_dim)
            for name, tokens in (("to_q", x), ("to_k", context), ("to_v", context))
        )
        if self.qk_norm is not None:
            norm = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[self.qk_norm]
            q, k = (norm(1e-6, self.dtype, name=f"norm_{n}")(h) for n, h in (("q", q), ("k", k)))
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if mask is not None and mask.ndim == 2:
            mask = mask[:, None, None, :]
        y = dot_product_attention(q, k, v, mask).reshape(*x.shape[:2], inner)
        y = checkpoint_name(y, "attention")
        return Dense(
            self.out_features or x.shape[-1],
            use_bias=self.out_bias,
            kernel_init=self.out_init,
            dtype=self.dtype,
            name="to_out",
        )(y)


class FeedForward(nn.Module):
    """Two dense layers, `mult` times the width between them (rounded down).

    `activation` is "geglu" (eq. 3), "swiglu" (silu(a) * g) or a key of ACTIVATIONS; ValueError for
    another.
    """

    activation: str = "geglu"
    mult: int | float = 4
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        gated = self.activation in ("geglu", "swiglu")
        if not gated and self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={self.activation!r} is unknown: choose geglu, swiglu or one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        width, inner = x.shape[-1], int(x.shape[-1] * self.mult)
        if gated:
            h, gate = GatedDense(inner, self.dtype, name="proj_in")(x)
            h = geglu(h, gate) if self.activation == "geglu" else nn.silu(h) * gate
        else:
            h = ACTIVATIONS[self.activation](Dense(inner, dtype=self.dtype, name="proj_in")(x))
        return Dense(width, dtype=self.dtype, name="proj_out")(h)


class TransformerBlock(nn.Module):
    """Eq. 2. With `cross` False there is no attn2 (nor norm2), only attn1 and the feed-forward.

    With `cross` True and no context given, attn2 looks at the tokens themselves, as in CompVis.
    """

    heads: int
    head_dim: int
    cross: bool = True
    activation: str = "geglu"
    mult: int | float = 4
    qkv_bias: bool = False
    epsilon: float = 1e-5
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        context: Float[Array, "batch keys context_width"] | None = None,
        context_mask: Bool[Array, "#batch keys"] | None = None,
        mask: Bool[Array, "#batch tokens"]
        | Bool[Array, "#batch #heads #tokens tokens"]
        | None = None,
    ) -> Float[Array, "batch tokens width"]:
        norm = functools.partial(nn.LayerNorm, self.epsilon, self.dtype)
        attend = functools.partial(
            Attention, self.heads, self.head_dim, qkv_bias=self.qkv_bias, dtype=self.dtype
        )
        x = x + attend(name="attn1")(norm(name="norm1")(x), mask=mask)
        if self.cross:
            x = x + attend(name="attn2")(norm(name="norm2")(x), context, context_mask)
        feed_forward = FeedForward(self.activation, self.mult, self.dtype, name="ff")
        return x + feed_forward(norm(name="norm3")(x))


class AttentionBlock(nn.Module):
    """Self-attention over the places of a grid, a group norm before, a residual around (DDPM)."""

    heads: int
    head_dim: int
    groups: int = 32
    epsilon: float = 1e-5
    dtype: Any = None
    qkv_init: Callable[..., Any] = default_init

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *space channels"]
    ) -> Float[Array, "batch *space channels"]:
        h = GroupNorm(self.groups, self.epsilon, self.dtype, name="group_norm")(x)
        attention = Attention(
            self.heads,
            self.head_dim,
            qkv_bias=True,
            out_init=zero_init,
            qkv_init=self.qkv_init,
            dtype=self.dtype,
            name="attention",
        )
        return x + attention(to_tokens(h)).reshape(x.shape)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the places of a grid, looking at context tokens, a residual around.

    `linear_projection`: project in and out with dense layers (SD 2.x) rather than 1x1 convolutions
    (SD 1.x, LDM); both compute the same, but files store their weights in different shapes.
    """

    heads: int
    head_dim: int
    depth: int = 1
    cross: bool = True
    linear_projection: bool = False
    groups: int = 32
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *space channels"],
        context: Float[Array, "batch keys context_width"] | None = None,
        context_mask: Bool[Array, "#batch keys"] | None = None,
    ) -> Float[Array, "batch *space channels"]:
        inner = self.heads * self.head_dim
        h = GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x)
        h = to_tokens(self._project(inner, default_init, "proj_in")(h))
        for i in range(self.depth):
            block = TransformerBlock(
                self.heads, self.head_dim, self.cross, dtype=self.dtype, name=f"blocks_{i}"
            )
            h = block(h, context, context_mask)
        h = h.reshape(*x.shape[:-1], inner)
        return x + self._project(x.shape[-1], zero_init, "proj_out")(h)

    def _project(self, features: int, init: Callable[..., Any], name: str) -> nn.Module:
        if self.linear_projection:
            return Dense(features, kernel_init=init, dtype=self.dtype, name=name)
        return Conv(features, kernel_size=1, kernel_init=init, dtype=self.dtype, name=name)


def mean_token(
    tokens: Float[Array, "batch tokens width"], mask: Bool[Array, "batch tokens"] | None
) -> Float[Array, "batch width"]:
    """Mean of the tokens that may be looked at; zero where there are none."""
    weight = jnp.ones(tokens.shape[:2], bool) if mask is None else mask
    weight = weight[..., None].astype(tokens.dtype)
    return (tokens * weight).sum(1) / jnp.maximum(weight.sum(1), 1)


def to_tokens(x: Float[Array, "batch *space channels"]) -> Float[Array, "batch tokens channels"]:
    """The places of the grid in row-major order."""
    return x.reshape(x.shape[0], -1, x.shape[-1])
