r"""Continuous schedules, and what all schedules take and give.

EDM             alpha = 1, sigma = t; training levels ln sigma ~ N(P_mean, P_std^2), sampling
                levels (s_max^(1/rho) + i/(N-1) (s_min^(1/rho) - s_max^(1/rho)))^rho
                                                   (EDM Table 1, arXiv:2206.00364)
TrigFlow        alpha = cos t, sigma = d sin t, d = sigma_data: EDM's process over sqrt(1 + (s/d)^2)
                at its level s = d tan t                  (arXiv:2410.11081 section 3)
rectified flow  alpha = 1 - t, sigma = t, t in [0, 1] (arXiv:2209.03003; here t = 1 is noise);
                times drawn or spaced are moved to shift t / (1 + (shift - 1) t)
                                                   (SD3 eq. 23, arXiv:2403.03206)
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

Times = jax.Array | np.ndarray | np.generic | float | int
Levels = jax.Array | np.ndarray | np.floating | float


def as_float(t: Times) -> Levels:
    if isinstance(t, jax.Array):
        return t.astype(jnp.promote_types(t.dtype, jnp.result_type(float)))
    return np.asarray(t, np.float64)


def module(t: Times):
    return jnp if isinstance(t, jax.Array) else np


def edm_norm(alpha: Levels, sigma: Levels, sigma_data: float | int) -> Levels:
    """Std of x_t, of data's ``sigma_data``: 1 / c_in of EDM Table 1 (alpha=1)."""
    return module(sigma).sqrt(sigma**2 + alpha**2 * sigma_data**2)


@dataclasses.dataclass(frozen=True, eq=False)
class EDM:
    """EDM's variance-exploding schedule: alpha = 1, sigma = t (EDM Table 1, last column)."""

    sigma_min: float | int = 0.002
    sigma_max: float | int = 80.0
    rho: float | int = 7.0
    sigma_data: float | int = 0.5
    p_mean: float | int = -1.2
    p_std: float | int = 1.2

    num_steps = None
    variance_preserving = False

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"sigma_min={self.sigma_min}, sigma_max={self.sigma_max}, "
                "but 0 < sigma_min < sigma_max must hold: EDM's are 0.002 and 80"
            )

    @property
    def time_range(self) -> tuple[float, float]:
        return float(self.sigma_min), float(self.sigma_max)

    @property
    def prior_std(self) -> float:
        return float(self.sigma_max)

    def alpha(self, t: Times) -> Levels:
        return 0 * as_float(t) + 1

    def sigma(self, t: Times) -> Levels:
        return as_float(t)

    def logsnr(self, t: Times) -> Levels:
        return -2 * module(t).log(as_float(t))

    def time(self, logsnr: Times) -> Levels:
        return module(logsnr).exp(-0.5 * as_float(logsnr))

    def conditioning(self, t: Times) -> Levels:
        """c_noise = ln(sigma) / 4 (EDM Table 1)."""
        return module(t).log(as_float(t)) / 4

    def input_scale(self, t: Times) -> Levels:
        """c_in of EDM Table 1."""
        return 1 / edm_norm(1.0, as_float(t), self.sigma_data)


@dataclasses.dataclass(frozen=True, eq=False)
class TrigFlow(EDM):
    """EDM's levels, x_t of the same variance at all of them. The network is told ``time_scale t``,
    with 1 a smooth function of t, as sCM needs.
    """

    time_scale: float | int = 1.0

    @property
    def time_range(self) -> tuple[float, float]:
        low, high = (np.arctan(s / self.sigma_data) for s in (self.sigma_min, self.sigma_max))
        return float(low), float(high)

    @property
    def prior_std(self) -> float:
        return float(self.sigma(self.time_range[1]))

    def alpha(self, t: Times) -> Levels:
        return module(t).cos(as_float(t))

    def sigma(self, t: Times) -> Levels:
        return self.sigma_data * module(t).sin(as_float(t))

    def logsnr(self, t: Times) -> Levels:
        return -2 * module(t).log(self.sigma_data * module(t).tan(as_float(t)))

    def time(self, logsnr: Times) -> Levels:
        return module(logsnr).arctan(super().time(logsnr) / self.sigma_data)

    def conditioning(self, t: Times) -> Levels:
        return self.time_scale * as_float(t)

    def input_scale(self, t: Times) -> Levels:
        return 0 * as_float(t) + 1 / self.sigma_data


@dataclasses.dataclass(frozen=True, eq=False)
class Flow:
    """Rectified flow: alpha = 1 - t, sigma = t. The network is told ``time_scale * t``.

    p_mean, p_std: of logit(t), where training draws it logit-normal. shift: above 1, more of the
    times that training draws and sampling visits have much noise, as large pictures want.
    """

    time_scale: float | int = 1000.0
    p_mean: float | int = 0.0
    p_std: float | int = 1.0
    sigma_data: float | int = 0.5
    shift: float | int = 1.0

    num_steps = None
    variance_preserving = False
    time_range = (0.0, 1.0)
    prior_std = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.shift < float("inf"):
            raise ValueError(f"shift={self.shift} must be above 0 and finite: 1 moves no time")

    def shifted(self, t: Times) -> Levels:
        """Even times of [0, 1] to those that are drawn or visited."""
        t = as_float(t)
        return t if self.shift == 1 else self.shift * t / (1 + (self.shift - 1) * t)

    def alpha(self, t: Times) -> Levels:
        return 1 - as_float(t)

    def sigma(self, t: Times) -> Levels:
        return as_float(t)

    def logsnr(self, t: Times) -> Levels:
        t = as_float(t)
        with np.errstate(divide="ignore"):
            return 2 * (module(t).log1p(-t) - module(t).log(t))

    def time(self, logsnr: Times) -> Levels:
        return 1 / (1 + module(logsnr).exp(module(logsnr).minimum(0.5 * as_float(logsnr), 700.0)))

    def conditioning(self, t: Times) -> Levels:
        return self.time_scale * as_float(t)

    def input_scale(self, t: Times) -> Levels:
        return 0 * as_float(t) + 1
