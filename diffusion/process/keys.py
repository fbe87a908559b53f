"""Random keys: one an example, step and purpose, so that no two draws share one.

    (1) key of an example of a step    = fold_in(fold_in(run's key, step), position in the batch)
    (2) key of one of its purposes     = fold_in(key of the example, purpose)

With the position in the global batch, draws are bit-equal for any device count, accumulation and
parallel mode. A run of samples has example i's number for (1), and the step for (2).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, UInt32

# The purposes of a training step. Losses fold in TIMES' own once more (`losses.py`).
DATA, TIMES, DROPOUT, CAPTION, POSTERIOR = range(5)


def numbered(key: Key[Array, ""], numbers: Int[Array, " batch"]) -> Key[Array, " batch"]:
    """One key for each number."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)


def example_keys(
    rng: UInt32[Array, "2"], step: Int[Array, ""], position: Int[Array, " batch"]
) -> Key[Array, " batch"]:
    """Equation 1. ``rng``: the raw data of the run's key."""
    return numbered(jax.random.fold_in(jax.random.wrap_key_data(rng), step), position)


def held_out_keys(index: Int[Array, " batch"]) -> Key[Array, " batch"]:
    """Of examples that a run is evaluated on, by their index alone: the same for every step."""
    return example_keys(jax.random.key_data(jax.random.key(0)), jnp.zeros((), jnp.int32), index)


def stream(keys: Key[Array, " batch"], purpose: Any) -> Key[Array, " batch"]:
    """Equation 2: the keys of one purpose, or of one step of a sampler."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, purpose)


def normal(keys: Key[Array, " batch"], shape: tuple[int, ...], dtype: Any = None) -> Array:
    """Unit noise of ``shape`` = (batch, ...), example i drawn from keys[i] alone."""
    dtype = jnp.result_type(float) if dtype is None else dtype
    return jax.vmap(lambda key: jax.random.normal(key, tuple(shape[1:]), dtype))(keys)
