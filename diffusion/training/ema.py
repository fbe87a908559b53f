"""Exponential moving averages of parameters, by network (DDPM section 4, LDM `ema.py`):

(1) ema_n = d_n ema_{n-1} + (1 - d_n) params_n,   n = 1, 2, ...
(2) d_n = decay for n > 1 and d_1 = 0             (DDPM: starts at the weights after step 1)
(3) d_n = min(decay, (1 + n) / (10 + n))          (LDM: `ramp`)
    d_n = min(decay, 2^(-1 / (s (n - 1))))        (EDM: `ramp_share` s, its half-life in updates at
                                                   most so much of those before; 0.05 there)

Power-function profiles and averages made after training (EDM2, arXiv:2312.02696, section 3 and
appendix C). A profile of length l weighs the parameters of time t in [0, n] by

(4) p_{g,n}(t) = (g + 1) t^g / n^(g + 1),   which eq. 1 makes with   d_n = (1 - 1 / n)^(g + 1)
(5) l = sqrt(g + 1) / ((g + 2) sqrt(g + 3))       its standard deviation, as a fraction of n
(6) <p_{a,m}, p_{b,n}> = (a + 1) (b + 1) min(m, n)^(a + b + 1) / ((a + b + 1) m^(a+1) n^(b+1))

Any profile is near a sum of those that were kept along the way (snapshots p_i, of any length and
time): the sum that is nearest in the norm of eq. 6 has weights x with A x = b, A_ij = <p_i, p_j>,
b_i = <p_i, p>, scaled to sum to one, and the same x applies to the snapshots' parameters.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

LONGEST = 12**-0.5  # the length of the plain mean, g = 0


@dataclasses.dataclass(frozen=True)
class Ema:
    """Which networks are averaged, and how fast; `profiles`: lengths of eq. 5 kept as well.

    No networks: no EMA; decay 0: profiles alone. ValueError for lengths that are none.
    """

    decay: float
    ramp: bool = False
    networks: tuple[str, ...] = ()
    profiles: tuple[float, ...] = ()
    ramp_share: float = 0.0

    def __post_init__(self):
        if self.ramp_share < 0 or (self.ramp and self.ramp_share):
            raise ValueError(
                f"ramp_share={self.ramp_share} must be 0 (off) or more, and 0 beside ramp=True: "
                "EDM's is 0.05 alone"
            )
        wrong = [length for length in self.profiles if not 0 < length <= LONGEST]
        if wrong or len(set(map(profile_name, self.profiles))) < len(self.profiles):
            raise ValueError(
                f"profiles={self.profiles} must be lengths above 0 and up to {LONGEST:.4f} (the "
                "plain mean), each once: EDM2's are 0.05 and 0.1"
            )

    def init(self, params: dict[str, Any]) -> dict[str, Any]:
        # A copy: a donated buffer may be handed over once only.
        names = self.networks if self.decay else ()
        return {name: jax.tree.map(jnp.array, params[name]) for name in names}

    def init_profiles(self, params: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Of each profile its networks; what they are before the first update does not count."""
        whole = dataclasses.replace(self, decay=1.0)
        return {profile_name(length): whole.init(params) for length in self.profiles}

    def decay_at(self, n: Int[Array, ""]) -> Float[Array, ""]:
        """d_n for the n-th update, n = 1, 2, ..."""
        n = n.astype(jnp.float32)
        if self.ramp_share:
            slower = jnp.exp2(-1 / (self.ramp_share * jnp.maximum(n - 1, 1)))
            return jnp.where(n <= 1, 0.0, jnp.minimum(self.decay, slower))
        if self.ramp:
            return jnp.minimum(self.decay, (1 + n) / (10 + n))
        return jnp.where(n <= 1, 0.0, self.decay)

    def profile_rates(self, n: Int[Array, ""]) -> dict[str, Float[Array, ""]]:
        """1 - d_n of eq. 4 by profile. Not by d_n, of which float32 keeps too little at n = 1e6."""
        log = jnp.log1p(-1 / n.astype(jnp.float32))
        return {profile_name(s): -jnp.expm1((exponent(s) + 1) * log) for s in self.profiles}


def update(average: Any, params: Any, decay: Float[Array, ""]) -> Any:
    """Equation 1 of one network's parameters."""
    return jax.tree.map(lambda e, p: e * decay + p.astype(e.dtype) * (1 - decay), average, params)


def update_profile(average: Any, params: Any, rate: Float[Array, ""]) -> Any:
    """Equation 1, given 1 - d_n."""
    return jax.tree.map(lambda e, p: e + (p.astype(e.dtype) - e) * rate, average, params)


def profile_name(length: float) -> str:
    """A profile's key in a state."""
    return f"{length:g}"


def exponent(length: float) -> float:
    """g of eq. 5, which falls from the plain mean's 0.2887 as g grows: the one root g >= 0."""
    s = length**-2
    roots = np.roots([1.0, 7.0, 16.0 - s, 12.0 - s])
    return max(float(roots.real.max()), 0.0)


def combination(
    lengths: Sequence[float], times: Sequence[int], length: float, time: int
) -> Float[np.ndarray, "snapshots"]:
    """x: what each snapshot (its length, its update n) counts in the profile at update `time`.

    ValueError for a length that lies outside those of the snapshots.
    """
    if not min(lengths) <= length <= max(lengths):
        raise ValueError(
            f"length={length:g} is outside the tracked {min(lengths):g} .. {max(lengths):g}: "
            "choose one inside, or train with other ema.profiles"
        )
    g, n = np.array([exponent(s) for s in lengths]), np.asarray(times, np.float64)
    gram = _inner(g[:, None], n[:, None], g[None], n[None])
    wanted = _inner(g, n, np.float64(exponent(length)), np.float64(time))
    x = np.linalg.lstsq(gram, wanted, rcond=None)[0]
    return x / x.sum()  # what never moves stays, whatever the fit


def _inner(a: Any, m: Any, b: Any, n: Any) -> np.ndarray:
    """Eq. 6, as ratios: powers of n itself overflow."""
    ratio = np.minimum(m, n) / np.maximum(m, n)
    power = np.where(m < n, b, a)
    return (a + 1) * (b + 1) * ratio**power / ((a + b + 1) * np.maximum(m, n))
