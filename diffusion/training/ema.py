"""Exponential moving averages of parameters, by network (DDPM section 4, LDM `ema.py`):

(1) ema_n = d_n ema_{n-1} + (1 - d_n) params_n,   n = 1, 2, ...
(2) d_n = decay for n > 1 and d_1 = 0             (DDPM: starts at the weights after step 1)
(3) d_n = min(decay, (1 + n) / (10 + n))          (LDM: `ramp`)
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Ema:
    """Which networks are averaged, and how fast. No networks: no EMA."""

    decay: float
    ramp: bool = False
    networks: tuple[str, ...] = ()

    def init(self, params: dict[str, Any]) -> dict[str, Any]:
        # A copy: a donated buffer may be handed over once only.
        return {name: jax.tree.map(jnp.array, params[name]) for name in self.networks}

    def decay_at(self, n: Int[Array, ""]) -> Float[Array, ""]:
        """d_n for the n-th update, n = 1, 2, ..."""
        n = n.astype(jnp.float32)
        if self.ramp:
            return jnp.minimum(self.decay, (1 + n) / (10 + n))
        return jnp.where(n <= 1, 0.0, self.decay)


def update(average: Any, params: Any, decay: Float[Array, ""]) -> Any:
    """Equation 1 of one network's parameters."""
    return jax.tree.map(lambda e, p: e * decay + p.astype(e.dtype) * (1 - decay), average, params)
