"""The U-Net of DDPM, ADM, LDM and Stable Diffusion, for one, two or three spatial axes.

With residual blocks R, attention A where a level has it, and skips s (DDPM, appendix B; U-Net,
https://arxiv.org/abs/1505.04597):

    (1)  h = conv_in(x);                          s = [h]
    (2)  down, each level:   h = A R(h, temb);  s += [h],  `blocks` times;  h = down(h);  s += [h]
    (3)  middle:             h = R A R(h)
    (4)  up, each level:     h = A R([h, pop s]),  `blocks` + 1 times;         h = up(h)
    (5)  out = conv_out(silu(norm_out(h)))
    (6)  temb = W2 silu(W1 emb(t))  [+ class embedding]  [+ pooled context]  [+ W4 silu(W3 vector)]

No resampling on the last level. What differs between the published networks is in the fields:

    DDPM (https://arxiv.org/abs/2006.11239), the defaults: freq_shift 1, [sin, cos], padding (0, 1),
        epsilon 1e-6, one head.
    ADM (https://arxiv.org/abs/2105.05233): freq_shift 0, [cos, sin], padding 1, epsilon 1e-5,
        head_dim 64, scale_shift, resblock_updown; conv_in no wider than a narrow first level (512).
    LDM (https://arxiv.org/abs/2112.10752), Stable Diffusion: as ADM without the last two (churches
        has them); transformer_depth 1, context; SD 2.x has linear_projection and head_dim 64.
    SDXL (https://arxiv.org/abs/2307.01952): as SD 2.x; transformer_depth (0, 2, 10), vector.

Initialisation is DDPM's throughout; CompVis has PyTorch's defaults, and the same layers at zero.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num

from diffusion.models.attention import AttentionBlock, SpatialTransformer, mean_token
from diffusion.models.group_norm import GroupNorm
from diffusion.models.layers import (
    Conv,
    Dense,
    Downsample,
    Padding,
    ResBlock,
    Upsample,
    timestep_embedding,
    zero_init,
)
from diffusion.models.second_time import with_guidance, with_second_time
from diffusion.models.unet_checks import check, check_residuals

# What the backward pass finds saved inside each block: nothing; the outputs of convolutions and of
# attention (norms and activations, cheap to compute, are recomputed); or those of dense layers.
REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "full": None,
    "conv": jax.checkpoint_policies.save_only_these_names("conv", "attention"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class UNet(nn.Module):
    """`unet.apply({"params": p}, x, t, context, context_mask, labels, keys)`: like x, out_channels.

    channels, multipliers: level i has channels * multipliers[i] channels (a whole number).
    blocks: residual blocks per level, one number or one a level.
    attention: per level, whether attention follows each block; `mid_attention` for the middle.
    heads or head_dim: number or width of the heads, one for all or one a level (the other is None).
    transformer_depth: 0 is plain self-attention (DDPM, ADM); n, a spatial transformer of n blocks
        with cross-attention to `context`; one for all or one a level. The middle has the last's.
    num_classes: labels 0 .. num_classes - 1 (a null class counts) are embedded and added to temb;
        for labels as context (LDM on ImageNet) put `embedders.ClassEmbedder` before the U-Net.
    pool_context: add a projection of the mean context token to temb. second_time: takes `s`.
    guidance_width: of the sinusoids of a guidance weight, which it then takes; 0: it does not.
    vector: takes one, what else is known of an example (SDXL's pooled caption and sizes).
    dtype: what to compute in; parameters stay float32. remat: None or a key of REMAT_POLICIES.
    """

    out_channels: int = 3
    channels: int = 128
    multipliers: tuple[int | float, ...] = (1, 2, 2, 2)
    blocks: int | tuple[int, ...] = 2
    attention: tuple[bool, ...] = (False, True, False, False)
    mid_attention: bool = True
    heads: int | tuple[int, ...] | None = 1
    head_dim: int | tuple[int, ...] | None = None
    transformer_depth: int | tuple[int, ...] = 0
    linear_projection: bool = False
    num_classes: int | None = None
    pool_context: bool = False
    groups: int = 32
    epsilon: float = 1e-6
    dropout: int | float = 0.0
    scale_shift: bool = False
    resblock_updown: bool = False
    downsample_padding: Padding = (0, 1)
    flip_sin_to_cos: bool = False
    freq_shift: int | float = 1
    second_time: bool = False
    guidance_width: int = 0
    vector: bool = False
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
        residuals: Sequence[Float[Array, "batch ..."]] | None = None,
        keys: Key[Array, "batch"] | None = None,
        s: Num[Array, ""] | Num[Array, "batch"] | None = None,
        guidance: Float[Array, "batch"] | None = None,
        vector: Float[Array, "batch numbers"] | None = None,
    ) -> Float[Array, "batch *space out_channels"]:
        """Float32 or wider. `context_mask` True: may be looked at. `keys` None: no dropout.

        `residuals` (of a ControlNet) are added: one to each skip of eq. 2, the last to the middle.
        ValueError where the size cannot be halved between all levels, or fields contradict.
        """
        self._check(x, context, labels, vector)
        temb = self._embed(x, t, context, context_mask, labels, s, guidance, vector)
        return self._run(x, temb, context, context_mask, residuals, keys)

    def _run(self, x: Array, temb: Array, context, context_mask, residuals, keys) -> Array:
        """Eqs. 1-5."""
        h, skips = self._down(x, temb, context, context_mask, keys)
        h = self._middle(h, temb, context, context_mask, keys)
        if residuals is not None:
            check_residuals(residuals, skips)
            skips = [skip + r for skip, r in zip(skips, residuals[:-1])]
            h = h + residuals[-1]
        h = self._up(h, skips, temb, context, context_mask, keys)
        h = GroupNorm(self.groups, self.epsilon, self.dtype, name="norm_out")(h, silu=True)
        h = Conv(self.out_channels, kernel_init=zero_init, dtype=self.dtype, name="conv_out")(h)
        return h.astype(jnp.promote_types(x.dtype, jnp.float32))

    def _down(
        self, x: Array, temb: Array, context, mask, keys, added: Array | None = None
    ) -> tuple[Array, list[Array]]:
        """Eqs. 1-2; `added` (of a ControlNet) to what leaves conv_in."""
        h = Conv(min(self.channels, self.width(0)), dtype=self.dtype, name="conv_in")(x)
        h = h if added is None else h + added
        skips = [h]
        for i in range(self.levels):
            for j in range(self.per_level(self.blocks)[i]):
                h = self._res(self.width(i), f"down_{i}_res_{j}")(h, temb, keys)
                if self.attention[i]:
                    h = self._attend(h, i, f"down_{i}_attn_{j}", context, mask)
                skips.append(h)
            if i < self.levels - 1:
                h = self._resample(h, "down", i, temb, keys)
                skips.append(h)
        return h, skips

    def _middle(self, h: Array, temb: Array, context, mask, keys) -> Array:
        """Eq. 3."""
        last = self.levels - 1
        h = self._res(self.width(last), "mid_res_0")(h, temb, keys)
        if self.mid_attention:
            h = self._attend(h, last, "mid_attn", context, mask)
        return self._res(self.width(last), "mid_res_1")(h, temb, keys)

    def _up(self, h: Array, skips: list[Array], temb: Array, context, mask, keys) -> Array:
        """Eq. 4; up_0 is the deepest level."""
        for i in range(self.levels):
            level = self.levels - 1 - i
            for j in range(self.per_level(self.blocks)[level] + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = self._res(self.width(level), f"up_{i}_res_{j}")(h, temb, keys)
                if self._up_attends(level, j):
                    h = self._attend(h, level, f"up_{i}_attn_{j}", context, mask)
            if level > 0:
                h = self._resample(h, "up", i, temb, keys)
        return h

    def _up_attends(self, level: int, block: int) -> bool:
        return self.attention[level]

    def _res(self, features: int, name: str, resample: str | None = None) -> Any:
        return self._rematerialised(ResBlock)(
            features,
            self.groups,
            self.epsilon,
            self.dropout,
            self.scale_shift,
            resample,
            dtype=self.dtype,
            name=name,
        )

    def _attend(self, h: Array, level: int, name: str, context, mask) -> Array:
        heads, head_dim = self.head_shape(level)
        depth = self.per_level(self.transformer_depth)[level]
        if not depth:
            block = self._rematerialised(AttentionBlock)
            return block(heads, head_dim, self.groups, self.epsilon, self.dtype, name=name)(h)
        transformer = self._rematerialised(SpatialTransformer)(
            heads,
            head_dim,
            depth,
            linear_projection=self.linear_projection,
            groups=self.groups,
            dtype=self.dtype,
            name=name,
        )
        return transformer(h, context, mask)

    def _resample(self, h: Array, way: str, i: int, temb: Array, keys) -> Array:
        name, width = f"{way}_{i}_sample", h.shape[-1]
        if self.resblock_updown:
            return self._res(width, name, resample=way)(h, temb, keys)
        if way == "up":
            return Upsample(width, dtype=self.dtype, name=name)(h)
        return Downsample(width, self.downsample_padding, dtype=self.dtype, name=name)(h)

    def _embed(
        self, x: Array, t: Array, context, mask, labels, s=None, guidance=None, vector=None
    ) -> Array:
        """Eq. 6."""
        t = jnp.broadcast_to(t, x.shape[:1]).astype(jnp.promote_types(x.dtype, jnp.float32))
        sinusoids = self.channels, self.flip_sin_to_cos, self.freq_shift
        dense = functools.partial(Dense, 4 * self.channels, dtype=self.dtype)
        temb = timestep_embedding(t, *sinusoids)
        temb = with_guidance(self.guidance_width, temb, guidance, self.dtype)
        temb = dense(name="time_2")(nn.silu(dense(name="time_1")(temb)))
        temb = with_second_time(self.second_time, temb, t, s, *sinusoids, self.dtype)
        if self.num_classes is not None:
            embed = nn.Embed(
                self.num_classes, 4 * self.channels, self.dtype, name="class_embedding"
            )
            temb = temb + embed(labels)
        if self.pool_context:
            temb = temb + dense(name="pool_proj")(mean_token(context, mask))
        if vector is not None:
            temb = temb + dense(name="vector_2")(nn.silu(dense(name="vector_1")(vector)))
        return temb

    def _rematerialised(self, block: Any) -> Any:
        if self.remat is None:
            return block
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat={self.remat!r} must be one of {[None, *REMAT_POLICIES]}")
        return nn.remat(block, policy=REMAT_POLICIES[self.remat])

    @property
    def levels(self) -> int:
        return len(self.multipliers)

    def width(self, level: int) -> int:
        """Channels of a level."""
        return round(self.channels * self.multipliers[level])

    @property
    def size_multiple(self) -> int:
        """What each side of the input is a multiple of: all levels but the last halve it."""
        return 2 ** (len(self.multipliers) - 1)

    def per_level(self, value: Any) -> tuple[Any, ...]:
        """One value for all levels, or one a level, as a tuple of one a level."""
        return tuple(value) if isinstance(value, tuple | list) else (value,) * self.levels

    def head_shape(self, level: int) -> tuple[int, int]:
        """(number, width) of a level's heads. ValueError where they do not divide its channels."""
        width = self.width(level)
        heads, head_dim = (self.per_level(value)[level] for value in (self.heads, self.head_dim))
        if (heads is None) == (head_dim is None):
            raise ValueError(
                f"heads={self.heads} and head_dim={self.head_dim}: give exactly one of the two"
            )
        divisor = heads or head_dim
        if width % divisor:
            raise ValueError(
                f"{'heads' if heads else 'head_dim'}={divisor} does not divide level {level}'s "
                f"{width} channels: choose one that does"
            )
        return (heads, width // heads) if heads else (width // head_dim, head_dim)

    _check = check
