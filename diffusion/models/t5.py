"""T5's encoder, which PixArt and Stable Diffusion 3 read captions with.

T5 is https://arxiv.org/abs/1910.10683, section 2.1;
version 1.1's gate https://arxiv.org/abs/2002.05202.
Tokens have no positions; a layer is, with RMS norms and no biases,

    (1)  h = h + Wo softmax(q k^T + B) v          not divided by sqrt(head_dim)
    (2)  h = h + wo (g(wi_0 u) wi_1 u),  u = norm(h);     or wo g(wi u)

B is one table for all layers, by head and bucket of the distance d from query to key: half of the
buckets for each sign, of those half for d = 0, 1, 2, ..., the others for lengths up to
`max_distance` on a logarithmic scale.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from diffusion.models.attention import ACTIVATIONS


class T5Encoder(nn.Module):
    """`encoder.apply({"params": p}, tokens, mask)`: hidden states (batch, length, width), float32.

    inner: the feed-forward's width. gated: eq. 2's first form. The defaults are
    T5 version 1.1's XXL, 4,762,310,656 parameters.
    """

    vocab_size: int = 32128
    width: int = 4096
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    inner: int = 10240
    activation: str = "gelu_tanh"
    gated: bool = True
    buckets: int = 32
    max_distance: int = 128
    epsilon: float = 1e-6
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"] | None = None,
        keys: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch length width"]:
        """`mask` True: a token; False: padding, which nothing looks at. `keys`: no dropout here."""
        init = nn.initializers.normal(1.0)
        embed = nn.Embed(
            self.vocab_size, self.width, self.dtype, embedding_init=init, name="tokens"
        )
        h = embed(tokens)
        bias = self._bias(tokens.shape[1])
        if mask is not None:
            bias = jnp.where(mask[:, None, None, :], bias, jnp.finfo(bias.dtype).min)
        for i in range(self.layers):
            h = h + self._attend(self._norm(f"layers_{i}_norm1")(h), bias, f"layers_{i}")
            h = h + self._feed_forward(self._norm(f"layers_{i}_norm2")(h), f"layers_{i}")
        h = self._norm("final_norm")(h)
        return h.astype(jnp.promote_types(h.dtype, jnp.float32))

    def _norm(self, name: str) -> nn.Module:
        return nn.RMSNorm(self.epsilon, self.dtype, name=name)

    def _dense(self, features: int, name: str) -> nn.Module:
        return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)

    def _bias(self, length: int) -> Float[Array, "1 heads length length"]:
        table = self.param("bias", nn.initializers.normal(1.0), (self.buckets, self.heads))
        bucket = relative_buckets(length, self.buckets, self.max_distance)
        return jnp.moveaxis(table[bucket], -1, 0)[None]

    def _attend(self, u: Array, bias: Array, name: str) -> Array:
        """Eq. 1."""
        split = (*u.shape[:2], self.heads, self.head_dim)
        inner = self.heads * self.head_dim
        q, k, v = (self._dense(inner, f"{name}_{part}")(u).reshape(split) for part in "qkv")
        wide = jnp.promote_types(u.dtype, jnp.float32)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=wide) + bias
        weights = jax.nn.softmax(scores.astype(wide), axis=-1).astype(v.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*u.shape[:2], inner)
        return self._dense(self.width, f"{name}_o")(y)

    def _feed_forward(self, u: Array, name: str) -> Array:
        """Eq. 2."""
        act = ACTIVATIONS[self.activation]
        if self.gated:
            h = act(self._dense(self.inner, f"{name}_wi_0")(u))
            h = h * self._dense(self.inner, f"{name}_wi_1")(u)
        else:
            h = act(self._dense(self.inner, f"{name}_wi")(u))
        return self._dense(self.width, f"{name}_wo")(h)


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """(length, length) bucket of key minus query, as Transformers rounds: in float32."""
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    half, exact = buckets // 2, buckets // 4
    far = np.maximum(np.abs(distance), 1).astype(np.float32)
    scale = np.float32(math.log(max_distance / exact))
    large = np.log(far / np.float32(exact)) / scale * np.float32(half - exact)
    large = np.minimum(exact + large.astype(np.int32), half - 1)
    found = np.where(np.abs(distance) < exact, np.abs(distance), large)
    return found + half * (distance > 0)
