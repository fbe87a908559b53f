"""Networks that make a context, or channels beside x_t, of labels and of maps of labels (LDM)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diffusion.models.layers import average_pool, default_init


class ClassEmbedder(nn.Module):
    """Labels as a context of one token (LDM on ImageNet); `num_classes` counts a null class.

    A network beside the U-Net, as a text encoder is; CompVis calls it `cond_stage_model`, and
    starts it from N(0, 1), as PyTorch does its nn.Embedding (ldm/modules/encoders/modules.py).
    """

    num_classes: int
    width: int
    dtype: Any = None

    @nn.compact
    def __call__(self, labels: Int[Array, "batch"]) -> Float[Array, "batch 1 width"]:
        init = nn.initializers.normal(1.0)
        embed = nn.Embed(
            self.num_classes, self.width, dtype=self.dtype, embedding_init=init, name="embedding"
        )
        return embed(labels)[:, None, :]


class SpatialRescaler(nn.Module):
    """A map of labels, one a pixel, to channels beside the latents (LDM, section 4.3.2).

    CompVis's halves the one-hot map `halvings` times, bilinear, then has a 1x1 convolution without
    a bias. Bilinear at one half is the mean of 2x2, and both are linear: here the convolution's row
    of each pixel's label is looked up first, and then averaged.
    """

    classes: int
    channels: int
    halvings: int = 2
    dtype: Any = None

    @nn.compact
    def __call__(
        self, segments: Int[Array, "batch height width"]
    ) -> Float[Array, "batch places_down places_across channels"]:
        kernel = self.param("kernel", default_init, (self.classes, self.channels), jnp.float32)
        x = kernel.astype(self.dtype or jnp.float32)[segments]
        return average_pool(x, 2**self.halvings)
