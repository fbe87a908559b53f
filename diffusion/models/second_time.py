"""What networks of few steps are told besides t: where a jump ends, or how strongly to guide.

A second time s <= t is the end of a jump (`process/few_steps.py`):

    temb = temb + W2 silu(W1 emb(t - s)),   W2 = 0 at first

so that a network trained without it is its own beginning, whatever s. Without s it is told s = t,
where the average velocity of MeanFlow (arXiv:2505.13447) is the velocity itself. A guidance weight
w (LCM, arXiv:2310.04378, section 4.3) joins the sinusoids that the time embedding is made of,

    emb(t) + W emb'(1000 w),   W = 0 at first

emb' being of sines, then cosines (Diffusers: time_cond_proj_dim); without w it is told 0: unguided.
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


def told_guidance(network: Any) -> bool:
    """Whether it is told how strongly to guide, and so asked once for both."""
    return bool(getattr(network, "guidance_width", 0))


def with_guidance(
    width: int, sinusoids: Float[Array, "batch channels"], w: Any, dtype: Any = None
) -> Float[Array, "batch channels"]:
    """emb(t) with w (batch,) in it, inside a compact call; `width`: of emb', 0: none is told.

    ValueError where w is given to a network of width 0.
    """
    if not width:
        if w is not None:
            raise ValueError(
                "guidance_width=0, but the network is told a guidance weight: set "
                "model.denoiser.guidance_width=256"
            )
        return sinusoids
    w = jnp.zeros(len(sinusoids)) if w is None else w
    h = timestep_embedding(1000 * w.astype(sinusoids.dtype), width, False, 1)
    zeros, channels = nn.initializers.zeros, sinusoids.shape[-1]
    own = nn.Dense(channels, False, dtype=dtype, kernel_init=zeros, name="guidance_proj")
    return sinusoids + own(h)
