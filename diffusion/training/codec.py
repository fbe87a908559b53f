"""Pixels and what is diffused of them, both directions.

    (1) x  = image / 127.5 - 1          uint8 to [-1, 1]; back, clipped and rounded to the nearest
    (2) z0 = scale (E(x) - shift)       latents of about unit variance (LDM, arXiv:2112.10752)

E is the encoder of a first stage; without one z0 = x. Shift and scale, one a channel, are in the
state's `extra` as "latent_shift" and "latent_scale"; without them they are 0 and 1.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from diffusion.models.tiling import tiled_decode
from diffusion.process.keys import normal


def signed(image: Any, dtype: Any = jnp.float32) -> Float[Array, "*shape"]:
    """Equation 1: 0..255 to [-1, 1]."""
    return jnp.asarray(image).astype(dtype) / 127.5 - 1


def to_uint8(x: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """The inverse of equation 1, rounded to the nearest."""
    return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)


def scaled(z: Array, extra: Mapping[str, Any]) -> Array:
    """Equation 2 of a first stage's latents."""
    if "latent_scale" not in extra:
        return z
    return (z - _like(z, extra["latent_shift"])) * _like(z, extra["latent_scale"])


def unscaled(z: Array, extra: Mapping[str, Any]) -> Array:
    """The inverse of `scaled`."""
    if "latent_scale" not in extra:
        return z
    return z / _like(z, extra["latent_scale"]) + _like(z, extra["latent_shift"])


def encode(
    first_stage: Any,
    params: Mapping[str, Any],
    extra: Mapping[str, Any],
    x: Float[Array, "batch *space channels"],
    keys: Key[Array, " batch"] | None = None,
) -> Float[Array, "batch *places latent_channels"]:
    """Equation 2 of pixels in [-1, 1]: drawn by `keys`, without them from the posterior's mean."""
    if first_stage is not None:
        variables = {"params": params["autoencoder"]}
        posterior = first_stage.apply(variables, x, method="encode")
        x = posterior.mean if keys is None else posterior.sample(keys)
    return scaled(x, extra)


def stored(
    batch: Mapping[str, Any], extra: Mapping[str, Any], keys: Key[Array, " batch"] | None = None
) -> Float[Array, "batch *places latent_channels"]:
    """Equation 2 of stored moments, drawn by `keys`, without them the mean."""
    z = batch["mean"]
    if keys is not None and "logvar" in batch:  # a VQ stage's codes have no variance
        z = z + jnp.exp(0.5 * batch["logvar"]) * normal(keys, z.shape)
    return scaled(z, extra)


def decode(
    first_stage: Any,
    params: Mapping[str, Any],
    extra: Mapping[str, Any],
    z: Float[Array, "batch *places latent_channels"],
    tile: int = 0,
) -> Float[Array, "batch *space channels"]:
    """Pixels of about [-1, 1], in tiles of `tile` pixels where it is not 0 (`models/tiling.py`)."""
    z = unscaled(z, extra)
    if first_stage is None:
        return z
    if tile:
        return tiled_decode(first_stage, params["autoencoder"], z, tile)
    return first_stage.apply({"params": params["autoencoder"]}, z, method="decode")


def moments(z: Float[Array, "batch *space channels"]) -> dict[str, Float[Array, " batch"]]:
    """First and second moments of each channel, for each example."""
    axes = tuple(range(1, z.ndim - 1))
    moments = {"mean": z.mean(axes), "square": jnp.square(z).mean(axes)}
    return {f"latent_{k}_{c}": m[:, c] for k, m in moments.items() for c in range(z.shape[-1])}


def _like(z: Array, per_channel: Any) -> Array:
    return jnp.asarray(per_channel).reshape(*[1] * (z.ndim - 1), -1).astype(z.dtype)
