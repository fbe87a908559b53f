"""Keeping a codebook alive: which codes were taken, and new places for those that never are.

A code that no latent is nearest to gets no gradient and stays where it is. With n_k how often code
k was taken since the last re-seeding, over all devices, every R steps

    (1)  e_k <- z[p_k, s_k]   where n_k = 0,   then n <- 0

with z the batch's codes before they are quantised, p_k a position in the global batch and s_k a
place in its latent, drawn by (key of the run, step, k): the same for any number of devices and
accumulated parts. Neither LDM nor taming does it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from diffusion.models import bottleneck

COUNTS = "code_counts"  # of `TrainState.extra`
RESEED = 10_000  # folded into the key beside the step; far from the purposes of `process/keys.py`


def statistics(indices: Int[Array, "..."], num_codes: int) -> dict[str, Array]:
    """How often each code was taken: a sum, which means over equal parts of a batch only scale."""
    return {COUNTS: bottleneck.code_counts(indices, num_codes)}


def usage(counts: Float[Array, " codes"]) -> dict[str, Array]:
    """What is logged of a batch's counts."""
    return {
        "codebook_usage": bottleneck.code_usage(counts),
        "codebook_perplexity": bottleneck.perplexity(counts),
    }


def candidates(
    rng: UInt32[Array, "2"],
    step: Int[Array, ""],
    z: Float[Array, "batch *space channels"],
    position: Int[Array, " batch"],
    batch_size: int,
    num_codes: int,
) -> dict[str, Array]:
    """z[p_k, s_k] of equation 1 where this part of the global batch holds position p_k, else 0.

    "found" says which, so that the ratio of the means of both over all parts is the sum.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(rng), step), RESEED)
    places = z.reshape(z.shape[0], -1, z.shape[-1])
    example_key, place_key = jax.random.split(key)
    wanted = jax.random.randint(example_key, (num_codes,), 0, batch_size)
    place = jax.random.randint(place_key, (num_codes,), 0, places.shape[1])
    match = wanted[:, None] == position[None]
    found = match.any(1)
    codes = places[match.argmax(1), place]
    return {"codes": jnp.where(found[:, None], codes, 0), "found": found.astype(codes.dtype)}


def reseed(
    codebook: Float[Array, "codes channels"], counts: Float[Array, " codes"], new: dict[str, Any]
) -> Float[Array, "codes channels"]:
    """Equation 1, of `candidates` averaged over all parts."""
    codes = new["codes"] / jnp.maximum(new["found"], jnp.finfo(jnp.float32).tiny)[:, None]
    return jnp.where(counts[:, None] > 0, codebook, codes.astype(codebook.dtype))
