"""The Inception-v3 of the Frechet Inception distance, and the two ways images are brought to it.

FID (Heusel et al. 2017, https://arxiv.org/abs/1706.08500) is defined by one network: TensorFlow's
graph of 5 December 2015, of the architecture of https://arxiv.org/abs/1512.00567, section 6, with
1,008 outputs. It differs from the later Inception-v3 of torchvision in what its pooling branches do
(found in the graph by pytorch-fid and torch-fidelity):

    (1)  blocks 5b..6e and 7b average over the pixels inside the image only, not over the padding
    (2)  block 7c takes the maximum where the paper has the average

Batch norm is fixed, so each convolution is followed by y = (x - m) / sqrt(v + 1e-3) * scale + bias.
Parameters carry torchvision's names, which every published file of these weights uses.

Three things are taken from it, as the graph's users have done:

    "pool"     (batch, 2048): global mean after 7c; FID, KID, precision and recall
    "spatial"  (batch, 2023): the first 7 channels of 6d's 1x1 branch, 17 x 17, rows first; sFID
               (Nash et al. 2021, https://arxiv.org/abs/2103.03841; openai/guided-diffusion)
    "logits"   (batch, 1008): pool times the last layer's weights, without its bias; the Inception
               score (https://arxiv.org/abs/1606.03498)

An image of n pixels a side is resized to 299 by interpolation between its pixels at

    (3)  s(i) = i n / 299                         "torch-fidelity": TensorFlow 1, then (x - 128)/128
    (4)  s(i) = max((i + 1/2) n / 299 - 1/2, 0)   "pytorch-fid", then 2 x/255 - 1

which differ by up to half a pixel and give numbers that do not compare. "FID" without more words is
the first. Neither smooths before it shrinks.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

SIZE = 299
PREPROCESSINGS = ("torch-fidelity", "pytorch-fid")
EPSILON = 1e-3
SPATIAL_CHANNELS = 7


class Step(NamedTuple):
    """One convolution of a branch. Stride 1 keeps the size; stride 2 pads nothing."""

    name: str
    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


Branch = Sequence[Step | Sequence[Step]]  # one after the other; those in brackets side by side


class ConvNorm(nn.Module):
    """Convolution without bias, fixed batch norm, ReLU; in full float32 on any device."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch h w features"]:
        padding = self.padding or ("SAME" if self.stride == 1 else "VALID")
        convolve = functools.partial(lax.conv_general_dilated, precision=lax.Precision.HIGHEST)
        y = nn.Conv(
            self.features,
            self.kernel,
            self.stride,
            padding,
            use_bias=False,
            conv_general_dilated=convolve,
            name="conv",
        )(x)
        return nn.relu(FixedNorm(name="bn")(y))


class FixedNorm(nn.Module):
    """Batch norm with the moments that it was trained with; the leaves have PyTorch's names."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        ones, zeros, shape = nn.initializers.ones, nn.initializers.zeros, (x.shape[-1],)
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        mean = self.param("running_mean", zeros, shape)
        variance = self.param("running_var", ones, shape)
        factor = scale / jnp.sqrt(variance + EPSILON)
        factor, shift = (v[None, None, None] for v in (factor, bias - mean * factor))
        return x * factor + shift


class Mixed(nn.Module):
    """Branches side by side, their channels joined, a pooling branch last.

    pool: "average" (eq. 1) or "max" (eq. 2), each followed by a 1x1 convolution to `pooled`
    channels; "stride" halves the size and has no convolution.
    """

    branches: Sequence[Branch]
    pool: str
    pooled: int = 0

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch h w features"]:
        outputs = [self._branch(branch, x) for branch in self.branches]
        return jnp.concatenate([*outputs, self._pool(x)], axis=-1)

    def _branch(self, branch: Branch, x: Array) -> Array:
        for step in branch:
            beside = [step] if isinstance(step, Step) else step
            made = [ConvNorm(s.features, s.kernel, s.stride, name=s.name)(x) for s in beside]
            x = jnp.concatenate(made, axis=-1)
        return x

    def _pool(self, x: Array) -> Array:
        if self.pool == "stride":
            return nn.max_pool(x, (3, 3), (2, 2))
        if self.pool == "max":
            x = nn.max_pool(x, (3, 3), (1, 1), "SAME")
        else:
            x = nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
        return ConvNorm(self.pooled, name="branch_pool")(x)


def block_a(pooled: int) -> dict[str, Any]:
    """35 x 35."""
    branches = (
        (Step("branch1x1", 64),),
        (Step("branch5x5_1", 48), Step("branch5x5_2", 64, (5, 5))),
        (
            Step("branch3x3dbl_1", 64),
            Step("branch3x3dbl_2", 96, (3, 3)),
            Step("branch3x3dbl_3", 96, (3, 3)),
        ),
    )
    return {"branches": branches, "pool": "average", "pooled": pooled}


def block_b() -> dict[str, Any]:
    """35 x 35 to 17 x 17."""
    branches = (
        (Step("branch3x3", 384, (3, 3), 2),),
        (
            Step("branch3x3dbl_1", 64),
            Step("branch3x3dbl_2", 96, (3, 3)),
            Step("branch3x3dbl_3", 96, (3, 3), 2),
        ),
    )
    return {"branches": branches, "pool": "stride"}


def block_c(width: int) -> dict[str, Any]:
    """17 x 17."""
    branches = (
        (Step("branch1x1", 192),),
        (
            Step("branch7x7_1", width),
            Step("branch7x7_2", width, (1, 7)),
            Step("branch7x7_3", 192, (7, 1)),
        ),
        (
            Step("branch7x7dbl_1", width),
            Step("branch7x7dbl_2", width, (7, 1)),
            Step("branch7x7dbl_3", width, (1, 7)),
            Step("branch7x7dbl_4", width, (7, 1)),
            Step("branch7x7dbl_5", 192, (1, 7)),
        ),
    )
    return {"branches": branches, "pool": "average", "pooled": 192}


def block_d() -> dict[str, Any]:
    """17 x 17 to 8 x 8."""
    branches = (
        (Step("branch3x3_1", 192), Step("branch3x3_2", 320, (3, 3), 2)),
        (
            Step("branch7x7x3_1", 192),
            Step("branch7x7x3_2", 192, (1, 7)),
            Step("branch7x7x3_3", 192, (7, 1)),
            Step("branch7x7x3_4", 192, (3, 3), 2),
        ),
    )
    return {"branches": branches, "pool": "stride"}


def block_e(pool: str) -> dict[str, Any]:
    """8 x 8."""
    branches = (
        (Step("branch1x1", 320),),
        (
            Step("branch3x3_1", 384),
            (Step("branch3x3_2a", 384, (1, 3)), Step("branch3x3_2b", 384, (3, 1))),
        ),
        (
            Step("branch3x3dbl_1", 448),
            Step("branch3x3dbl_2", 384, (3, 3)),
            (Step("branch3x3dbl_3a", 384, (1, 3)), Step("branch3x3dbl_3b", 384, (3, 1))),
        ),
    )
    return {"branches": branches, "pool": pool, "pooled": 192}


BLOCKS: dict[str, dict[str, Any]] = {
    "Mixed_5b": block_a(32),
    "Mixed_5c": block_a(64),
    "Mixed_5d": block_a(64),
    "Mixed_6a": block_b(),
    "Mixed_6b": block_c(128),
    "Mixed_6c": block_c(160),
    "Mixed_6d": block_c(160),
    "Mixed_6e": block_c(192),
    "Mixed_7a": block_d(),
    "Mixed_7b": block_e("average"),
    "Mixed_7c": block_e("max"),
}


class Inception(nn.Module):
    """`apply({"params": p}, x)` of `preprocess`ed images: {"pool", "spatial", "logits"}."""

    classes: int = 1008

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch 299 299 3"]
    ) -> dict[str, Float[Array, "batch features"]]:
        x = ConvNorm(32, (3, 3), 2, name="Conv2d_1a_3x3")(x)
        x = ConvNorm(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
        x = ConvNorm(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = ConvNorm(80, name="Conv2d_3b_1x1")(x)
        x = ConvNorm(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        spatial = x
        for name, fields in BLOCKS.items():
            x = Mixed(**fields, name=name)(x)
            if name == "Mixed_6d":  # its 1x1 branch comes first
                spatial = x[..., :SPATIAL_CHANNELS].reshape(x.shape[0], -1)
        pool = x.mean(axis=(1, 2))
        last = nn.Dense(self.classes, use_bias=False, precision="highest", name="fc")
        return {"pool": pool, "spatial": spatial, "logits": last(pool)}


def preprocess(
    images: UInt8[Array | np.ndarray, "batch height width channels"], name: str = PREPROCESSINGS[0]
) -> Float[Array, "batch 299 299 3"]:
    """Images of one or three channels as the network takes them, eqs. 3 and 4.

    ValueError for another name of the preprocessing, or number of channels.
    """
    if name not in PREPROCESSINGS:
        raise ValueError(f"preprocessing={name!r} is unknown: use {' or '.join(PREPROCESSINGS)}")
    if images.shape[-1] not in (1, 3):
        raise ValueError(
            f"images of {images.shape[-1]} channels: Inception sees grey (1) or RGB (3) images"
        )
    rows, columns = (jnp.asarray(_resizing(side, name)) for side in images.shape[1:3])
    x = jnp.asarray(images, jnp.float32)
    x = jnp.einsum("ij,bjkc,lk->bilc", rows, x, columns, precision="highest")
    x = jnp.broadcast_to(x, (*x.shape[:3], 3))
    return (x - 128) / 128 if name == "torch-fidelity" else x / 127.5 - 1


@functools.lru_cache
def _resizing(side: int, name: str) -> np.ndarray:
    """Matrix (299, side) of the interpolation's weights; places in float32, as both originals."""
    scale, i = np.float32(side / SIZE), np.arange(SIZE, dtype=np.float32)
    half = np.float32(0.5)
    place = i * scale
    if name == "pytorch-fid":
        place = np.maximum((i + half) * scale - half, np.float32(0))
    low = np.minimum(np.floor(place).astype(np.int64), side - 1)
    high, part = np.minimum(low + 1, side - 1), place - low.astype(np.float32)
    matrix = np.zeros((SIZE, side), np.float32)
    rows = np.arange(SIZE)
    np.add.at(matrix, (rows, low), 1 - part)
    np.add.at(matrix, (rows, high), part)
    return matrix
