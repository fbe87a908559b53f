"""The first stage of latent diffusion: encoder, decoder, and a KL or a vector-quantised bottleneck.

LDM (https://arxiv.org/abs/2112.10752, section 3.1, appendix G) compresses an image x by a factor f:

    (1)  z = E(x),   x_hat = D(z),   size(z) = size(x) / f,   f = patch * 2^(levels - 1)

with z a sample of a Gaussian whose [mean, logvar] the encoder gives (KL), or the encoder's output,
to be replaced by the nearest of a set of codes (VQ): `bottleneck.py`. Of the VQ model, what is
diffused is z before it is quantised; decoding quantises.

Blocks (CompVis, `ldm/modules/diffusionmodules/model.py`): residual blocks without a time embedding,
single-head attention where a level has it and in the middle, stride-2 convolutions padded (0, 1),
nearest upsampling and a convolution, group norm with epsilon 1e-6.

`patch` p > 1 is not LDM's: the encoder folds p x p pixels into channels before its first
convolution and the decoder unfolds the channels of its last, so that no block runs at full
resolution. p = 1 is LDM exactly.
"""

import functools
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from diffusion.models.attention import AttentionBlock
from diffusion.models.bottleneck import LOGVAR_RANGE, Code, Posterior, Quantized, quantize
from diffusion.models.group_norm import GroupNorm
from diffusion.models.layers import Conv, Downsample, ResBlock, Upsample
from diffusion.models.positions import patches, unpatch

EPSILON = 1e-6


class _Stage(nn.Module):
    """What encoder and decoder share: a level's blocks and the middle. Fields: see `FirstStage`."""

    out_channels: int
    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[bool, ...]
    mid_attention: bool
    patch: int
    groups: int
    dtype: Any
    remat: bool

    def _block(self, h: Array, level: int, index: int, name: str) -> Array:
        h = self._res(self.channels * self.multipliers[level], f"{name}_res_{index}")(h)
        return self._attend(f"{name}_attn_{index}", h) if self.attention[level] else h

    def _middle(self, h: Array) -> Array:
        h = self._res(h.shape[-1], "mid_res_0")(h)
        h = self._attend("mid_attn", h) if self.mid_attention else h
        return self._res(h.shape[-1], "mid_res_1")(h)

    def _finish(self, h: Array, features: int) -> Array:
        h = GroupNorm(self.groups, EPSILON, self.dtype, name="norm_out")(h, silu=True)
        return Conv(features, dtype=self.dtype, name="conv_out")(h)

    def _res(self, features: int, name: str) -> nn.Module:
        block: Any = nn.remat(ResBlock) if self.remat else ResBlock
        return block(features, self.groups, EPSILON, zero_conv=False, dtype=self.dtype, name=name)

    def _attend(self, name: str, h: Array) -> Array:
        block: Any = nn.remat(AttentionBlock) if self.remat else AttentionBlock
        return block(1, h.shape[-1], self.groups, EPSILON, self.dtype, name=name)(h)


class Encoder(_Stage):
    """(batch, *space, channels) to (batch, *space / f, out_channels)."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *space channels"]
    ) -> Float[Array, "batch *out_space features"]:
        x = patches(x, (self.patch,) * (x.ndim - 2)) if self.patch > 1 else x
        h = Conv(self.channels, dtype=self.dtype, name="conv_in")(x)
        for level, multiplier in enumerate(self.multipliers):
            for index in range(self.blocks):
                h = self._block(h, level, index, f"down_{level}")
            if level < len(self.multipliers) - 1:
                width, name = self.channels * multiplier, f"down_{level}_sample"
                h = Downsample(width, padding=(0, 1), dtype=self.dtype, name=name)(h)
        return self._finish(self._middle(h), self.out_channels)


class Decoder(_Stage):
    """(batch, *space / f, features) to (batch, *space, out_channels); up_0 is the deepest level."""

    @nn.compact
    def __call__(
        self, z: Float[Array, "batch *space features"]
    ) -> Float[Array, "batch *out_space channels"]:
        width = self.channels * self.multipliers[-1]
        h = self._middle(Conv(width, dtype=self.dtype, name="conv_in")(z))
        for i, level in enumerate(reversed(range(len(self.multipliers)))):
            for index in range(self.blocks + 1):
                h = self._block(h, level, index, f"up_{i}")
            if level > 0:
                h = Upsample(h.shape[-1], dtype=self.dtype, name=f"up_{i}_sample")(h)
        patch = (self.patch,) * (z.ndim - 2)
        h = self._finish(h, self.out_channels * math.prod(patch))
        return unpatch(h, patch) if self.patch > 1 else h


class FirstStage(nn.Module):
    """Fields and methods that the KL and the VQ autoencoder share.

    image_channels: of x.
    channels, multipliers, blocks: level i has `blocks` residual blocks (the decoder one more) of
        channels * multipliers[i] channels; every level but the last halves the size.
    attention: per level, whether attention follows each block; () is nowhere. LDM names the sizes
        at a 256-pixel image instead: 32 is level 3, 16 level 4, 8 level 5.
    mid_attention: attention in the middle (LDM's attn_type "none" is False).
    z_channels, embed_channels: of encoder and decoder, and of the latents (None: equal).
    use_quant_conv: the 1x1 convolutions between the two (some later models have none).
    patch: pixels a side that one place of the first level covers; 1 is LDM.
    dtype: what to compute in; parameters, posterior and x_hat stay float32 or wider.
    remat: recompute each block in the backward pass.
    """

    image_channels: int = 3
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4)
    blocks: int = 2
    attention: tuple[bool, ...] = ()
    mid_attention: bool = True
    z_channels: int = 3
    embed_channels: int | None = None
    use_quant_conv: bool = True
    patch: int = 1
    groups: int = 32
    dtype: Any = None
    remat: bool = False

    # Where the adaptive weight of the adversarial loss takes its gradients (LDM: the last layer).
    last_layer: ClassVar[tuple[str, ...]] = ("decoder", "conv_out", "kernel")
    moments: ClassVar[int] = 1  # outputs of the encoder per latent channel

    @property
    def downsampling(self) -> int:
        """f of eq. 1."""
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.z_channels if self.embed_channels is None else self.embed_channels

    def setup(self) -> None:
        self._check_fields()
        stage = {
            "channels": self.channels,
            "multipliers": self.multipliers,
            "blocks": self.blocks,
            "attention": self.attention or (False,) * len(self.multipliers),
            "mid_attention": self.mid_attention,
            "patch": self.patch,
            "groups": self.groups,
            "dtype": self.dtype,
            "remat": self.remat,
        }
        self.encoder = Encoder(self.moments * self.z_channels, **stage)
        self.decoder = Decoder(self.image_channels, **stage)
        if self.use_quant_conv:
            point = functools.partial(Conv, kernel_size=1, dtype=self.dtype)
            self.quant_conv = point(self.moments * self.latent_channels)
            self.post_quant_conv = point(self.z_channels)

    def moments_of(
        self, x: Float[Array, "batch *space channels"]
    ) -> Float[Array, "batch *out_space moments"]:
        """What `encode` makes its result of: [mean, logvar before the clamp], or the code."""
        self._check_image(x)
        h = self.encoder(x)
        h = self.quant_conv(h) if self.use_quant_conv else h
        return h.astype(jnp.promote_types(x.dtype, jnp.float32))

    def reconstruct(self, x: Array, keys: Array | None = None) -> tuple[Array, Any]:
        """x_hat, and what the bottleneck did."""
        raise NotImplementedError

    def __call__(
        self, x: Float[Array, "batch *space channels"], keys: Key[Array, "batch"] | None = None
    ) -> Float[Array, "batch *space channels"]:
        """x_hat alone."""
        return self.reconstruct(x, keys)[0]

    def _decode(self, z: Array) -> Array:
        if z.shape[-1] != self.latent_channels:
            raise ValueError(
                f"latents have {z.shape[-1]} channels but the first stage has latent_channels="
                f"{self.latent_channels}: use the first stage that encoded them"
            )
        h = self.post_quant_conv(z) if self.use_quant_conv else z
        return self.decoder(h).astype(jnp.promote_types(z.dtype, jnp.float32))

    def _check_fields(self) -> None:
        if len(self.attention) not in (0, len(self.multipliers)):
            raise ValueError(
                f"attention={self.attention} has {len(self.attention)} entries but multipliers="
                f"{self.multipliers} has {len(self.multipliers)}: give one entry a level, or ()"
            )
        if not self.use_quant_conv and self.latent_channels != self.z_channels:
            raise ValueError(
                f"embed_channels={self.embed_channels} differs from z_channels={self.z_channels}, "
                "which needs use_quant_conv=True"
            )

    def _check_image(self, x: Array) -> None:
        f, space = self.downsampling, tuple(x.shape[1:-1])
        if any(size < f or size % f for size in space):
            raise ValueError(
                f"image size {space} must be a multiple of the first stage's downsampling factor "
                f"f={f} on every axis: resize, crop or pad the image, or use a smaller f"
            )
        if x.shape[-1] != self.image_channels:
            raise ValueError(
                f"image has {x.shape[-1]} channels but the first stage has image_channels="
                f"{self.image_channels}: convert the image, or set image_channels"
            )


class AutoencoderKL(FirstStage):
    """LDM's KL-regularised autoencoder.

    `apply({"params": p}, x, method="encode") -> Posterior`;
    `apply({"params": p}, z, method="decode") -> x_hat`, of latents that are not scaled;
    `apply({"params": p}, x, keys, method="reconstruct") -> (x_hat, Posterior)`.
    """

    moments: ClassVar[int] = 2

    def encode(self, x: Float[Array, "batch *space channels"]) -> Posterior:
        """ValueError where a size is no multiple of `downsampling`, or channels differ."""
        mean, logvar = jnp.split(self.moments_of(x), 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, *LOGVAR_RANGE))

    def decode(
        self, z: Float[Array, "batch *space latent_channels"]
    ) -> Float[Array, "batch *out_space channels"]:
        """x_hat; not clipped. ValueError where the channels are not `latent_channels`."""
        return self._decode(z)

    def reconstruct(
        self, x: Float[Array, "batch *space channels"], keys: Key[Array, "batch"] | None = None
    ) -> tuple[Float[Array, "batch *space channels"], Posterior]:
        """x_hat from a sample of the posterior (`keys` None: from its mean), and the posterior."""
        posterior = self.encode(x)
        return self.decode(posterior.mean if keys is None else posterior.sample(keys)), posterior


class VQModel(FirstStage):
    """LDM's vector-quantised autoencoder, with the interface of `AutoencoderKL`.

    num_codes: entries of the codebook. commitment, codebook_weight: `bottleneck.py`, eq. 4.
    """

    num_codes: int = 8192
    commitment: float = 1.0
    codebook_weight: float = 0.25

    def setup(self) -> None:
        super().setup()
        shape, bound = (self.num_codes, self.latent_channels), 1.0 / self.num_codes
        init = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
        self.codebook = nn.Embed(*shape, embedding_init=init)

    def encode(self, x: Float[Array, "batch *space channels"]) -> Code:
        """`.mean` is the code before it is quantised. Errors as `AutoencoderKL.encode`."""
        return Code(self.moments_of(x))

    def quantize(self, z: Float[Array, "batch *space latent_channels"]) -> Quantized:
        """`bottleneck.quantize` with this model's codebook and weights, in float32 or wider."""
        return quantize(z, self.codebook.embedding, self.commitment, self.codebook_weight)

    def decode(
        self, z: Float[Array, "batch *space latent_channels"]
    ) -> Float[Array, "batch *out_space channels"]:
        """x_hat from codes that are first quantised."""
        return self._decode(self.quantize(z).codes)

    def decode_codes(
        self, codes: Float[Array, "batch *space latent_channels"]
    ) -> Float[Array, "batch *out_space channels"]:
        """x_hat from entries of the codebook, as `quantize` gives them."""
        return self._decode(codes)

    def reconstruct(
        self, x: Float[Array, "batch *space channels"], keys: Key[Array, "batch"] | None = None
    ) -> tuple[Float[Array, "batch *space channels"], Quantized]:
        """x_hat and what the bottleneck did; `keys` is for the sake of the shared interface."""
        del keys
        quantized = self.quantize(self.encode(x).mean)
        return self._decode(quantized.codes), quantized
