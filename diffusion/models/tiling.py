"""First stages on images larger than memory: tile by tile, the overlaps blended.

Tiles of T pixels (T / f places of the latent) overlap by a fraction r: neighbours start (1 - r) T
apart, and over the b = r T places that two share, the earlier one fades linearly into the later,

    (1)  blended[k] = (1 - k / b) earlier[T - b + k] + k / b later[k],   k = 0 .. b - 1,

rows first, then columns (huggingface/diffusers: `autoencoder_kl.py`, whose output this equals).
The result is not that of the whole image: group norms and attention see one tile at a time. How far
apart they are is a PSNR that the caller can take; over images much larger than a tile it is mostly
a slight change of contrast from tile to tile.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion.models.autoencoder import AutoencoderKL, FirstStage
from diffusion.models.bottleneck import LOGVAR_RANGE, Code, Posterior

Run = Callable[[Array], Array]


def tiled_encode(
    module: Any,
    params: Any,
    x: Float[Array, "batch height width channels"],
    tile_size: int,
    overlap: float = 0.25,
) -> Posterior | Code:
    """`encode` of `x` in tiles of `tile_size` pixels. Moments are blended, then split.

    ValueError where the tile or the image does not divide into places of the latent.
    """
    _check(module, tile_size, x.shape[1:3], overlap)
    latent = tile_size // module.downsampling
    run = functools.partial(_compiled(module, "moments_of"), params)
    moments = _tiled(run, x, tile_size, latent, overlap)
    if isinstance(module, AutoencoderKL):
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, *LOGVAR_RANGE))
    return Code(moments)


def tiled_decode(
    module: Any,
    params: Any,
    z: Float[Array, "batch height width channels"],
    tile_size: int,
    overlap: float = 0.25,
) -> Float[Array, "batch out_height out_width image_channels"]:
    """`decode` of `z` in tiles of `tile_size` pixels of the image. Errors as `tiled_encode`."""
    f = module.downsampling
    _check(module, tile_size, tuple(side * f for side in z.shape[1:3]), overlap)
    run = functools.partial(_compiled(module, "decode"), params)
    return _tiled(run, z, tile_size // f, tile_size, overlap)


@functools.lru_cache(maxsize=4)
def _compiled(module: Any, method: str) -> Callable[..., Array]:
    return jax.jit(lambda params, x: module.apply({"params": params}, x, method=method))


def _tiled(run: Run, x: Array, tile: int, out_tile: int, overlap: float) -> Array:
    """`run` on tiles of `tile` places, each becoming `out_tile`, or fewer at the far edges."""
    stride, blend = int(tile * (1 - overlap)), int(out_tile * overlap)
    kept = out_tile - blend
    rows: list[list[Array]] = []
    bands = []
    for top in range(0, x.shape[1], stride):
        starts = range(0, x.shape[2], stride)
        rows.append([run(x[:, top : top + tile, left : left + tile]) for left in starts])
        row = rows[-1]
        if len(rows) > 1:  # in place: what is blended downwards is then blended on
            row[:] = [_fade(above, here, blend, 1) for above, here in zip(rows[-2], row)]
        for i in range(1, len(row)):
            row[i] = _fade(row[i - 1], row[i], blend, 2)
        bands.append(jnp.concatenate([part[:, :kept, :kept] for part in row], axis=2))
        rows[:-1] = []  # only the row above is ever needed
    return jnp.concatenate(bands, axis=1)


def _fade(earlier: Array, later: Array, blend: int, axis: int) -> Array:
    """Equation 1 along `axis`."""
    blend = min(blend, earlier.shape[axis], later.shape[axis])
    if not blend:
        return later
    end, size = earlier.shape[axis], later.shape[axis]
    ramp = (jnp.arange(blend) / blend).astype(later.dtype)
    ramp = jnp.expand_dims(ramp, [i for i in range(later.ndim) if i != axis])
    old = jax.lax.slice_in_dim(earlier, end - blend, end, axis=axis)
    new = jax.lax.slice_in_dim(later, 0, blend, axis=axis)
    rest = jax.lax.slice_in_dim(later, blend, size, axis=axis)
    return jnp.concatenate([old * (1 - ramp) + new * ramp, rest], axis=axis)


def _check(module: FirstStage, tile_size: int, space: tuple[int, ...], overlap: float) -> None:
    f = module.downsampling
    if tile_size < f or tile_size % f or not 0 <= overlap < 1:
        raise ValueError(
            f"tile_size={tile_size}, overlap={overlap}: tiles must be a multiple of the "
            f"downsampling factor f={f}, and overlap by a fraction in [0, 1)"
        )
    stride = int(tile_size * (1 - overlap))
    if stride % f or any(side % f for side in space):
        raise ValueError(
            f"image size {space} and the tiles' distance {stride} must be multiples of the "
            f"downsampling factor f={f}: crop or pad the image, or change tile_size"
        )
