"""Transformers over patches of one, two or three axes: DiT, SiT, LightningDiT, PixArt.

With patches of p places an axis, positions e, a time t, a label or a caption (DiT,
https://arxiv.org/abs/2212.09748, section 3.2):

    (1)  u = W patches(x) + e
    (2)  c = W2 silu(W1 emb(t))  [+ class embedding]
    (3)  [b1, s1, g1, b2, s2, g2] = W silu(c),  a W for each block                     "zero"
    (4)      "         "          = W silu(c) + table_i,  one W for all blocks i       "single"
    (5)  u = u + g1 attention((1 + s1) norm(u) + b1)
         u = u + cross-attention(u, caption)           with `cross` (PixArt, arXiv:2310.00426)
         u = u + g2 mlp((1 + s2) norm(u) + b2)
    (6)  out = unpatch(W ((1 + s) norm(u) + b)),  [b, s] = W silu(c)

Gates g and the last W start at zero: each block starts as the identity, the network as zero.
Patches and positions are `models/positions.py`'s.

LightningDiT (https://arxiv.org/abs/2501.01423) is `positions="both"`, `norm="rms"`,
`activation="swiglu"`, `mult=8 / 3`; JiT (https://arxiv.org/abs/2511.13720) adds `qk_norm`, a
`bottleneck` and `label_tokens`. Of a video all patches look at each other, or those of a frame and
of a place in turn, as in Latte (https://arxiv.org/abs/2401.03048, variant 1): `factorised`.
Initialisation is DiT's (`facebookresearch/DiT: models.py`): q, k and v as one matrix there, hence
their smaller scale here.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Num

from diffusion.models.attention import ACTIVATIONS, mean_token
from diffusion.models.layers import Dense, default_init, timestep_embedding
from diffusion.models.positions import patches, per_axis, rotary_angles, sincos_positions, unpatch
from diffusion.models.second_time import with_second_time
from diffusion.models.transformer_blocks import Block, folded, make_norm, table, zero_dense
from diffusion.models.unet import REMAT_POLICIES

TIME_WIDTH = 256  # of eq. 2's sinusoids
small_init = nn.initializers.normal(0.02)


class Transformer(nn.Module):
    """`apply({"params": p}, x, t, context, context_mask, labels)`: like x, out_channels.

    patch: places an axis of a patch, one number or one an axis. size: places an axis that the
    network is made for: another is refused, or with `interpolate` its positions are stretched to
    those of `size`; None: any size, positions count patches. position_scale: what places
    are divided by (PixArt).
    modulation: "zero" (eq. 3) or "single" (eq. 4). cross: looks at `context`, of `context_width`
    after a projection (two dense layers). pool_context: adds a projection of the mean context token
    to c, as the U-Net does. num_classes: labels, the null class counted.
    positions: "sincos"; "rotary", which knows distances alone and no place; or "both". norm:
    "layer" (no parameters) or "rms" (a scale). qk_norm:
    norms of each head's q and k. registers: learned tokens beside the patches (arXiv:2309.16588).
    bottleneck: patches pass through so few channels first; None: not. label_tokens: so many tokens
    of the class embedding, each with learned values of its own added, join the patches before block
    `label_tokens_from` (JiT's in-context conditioning). factorised: each of `depth` blocks looks
    within a frame and at the caption, and another after it along the first axis, time, whose
    positions are added before the first of those (Latte).
    activation: of the feed-forward, `models/attention.py`'s. epsilon: of the norms, of that before
    the feed-forward `mlp_epsilon` where it is given (Diffusers' DiT has 1e-5), of the last one
    `out_epsilon` (Diffusers' PixArt and Latte have 1e-6 whatever `norm_eps` says).
    freq_shift: of eq. 2's sinusoids; 1 in Diffusers' DiT. second_time: takes `s`.
    condition_std: what eq. 2's matrices start with, DiT's at a width of 1152; None: scaled by fan,
    and labels of unit size. At a width of 128, 0.02 makes a faint c, and eq. 3 grows as slowly.
    dtype: what to compute in; parameters stay float32. remat: None or a key of REMAT_POLICIES.
    """

    out_channels: int = 4
    patch: int | tuple[int, ...] = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    mult: int | float = 4
    size: int | tuple[int, ...] | None = None
    interpolate: bool = False
    position_scale: int | float = 1
    num_classes: int | None = None
    modulation: str = "zero"
    cross: bool = False
    pool_context: bool = False
    positions: str = "sincos"
    norm: str = "layer"
    qk_norm: bool = False
    registers: int = 0
    bottleneck: int | None = None
    label_tokens: int = 0
    label_tokens_from: int = 0
    factorised: bool = False
    activation: str = "gelu_tanh"
    epsilon: float = 1e-6
    mlp_epsilon: float | None = None
    out_epsilon: float | None = None
    freq_shift: int | float = 0
    condition_std: float | None = 0.02
    second_time: bool = False
    dtype: Any = None
    remat: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *space channels"],
        t: Num[Array, ""] | Num[Array, "batch"],
        context: Float[Array, "batch tokens width"] | None = None,
        context_mask: Bool[Array, "batch tokens"] | None = None,
        labels: Int[Array, "batch"] | None = None,
        residuals: Any = None,
        keys: Key[Array, "batch"] | None = None,
        s: Num[Array, ""] | Num[Array, "batch"] | None = None,
    ) -> Float[Array, "batch *space out_channels"]:
        """Float32 or wider. `context_mask` True: may be looked at. `keys`: there is no dropout.

        ValueError where the patch does not divide the size, for another size than the network's,
        and where fields and conditions contradict.
        """
        self._check(x.ndim - 2, context, labels, residuals)
        patch = per_axis("patch", self.patch, x.ndim - 2)
        grid = self._grid(x.shape[1:-1], patch)
        places = self._places(grid, patch)
        space, time = (places[1:], places[:1]) if self.factorised else (places, [])
        u = patches(x, patch)
        if self.bottleneck:
            u = Dense(self.bottleneck, use_bias=False, dtype=self.dtype, name="bottleneck")(u)
        u = Dense(self.width, dtype=self.dtype, name="patches")(u).reshape(len(x), -1, self.width)
        frames = grid[0] if self.factorised else 1
        if self.positions != "rotary":
            added = np.tile(sincos_positions(space, self.width), (frames, 1))
            u = u + jnp.asarray(added, u.dtype)[None]
        angles, along = (self._angles(axes) for axes in (space, time))
        u = self._joined(u, self.registers, "registers")
        label = self._label(labels)
        c, shared = self._condition(x, t, label, context, context_mask, s)
        context = self._project(context) if self.cross else None
        block = nn.remat(Block, policy=REMAT_POLICIES[self.remat]) if self.remat else Block
        for i in range(self.depth):
            if self.label_tokens and i == self.label_tokens_from:
                u = self._joined(u, self.label_tokens, "label_tokens", label)
                if angles is not None:
                    angles = jnp.pad(angles, ((self.label_tokens, 0), (0, 0)))
            told = c if shared is None else shared, context, context_mask
            u = folded(self._block(block, self.cross, f"blocks_{i}"), u, frames, 1, told, angles)
            if self.factorised:
                if i == 0 and frames > 1 and self.positions != "rotary":
                    added = sincos_positions(time, self.width).repeat(u.shape[1] // frames, axis=0)
                    u = u + jnp.asarray(added, u.dtype)[None]
                make = self._block(block, False, f"time_blocks_{i}")
                u = folded(make, u, frames, 2, (told[0], None, None), along)
        u = self._out(u[:, self.registers + self.label_tokens :], c, math.prod(patch))
        return unpatch(u.reshape(len(x), *grid, -1), patch).astype(
            jnp.promote_types(x.dtype, jnp.float32)
        )

    def _block(self, block: Any, cross: bool, name: str) -> Any:
        shape = self.width, self.heads, self.mult, self.modulation, cross, self.norm, self.qk_norm
        rest = self.activation, self.epsilon, self.mlp_epsilon
        return block(*shape, *rest, dtype=self.dtype, name=name)

    def _angles(self, places: list[np.ndarray]) -> Array | None:
        if self.positions == "sincos" or not places:
            return None
        return rotary_angles(places, self.width // self.heads, self.registers)

    def _condition(
        self, x: Array, t: Array, label: Array | None, context: Any, mask: Array | None, s: Any
    ) -> tuple[Array, Array | None]:
        """Eq. 2; and W silu(c) of eq. 4 where one W serves all blocks."""
        t = jnp.broadcast_to(t, x.shape[:1]).astype(jnp.promote_types(x.dtype, jnp.float32))
        std = self.condition_std
        init = default_init if std is None else nn.initializers.normal(std)
        dense = functools.partial(Dense, kernel_init=init, dtype=self.dtype)
        sinusoids = TIME_WIDTH, True, self.freq_shift
        c = nn.silu(dense(self.width, name="time_1")(timestep_embedding(t, *sinusoids)))
        c = dense(self.width, name="time_2")(c)
        c = with_second_time(self.second_time, c, t, s, *sinusoids, self.dtype)
        c = c if label is None else c + label
        if self.pool_context:
            c = c + dense(self.width, name="pool_proj")(mean_token(context, mask))
        if self.modulation == "zero":
            return c, None
        return c, dense(6 * self.width, name="modulation")(nn.silu(c))

    def _label(self, labels: Any) -> Array | None:
        if self.num_classes is None:
            return None
        sizes = self.num_classes, self.width, self.dtype
        init = nn.initializers.normal(1.0 if self.condition_std is None else self.condition_std)
        return nn.Embed(*sizes, embedding_init=init, name="class_embedding")(labels)

    def _out(self, u: Array, c: Array, places: int) -> Array:
        """Eq. 6, but its unpatch."""
        if self.modulation == "zero":
            both = zero_dense(2 * self.width, self.dtype, "out_modulation")(nn.silu(c))
        else:
            both = jnp.tile(c, (1, 2)) + table(self, 2, self.width)[None].astype(c.dtype)
        shift, scale = jnp.split(both[:, None], 2, axis=-1)
        norm = make_norm(self.norm, self.out_epsilon or self.epsilon, self.dtype, "norm_out")
        u = norm(u) * (1 + scale) + shift
        return zero_dense(places * self.out_channels, self.dtype, "out")(u)

    def _project(self, context: Any) -> Array:
        """Scaled by fan, which is PixArt's 0.02 at its widths (4096, 1152): at a narrow network's,
        0.02 twice leaves words so faint that cross-attention, which starts at zero, never wakes.
        """
        dense = functools.partial(Dense, self.width, dtype=self.dtype)
        hidden = ACTIVATIONS["gelu_tanh"](dense(name="context_1")(context))
        return dense(name="context_2")(hidden)

    def _joined(self, u: Array, count: int, name: str, label: Array | None = None) -> Array:
        """`count` learned tokens before u's, the label's embedding added where there is one."""
        if not count:
            return u
        tokens = self.param(name, small_init, (count, self.width)).astype(u.dtype)[None]
        tokens = tokens if label is None else tokens + label[:, None]
        tokens = jnp.broadcast_to(tokens, (len(u), *tokens.shape[1:]))
        return jnp.concatenate([tokens, u], axis=1)

    # -- sizes ---------------------------------------------------------------------------------

    @property
    def size_multiple(self) -> int:
        """What each side of the input is a multiple of: the patch's."""
        return self.patch if isinstance(self.patch, int) else math.lcm(*self.patch)

    def _grid(self, space: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
        """Patches an axis."""
        if any(n % p for n, p in zip(space, patch)):
            raise ValueError(
                f"patch={self.patch} does not divide the size {tuple(space)}: pad or crop to a "
                "multiple of it, or choose another patch"
            )
        if self.size is not None and not self.interpolate:
            if per_axis("size", self.size, len(space)) != tuple(space):
                raise ValueError(
                    f"size={self.size} is what the network's positions are for, but the input has "
                    f"{tuple(space)}: give it that size, or set interpolate=True"
                )
        return tuple(n // p for n, p in zip(space, patch))

    def _places(self, grid: tuple[int, ...], patch: tuple[int, ...]) -> list[np.ndarray]:
        """Of each axis its patches' places, in patches of the size that the network is made for."""
        if self.size is None:
            return [np.arange(n) / self.position_scale for n in grid]
        sizes = per_axis("size", self.size, len(grid))
        scales = [1 if self.factorised else self.position_scale]
        scales += [self.position_scale] * (len(grid) - 1)
        return [np.arange(n) * (s / p / n / k) for n, s, p, k in zip(grid, sizes, patch, scales)]

    def _check(self, rank: int, context: Any, labels: Any, residuals: Any) -> None:
        for key, allowed in (
            ("modulation", ("zero", "single")),
            ("positions", ("sincos", "rotary", "both")),
            ("norm", ("layer", "rms")),
            ("remat", (None, *REMAT_POLICIES)),
        ):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}={getattr(self, key)!r} must be one of {allowed}")
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")
        if (self.num_classes is None) != (labels is None):
            raise ValueError(
                f"num_classes={self.num_classes} but labels are {'not ' * (labels is None)}given: "
                "pass labels exactly where num_classes is set"
            )
        if self.label_tokens and not (
            self.num_classes and 0 <= self.label_tokens_from < self.depth
        ):
            raise ValueError(
                f"label_tokens={self.label_tokens} from block {self.label_tokens_from} needs "
                f"num_classes, and a block below depth={self.depth}: set label_tokens to 0, or both"
            )
        if self.factorised and (rank < 2 or self.registers or self.label_tokens):
            raise ValueError(
                f"factorised=True with registers={self.registers}, label_tokens="
                f"{self.label_tokens} and {rank} axes: it needs patches alone, on two axes or more"
            )
        if (self.cross or self.pool_context) != (context is not None):
            raise ValueError(
                f"cross={self.cross}, pool_context={self.pool_context} but a context is "
                f"{'not ' * (context is None)}given: pass one exactly where one of them is True"
            )
        if residuals is not None:
            raise ValueError("residuals are of a U-Net's ControlNet, which a transformer has not")
