"""Image encoders for evaluation: the default job's digit classifier.

`DigitClassifier` reads which digit a picture shows, whatever its colours, place and size. It is a
small convolutional network behind a fixed attention window, as in a spatial transformer (Jaderberg
et al. 2015, https://arxiv.org/abs/1506.02025) whose window is measured rather than learned. With m
the mean colour of the picture's frame, the digit stands out in the contrast

    d(i, j) = |x(i, j) - m| / max |x - m|.                                                      (1)

Under the weights w = max(d - 0.35, 0), the row and column means mu and the spread s (root mean
square of the two standard deviations) give a square window of half-side 2.6 s about mu, which holds
a digit with a margin. The window is resampled to n x n points p_k by triangular kernels, separable
and so two small matrix products,

    K(k, j) = max(1 - |p_k - j| / h, 0) / h,    h = max(spacing of p_k, 1 pixel).               (2)

The network thus sees centred grey digits of one size: the task is as easy as MNIST, and needs
seconds of a CPU. The price: its features know the shape of a digit and are blind to colour, place
and size, and so is a Frechet distance on them. `metrics.adherence` measures those.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from diffusion.models.layers import Conv, Dropout

FOREGROUND = 0.35
WINDOW_SPREADS = 2.6


class DigitClassifier(nn.Module):
    """Ten-digit classifier of images in [-1, 1], of any height and width.

    `apply({"params": p}, x)` gives logits (batch, classes); `method="features"` gives the
    penultimate features (batch, feature_dim) that a Frechet distance compares. `keys`, one
    for each example, turn dropout on. `window` 0 leaves eq. 1 and 2 out: the picture as it is.
    """

    widths: Sequence[int] = (32, 64, 96)
    feature_dim: int = 64
    classes: int = 10
    window: int = 24
    dropout: float = 0.0
    dtype: Any = None

    def setup(self):
        self.convolutions = [
            Conv(width, kernel_size=3 if i else 5, strides=2, dtype=self.dtype)
            for i, width in enumerate(self.widths)
        ]
        self.norms = [nn.LayerNorm(dtype=self.dtype) for _ in self.widths]
        self.hidden = nn.Dense(self.feature_dim, dtype=self.dtype)
        self.drop = Dropout(self.dropout)
        self.logits = nn.Dense(self.classes, dtype=self.dtype)

    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        keys: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch classes"]:
        return self.logits(self.drop(self.features(x), keys))

    def features(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch feature_dim"]:
        h = self._convolved(
            2 * attend(contrast(x), self.window)[..., None] - 1 if self.window else x
        )
        return nn.relu(self.hidden(h.reshape(h.shape[0], -1)))

    def feature_map(
        self, x: Float[Array, "batch height width channels"], grid: tuple[int, int]
    ) -> Float[Array, "batch rows columns features"]:
        """The last convolution's of the whole picture, not of its window: what is where. Resized
        (linear) where the strides do not give `grid`."""
        h = self._convolved(2 * contrast(x)[..., None] - 1 if self.window else x)
        shape = (len(h), *grid, h.shape[-1])
        return h if h.shape == shape else jax.image.resize(h, shape, "linear")

    def _convolved(self, h: Array) -> Array:
        for convolution, norm in zip(self.convolutions, self.norms):
            h = nn.relu(norm(convolution(h)))
        return h


def contrast(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width"]:
    """Distance of each pixel from the frame's mean colour, over its largest value; eq. (1)."""
    edges = [x[:, 0], x[:, -1], x[:, 1:-1, 0], x[:, 1:-1, -1]]
    frame = jnp.concatenate(edges, axis=1).mean(axis=1)[:, None, None]
    distance = jnp.sqrt(jnp.square(x - frame).sum(axis=-1) + 1e-6)  # finite gradient if flat
    return distance / (distance.max(axis=(1, 2), keepdims=True) + 1e-3)


def attend(
    d: Float[Array, "batch height width"], points: int
) -> Float[Array, "batch points points"]:
    """The window around what stands out in `d`, resampled to points x points, eq. (2)."""
    weight = jnp.maximum(d - FOREGROUND, 0)
    row, row_spread = _moments(weight.sum(axis=2))
    column, column_spread = _moments(weight.sum(axis=1))
    spread = jnp.sqrt((jnp.square(row_spread) + jnp.square(column_spread)) / 2 + 1e-6)
    half = WINDOW_SPREADS * spread
    rows = _kernel(row, half, d.shape[1], points)
    columns = _kernel(column, half, d.shape[2], points)
    return jnp.einsum("bij,bjk,blk->bil", rows, d, columns)


def _moments(
    weight: Float[Array, "batch side"],
) -> tuple[Float[Array, "batch 1"], Float[Array, "batch 1"]]:
    """Weighted mean and standard deviation of the position along one axis, in pixels."""
    position = jnp.arange(weight.shape[1], dtype=weight.dtype)[None]
    total = weight.sum(axis=1, keepdims=True) + 1e-6
    mean = (weight * position).sum(axis=1, keepdims=True) / total
    variance = (weight * jnp.square(position - mean)).sum(axis=1, keepdims=True) / total
    return mean, jnp.sqrt(variance + 1e-6)


def _kernel(
    mean: Float[Array, "batch 1"], half: Float[Array, "batch 1"], side: int, points: int
) -> Float[Array, "batch points side"]:
    grid = (jnp.arange(points, dtype=mean.dtype)[None] + 0.5) / points * 2 - 1
    position = (mean + half * grid)[..., None]
    width = jnp.maximum(2 * half / points, 1.0)[..., None]
    pixel = jnp.arange(side, dtype=mean.dtype)[None, None]
    return jnp.maximum(1 - jnp.abs(position - pixel) / width, 0) / width
