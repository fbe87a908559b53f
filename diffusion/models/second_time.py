"""A second time s <= t that a network may be told: the end of a jump (`process/few_steps.py`).

    temb = temb + W2 silu(W1 emb(t - s)),   W2 = 0 at first

so that a network trained without it is its own beginning, whatever s. Without s it is told s = t,
where the average velocity of MeanFlow (arXiv:2505.13447) is the velocity itself.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from diffusion.models.layers import Dense, timestep_embedding


def with_second_time(
    told: bool,
    temb: Float[Array, "batch width"],
    t: Num[Array, "batch"],
    s: Num[Array, ""] | Num[Array, "batch"] | None,
    sinusoids: int,
    flip_sin_to_cos: bool = True,
    freq_shift: int | float = 0,
    dtype: Any = None,
) -> Float[Array, "batch width"]:
    """temb with s in it, inside a network's compact call; `sinusoids`: the width of emb.

    ValueError where s is given to a network that is not `told` one.
    """
    if not told:
        if s is not None:
            raise ValueError(
                "second_time=False, but the network is asked for a jump to a second time: set "
                "model.denoiser.second_time=True"
            )
        return temb
    gap = t - jnp.broadcast_to(t if s is None else s, t.shape).astype(t.dtype)
    h = timestep_embedding(gap, sinusoids, flip_sin_to_cos, freq_shift)
    h = nn.silu(Dense(temb.shape[-1], dtype=dtype, name="second_1")(h))
    zeros = nn.initializers.zeros
    return temb + Dense(temb.shape[-1], kernel_init=zeros, dtype=dtype, name="second_2")(h)
