"""CLIP: images and captions as vectors whose angle says how well they belong together.

Radford et al. 2021 (https://arxiv.org/abs/2103.00020, sections 2.3 and 2.4). The image tower is a
vision transformer (https://arxiv.org/abs/2010.11929): the image in patches of p x p pixels, each
projected to a token without bias, a learned token before them,

    (1)  h_0 = norm_pre([class, W patch_1, ..., W patch_n] + position)
    (2)  h_l = layer(h_(l-1))                    as in text_encoder.py eq. 2, nothing masked
    (3)  image = W_i norm_post(h_L[0])

The text tower is `text_encoder.TextTransformer`; its vector is that of the end token,

    (4)  text = W_t h[place of the end token]

Both are compared by their cosine (`metrics/clip_score.py`).
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from diffusion.models.text_encoder import LayerNorm, TextLayer

# OpenAI's mean and standard deviation of red, green and blue, in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class ImageTransformer(nn.Module):
    """`apply({"params": p}, x)` of `preprocess`ed images: vectors (batch, projection), eq. 3."""

    image_size: int = 224
    patch: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    mult: int | float = 4
    projection: int = 512
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch projection"]:
        if x.shape[1:3] != (self.image_size,) * 2:
            raise ValueError(
                f"images of {x.shape[1:3]} pixels: this CLIP sees {self.image_size} a side; bring "
                "them there with `preprocess`"
            )
        h = self._tokens(x)
        norm = functools.partial(LayerNorm, epsilon=self.epsilon, dtype=self.dtype)
        h = norm(name="norm_pre")(h)
        for i in range(self.layers):
            h = self._layer(f"layers_{i}")(h, None, None)
        pooled = norm(name="norm_post")(h[:, 0])
        return nn.Dense(self.projection, use_bias=False, dtype=self.dtype, name="projection")(
            pooled
        ).astype(jnp.promote_types(pooled.dtype, jnp.float32))

    def _tokens(self, x: Array) -> Array:
        embed = nn.Conv(
            self.width,
            (self.patch, self.patch),
            self.patch,
            "VALID",
            use_bias=False,
            dtype=self.dtype,
            name="patch_embedding",
        )
        h = embed(x).reshape(x.shape[0], -1, self.width)
        normal = nn.initializers.normal(0.02)
        first = self.param("class_embedding", normal, (self.width,)).astype(h.dtype)
        h = jnp.concatenate([jnp.broadcast_to(first, (h.shape[0], 1, self.width)), h], axis=1)
        position = nn.Embed(
            h.shape[1], self.width, embedding_init=normal, name="position_embedding"
        ).embedding
        return h + position[None].astype(h.dtype)

    def _layer(self, name: str) -> TextLayer:
        return TextLayer(
            self.heads,
            self.width // self.heads,
            self.activation,
            self.mult,
            qkv_bias=True,
            dropout=0.0,
            epsilon=self.epsilon,
            dtype=self.dtype,
            name=name,
        )


def pool_text(
    hidden: Float[Array, "batch length width"],
    tokens: Int[Array | np.ndarray, "batch length"],
    projection: Float[Array, "width dim"],
    end: int | None = None,
) -> Float[Array, "batch dim"]:
    """Eq. 4. `end`: the end token, the first of which counts; None: the largest token is it."""
    tokens = jnp.asarray(tokens)
    place = tokens.argmax(-1) if end is None else (tokens == end).argmax(-1)
    chosen = jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0]
    return jnp.matmul(chosen, projection, precision="highest")


def preprocess(
    images: UInt8[np.ndarray, "batch height width channels"],
    size: int,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> Float[np.ndarray, "batch size size 3"]:
    """The shorter side to `size` by Pillow's bicubic filter, the centre, less mean over std.

    As OpenAI's code and Transformers' image processor do it, on the host.
    """
    resized = np.stack([_resize(image, size) for image in images]).astype(np.float32)
    return (resized / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def _resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 (height, width, 1 or 3) to (size, size, 3)."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
    scale = size / min(image.size)
    width, height = (max(size, int(side * scale)) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))
