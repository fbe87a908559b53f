"""MMDiT, Stable Diffusion 3's transformer (https://arxiv.org/abs/2403.03206, section 4, figure 2).

Patches u and words w are two streams with weights of their own, which attend to both together:

    (1)  c = mlp(emb(t)) + mlp(pooled caption)
    (2)  [q, k, v] = [of u; of w],   [y_u; y_w] = softmax(q k^T / sqrt(head_dim)) v
    (3)  as eq. 3 and 5 of `models/transformer.py`, for each stream; the last block has no need of w
         and leaves it
    (4)  in the first `dual` blocks (3.5 medium) u also attends to itself alone

Positions are those of a grid of `grid` patches a side, scaled to what `size` has, of which the
centre is taken: one network for all sizes within.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, Num

from diffusion.models.attention import Attention, FeedForward, dot_product_attention, mean_token
from diffusion.models.layers import Dense, timestep_embedding
from diffusion.models.positions import patches, per_axis, sincos_positions, unpatch
from diffusion.models.transformer_blocks import make_norm, qkv_init, zero_dense
from diffusion.models.unet import REMAT_POLICIES

TIME_WIDTH = 256
small_init = nn.initializers.normal(0.02)


class MMDiT(nn.Module):
    """`apply({"params": p}, x, t, context, context_mask, pooled=...)`: like x, out_channels.

    size: places a side that positions are for; grid: patches a side at most. qk_norm: RMS norms of
    each head's q and k (3.5). dual: eq. 4's blocks. pool: c is told of `pooled`, "given" (CLIP's
    projected vectors), or of the "mean" word. The defaults are SD3 medium's.
    """

    out_channels: int = 16
    patch: int = 2
    width: int = 1536
    depth: int = 24
    heads: int = 24
    mult: int | float = 4
    size: int = 128
    grid: int = 192
    qk_norm: bool = False
    dual: int = 0
    pool: str = "given"
    activation: str = "gelu_tanh"
    epsilon: float = 1e-6
    dtype: Any = None
    remat: str | None = None

    num_classes = None  # it is told of words alone

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *space channels"],
        t: Num[Array, ""] | Num[Array, "batch"],
        context: Float[Array, "batch tokens context_width"] | None = None,
        context_mask: Bool[Array, "batch tokens"] | None = None,
        residuals: Any = None,
        keys: Key[Array, "batch"] | None = None,
        pooled: Float[Array, "batch pooled_width"] | None = None,
    ) -> Float[Array, "batch *space out_channels"]:
        """Float32 or wider. `context_mask` True: may be looked at. `keys`: there is no dropout.

        ValueError for sizes that the patch does not divide or the grid does not hold, and for a
        context or pooled caption that is missing, or given where it is not read.
        """
        self._check(context, pooled, residuals)
        patch = per_axis("patch", self.patch, x.ndim - 2)
        places = self._places(x.shape[1:-1])
        u = Dense(self.width, dtype=self.dtype, name="patches")(patches(x, patch))
        u = u.reshape(len(x), -1, self.width)
        u = u + jnp.asarray(sincos_positions(places, self.width), u.dtype)[None]
        words: Any = context
        pooled = mean_token(words, context_mask) if self.pool == "mean" else pooled
        c = self._condition(x, t, pooled)
        words = Dense(self.width, dtype=self.dtype, name="context")(words)
        block = JointBlock
        if self.remat:
            block = nn.remat(JointBlock, policy=REMAT_POLICIES[self.remat])
        for i in range(self.depth):
            last, dual = i == self.depth - 1, i < self.dual
            sizes = (self.width, self.heads, self.mult, self.qk_norm, self.activation)
            make = block(*sizes, self.epsilon, last, dual, self.dtype, name=f"blocks_{i}")
            u, words = make(u, words, c, context_mask)
        both = zero_dense(2 * self.width, self.dtype, "out_modulation")(nn.silu(c))[:, None]
        shift, scale = jnp.split(both, 2, axis=-1)
        u = make_norm("layer", self.epsilon, self.dtype, "norm_out")(u) * (1 + scale) + shift
        u = zero_dense(math.prod(patch) * self.out_channels, self.dtype, "out")(u)
        u = u.reshape(len(x), *map(len, places), -1)
        return unpatch(u, patch).astype(jnp.promote_types(x.dtype, jnp.float32))

    def _condition(self, x: Array, t: Array, pooled: Any) -> Array:
        """Eq. 1."""
        t = jnp.broadcast_to(t, x.shape[:1]).astype(jnp.promote_types(x.dtype, jnp.float32))
        dense = functools.partial(Dense, self.width, kernel_init=small_init, dtype=self.dtype)
        c = nn.silu(dense(name="time_1")(timestep_embedding(t, TIME_WIDTH)))
        return dense(name="time_2")(c) + dense(name="pooled_2")(
            nn.silu(dense(name="pooled_1")(pooled))
        )

    @property
    def size_multiple(self) -> int:
        """What each side of the input is a multiple of: the patch's."""
        return self.patch

    def _places(self, space: tuple[int, ...]) -> list[np.ndarray]:
        """Of each axis its patches' places: the middle of the grid."""
        if any(n % self.patch or n // self.patch > self.grid for n in space):
            raise ValueError(
                f"the size {tuple(space)} is no multiple of patch={self.patch}, or more than "
                f"grid={self.grid} of them: choose another size"
            )
        counts, base = [n // self.patch for n in space], self.size // self.patch
        return [((self.grid - n) // 2 + np.arange(n)) * (base / self.grid) for n in counts]

    def _check(self, context: Any, pooled: Any, residuals: Any) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")
        if self.pool not in ("given", "mean") or context is None:
            raise ValueError(
                f"pool={self.pool!r} must be 'given' or 'mean', and a context be passed"
            )
        if (self.pool == "given") != (pooled is not None):
            raise ValueError(
                f"pool={self.pool!r} but a pooled caption is {'not ' * (pooled is None)}given: "
                "pass one exactly where it is 'given'"
            )
        if residuals is not None:
            raise ValueError("residuals are of a U-Net's ControlNet, which MMDiT has not")


class JointBlock(nn.Module):
    """Eqs. 2 to 4; c is eq. 1's."""

    width: int
    heads: int
    mult: int | float
    qk_norm: bool
    activation: str
    epsilon: float
    last: bool
    dual: bool
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        u: Float[Array, "batch tokens width"],
        words: Float[Array, "batch words width"],
        c: Float[Array, "batch width"],
        mask: Bool[Array, "batch words"] | None = None,
    ) -> tuple[Float[Array, "batch tokens width"], Float[Array, "batch words width"] | None]:
        def modulation(name: str, count: int) -> list[Array]:
            wide = zero_dense(count * self.width, self.dtype, name)(nn.silu(c))
            return jnp.split(wide[:, None], count, axis=-1)

        norm = functools.partial(make_norm, "layer", self.epsilon, self.dtype)
        of_u = modulation("modulation", 9 if self.dual else 6)
        of_words = modulation("context_modulation", 2 if self.last else 6)
        h, qk_norm = norm(name="norm1")(u), "rms" if self.qk_norm else None
        b1, s1, g1, b2, s2, g2 = of_u[:6]
        w = norm(name="norm1_context")(words) * (1 + of_words[1]) + of_words[0]
        attend = JointAttention(self.heads, qk_norm, self.last, self.dtype, name="attn")
        y, y_words = attend(h * (1 + s1) + b1, w, mask)
        u = u + g1 * y
        if self.dual:
            b3, s3, g3 = of_u[6:]
            head = self.width // self.heads
            alone = Attention(
                self.heads, head, True, qk_norm=qk_norm, dtype=self.dtype, name="attn2"
            )
            u = u + g3 * alone(h * (1 + s3) + b3)
        feed_forward = functools.partial(FeedForward, self.activation, self.mult, self.dtype)
        u = u + g2 * feed_forward(name="ff")(norm(name="norm2")(u) * (1 + s2) + b2)
        if self.last:
            return u, None
        _, _, g1, b2, s2, g2 = of_words
        words = words + g1 * y_words  # pyright: ignore[reportOperatorIssue]
        h = norm(name="norm2_context")(words) * (1 + s2) + b2
        return u, words + g2 * feed_forward(name="ff_context")(h)


class JointAttention(nn.Module):
    """Eq. 2: what comes out for patches, and for words unless `last`. qk_norm: None or "rms"."""

    heads: int
    qk_norm: str | None
    last: bool
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        u: Float[Array, "batch tokens width"],
        words: Float[Array, "batch words width"],
        mask: Bool[Array, "batch words"] | None = None,
    ) -> tuple[Float[Array, "batch tokens width"], Float[Array, "batch words width"] | None]:
        width, count = u.shape[2], u.shape[1]
        dense = functools.partial(Dense, width, dtype=self.dtype)

        def project(tokens: Array, kind: str, name: str, norm: str) -> Array:
            h = dense(kernel_init=qkv_init, name=name)(tokens)
            h = h.reshape(*tokens.shape[:2], self.heads, width // self.heads)
            if self.qk_norm is None or kind == "v":
                return h
            return nn.RMSNorm(1e-6, self.dtype, name=f"{norm}_{kind}")(h)

        q, k, v = (
            jnp.concatenate(
                [
                    project(u, kind, f"to_{kind}", "norm"),
                    project(words, kind, f"add_{kind}_proj", "norm_added"),
                ],
                axis=1,
            )
            for kind in "qkv"
        )
        if mask is not None:
            seen = jnp.ones((len(u), count), bool)
            mask = jnp.concatenate([seen, mask], axis=1)[:, None, None]
        y = dot_product_attention(q, k, v, mask).reshape(len(u), -1, width)
        out = dense(name="to_out")(y[:, :count])
        return out, None if self.last else dense(name="to_add_out")(y[:, count:])
