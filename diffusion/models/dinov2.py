"""DINOv2's image tower: what each patch of a picture shows (https://arxiv.org/abs/2304.07193).

A vision transformer (https://arxiv.org/abs/2010.11929) with learned scales s, s' of its branches:

    (1)  h = [class, W patch_1 + b, ..., W patch_n + b] + position
    (2)  h = h + s attention(norm(h));   h = h + s' W2 gelu(W1 norm(h))
    (3)  features = norm(h), without the class token's

Positions are of a square of `image_size` pixels; for other sizes they are interpolated by Keys'
cubic with a = -0.75, as Transformers does with PyTorch.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion.models.attention import Attention, FeedForward
from diffusion.models.layers import Dense
from diffusion.models.positions import patches

# ImageNet's, of red, green and blue in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class DinoV2(nn.Module):
    """`apply({"params": p}, x)` of normalised pictures: features (batch, rows, columns, width).

    The defaults are ViT-B/14's.
    """

    image_size: int = 518
    patch: int = 14
    width: int = 768
    depth: int = 12
    heads: int = 12
    mult: int | float = 4
    epsilon: float = 1e-6
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns features"]:
        """Float32 or wider. ValueError for sides that the patch does not divide."""
        if any(side % self.patch for side in x.shape[1:3]):
            raise ValueError(f"patch={self.patch} does not divide pictures of {x.shape[1:3]}")
        grid = tuple(side // self.patch for side in x.shape[1:3])
        u = Dense(self.width, dtype=self.dtype, name="patches")(patches(x, (self.patch,) * 2))
        normal = nn.initializers.normal(0.02)
        first = self.param("class_token", normal, (1, 1, self.width)).astype(u.dtype)
        side = self.image_size // self.patch
        where = self.param("positions", normal, (1, 1 + side**2, self.width))
        u = u.reshape(len(x), -1, self.width)
        u = u + self._places(where[0, 1:], side, grid)[None].astype(u.dtype)
        first = jnp.broadcast_to(first + where[:, :1].astype(u.dtype), (len(x), 1, self.width))
        u = jnp.concatenate([first, u], axis=1)
        for i in range(self.depth):
            u = self._layer(u, f"blocks_{i}")
        u = self._norm("norm")(u)[:, 1:].reshape(len(x), *grid, self.width)
        return u.astype(jnp.promote_types(u.dtype, jnp.float32))

    def feature_map(
        self, x: Float[Array, "batch height width channels"], grid: tuple[int, int]
    ) -> Float[Array, "batch rows columns features"]:
        """Of pictures in [-1, 1], resized (cubic) so that their patches are those of `grid`."""
        size = [n * self.patch for n in grid]
        x = jax.image.resize(x, (len(x), *size, x.shape[-1]), "cubic")
        mean, std = (jnp.asarray(v, x.dtype).reshape(1, 1, 1, -1) for v in (MEAN, STD))
        return self(((x + 1) / 2 - mean) / std)

    def _places(self, where: Array, side: int, grid: tuple[int, ...]) -> Array:
        if grid == (side, side):
            return where
        down, across = (jnp.asarray(cubic(side, n), where.dtype) for n in grid)
        table = where.reshape(side, side, -1)
        return jnp.einsum("ai,bj,ijc->abc", down, across, table).reshape(-1, self.width)

    def _norm(self, name: str) -> nn.Module:
        return nn.LayerNorm(self.epsilon, self.dtype, name=name)

    def _layer(self, u: Array, name: str) -> Array:
        """Eq. 2."""
        sizes = self.heads, self.width // self.heads
        attend = Attention(*sizes, qkv_bias=True, dtype=self.dtype, name=f"{name}_attention")
        forward = FeedForward("gelu", self.mult, self.dtype, name=f"{name}_ff")
        scales = [
            self.param(f"{name}_scale{i}", nn.initializers.ones, (self.width,))[None, None].astype(
                u.dtype
            )
            for i in (1, 2)
        ]
        u = u + scales[0] * attend(self._norm(f"{name}_norm1")(u))
        return u + scales[1] * forward(self._norm(f"{name}_norm2")(u))


def cubic(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """(new, old): values at `new` places of `old` ones by Keys' kernel, ends repeated, not smoothed
    (PyTorch's "bicubic" without align_corners)."""
    place = (np.arange(new) + 0.5) * old / new - 0.5
    matrix = np.zeros((new, old))
    for offset in range(-1, 3):
        index = np.floor(place) + offset
        d = np.abs(place - index)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        weight = np.where(d <= 1, near, far)
        np.add.at(matrix, (np.arange(new), np.clip(index, 0, old - 1).astype(int)), weight)
    return matrix
