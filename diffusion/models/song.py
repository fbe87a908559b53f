"""DDPM++ and NCSN++ in EDM's form, a U-Net with blocks of their own.

Song et al. (https://arxiv.org/abs/2011.13456, appendix H) as Karras et al. train them
(https://arxiv.org/abs/2206.00364, table 7; NVlabs/edm: training/networks.py, SongUNet). What
differs from `unet.py`, with r = sqrt(1/2):

    (1)  h = r (shortcut(resample(x)) + conv2(..)),     h = r (h + attention(h))
    (2)  temb = W2 silu(W1 (emb(t) + W sqrt(classes) onehot(label) + W' augment))
    (3)  up, each level: attention after the last block alone; the middle always attends
    (4)  blocks resample, and then always with a convolution in the shortcut

NCSN++ (`ncsnpp`) has besides a filter [1, 3, 3, 1] where it resamples, 2 x channels random Fourier
features of 2 pi f t, f from N(0, 16^2) and never trained, as emb(t), and the picture once more on
each level of the way down:

    (5)  h <- r (h + filter(conv(a))),   a the picture at first, then the h before it

EDM's classes with fewer than 32 groups in some norm are not expressed: `groups` is one for all.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num

from diffusion.models.attention import AttentionBlock
from diffusion.models.layers import Conv, Dense, ResBlock, fir_downsample, timestep_embedding
from diffusion.models.second_time import with_second_time
from diffusion.models.unet import UNet

SCALE = math.sqrt(0.5)
# EDM's sqrt(0.2) of one kernel for q, k and v, whose fan is (width, 3 width).
qkv_init = nn.initializers.variance_scaling(0.1, "fan_avg", "uniform")


class SongUNet(UNet):
    """`net.apply({"params": p}, x, t, labels=.., augment=.., keys=..)`: like x, out_channels.

    The fields of `UNet` but those of context and of resampling; NCSN++ takes no second time; and
    augment_dim: numbers that say how a picture was augmented; None says: not at all. 0: none.
    """

    augment_dim: int = 0
    ncsnpp: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *space channels"],
        t: Num[Array, ""] | Num[Array, "batch"],
        context: None = None,
        context_mask: Bool[Array, "batch tokens"] | None = None,
        labels: Int[Array, "batch"] | None = None,
        residuals: None = None,
        keys: Key[Array, "batch"] | None = None,
        s: Num[Array, ""] | Num[Array, "batch"] | None = None,
        augment: Float[Array, "batch numbers"] | None = None,
    ) -> Float[Array, "batch *space out_channels"]:
        """As `UNet`'s; ValueError also for what is read by no network of this kind."""
        self._check(x, context, labels)
        self._check_kind(context=context, residuals=residuals)
        return self._run(x, self._embed_song(x, t, labels, augment, s), None, None, None, keys)

    def _check_kind(self, **given) -> None:
        unread = [name for name, value in given.items() if value is not None]
        names = ("transformer_depth", "pool_context", "scale_shift", "resblock_updown")
        names += ("guidance_width", "vector")
        unread += [name for name in names if getattr(self, name)]
        unread += ["second_time"] * (self.ncsnpp and self.second_time)
        if unread:
            raise ValueError(f"{unread[0]} is nothing that DDPM++ and NCSN++ have: use kind='unet'")

    def _embed_song(self, x: Array, t: Array, labels, augment, s) -> Array:
        """Eq. 2."""
        t = jnp.broadcast_to(t, x.shape[:1]).astype(jnp.promote_types(x.dtype, jnp.float32))
        width = 2 * self.channels if self.ncsnpp else self.channels
        sinusoids = self.flip_sin_to_cos, self.freq_shift
        if self.ncsnpp:
            frequency = self.param("fourier", nn.initializers.normal(16.0), (width // 2,))
            angle = 2 * math.pi * t[:, None] * jax.lax.stop_gradient(frequency)[None]
            temb = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
        else:
            temb = timestep_embedding(t, width, *sinusoids)
        if self.num_classes is not None and labels is not None:
            told = math.sqrt(self.num_classes) * jax.nn.one_hot(labels, self.num_classes)
            temb = temb + Dense(width, dtype=self.dtype, name="label")(told)
        if self.augment_dim:
            told = jnp.zeros((len(x), self.augment_dim), t.dtype) if augment is None else augment
            temb = temb + Dense(width, False, dtype=self.dtype, name="augment")(told)
        dense = functools.partial(Dense, 4 * self.channels, dtype=self.dtype)
        temb = dense(name="time_2")(nn.silu(dense(name="time_1")(temb)))
        return with_second_time(self.second_time, temb, t, s, width, *sinusoids, self.dtype)

    def _down(self, x: Array, temb: Array, context, mask, keys, added=None):
        h = Conv(self.channels, dtype=self.dtype, name="conv_in")(x)
        skips, picture = [h], x
        for i in range(self.levels):
            for j in range(self.per_level(self.blocks)[i]):
                h = self._res(self.width(i), f"down_{i}_res_{j}")(h, temb, keys)
                if self.attention[i]:
                    h = self._attend(h, i, f"down_{i}_attn_{j}", None, None)
                skips.append(h)
            if i < self.levels - 1:
                h = self._resample(h, "down", i, temb, keys)
                if self.ncsnpp:
                    conv = Conv(h.shape[-1], padding=2, dtype=self.dtype, name=f"picture_{i}")
                    h = picture = SCALE * (h + fir_downsample(conv(picture), padding=0))
                skips.append(h)
        return h, skips

    def _up_attends(self, level: int, block: int) -> bool:
        return self.attention[level] and block == self.per_level(self.blocks)[level]

    def _res(self, features: int, name: str, resample: str | None = None):
        how = f"{resample}_fir" if resample and self.ncsnpp else resample
        settings = self.groups, self.epsilon, self.dropout
        block = self._rematerialised(ResBlock)(
            features, *settings, resample=how, resample_proj=True, dtype=self.dtype, name=name
        )
        return lambda h, temb, keys: SCALE * block(h, temb, keys)

    def _attend(self, h: Array, level: int, name: str, context, mask) -> Array:
        settings = *self.head_shape(level), self.groups, self.epsilon, self.dtype, qkv_init
        return SCALE * self._rematerialised(AttentionBlock)(*settings, name=name)(h)

    def _resample(self, h: Array, way: str, i: int, temb: Array, keys) -> Array:
        return self._res(h.shape[-1], f"{way}_{i}_sample", resample=way)(h, temb, keys)
