r"""Noise schedules: how much signal and how much noise there is at time t.

Every process here is a Gaussian bridge between data and noise,

    x_t = alpha(t) x_0 + sigma(t) eps,   eps ~ N(0, I),                                       (1)
    logsnr(t) = log(alpha(t)^2 / sigma(t)^2), falling in t.                                   (2)

Discrete schedules know t = 0 .. T-1 (t = 0 is the least noise; DDPM's "t = 1"), hold
alpha_bar_t = alpha(t)^2 = prod_{s<=t} (1 - beta_s) as a float64 table, and preserve variance:
sigma(t)^2 = 1 - alpha_bar_t. Between two integers alpha_bar is interpolated linearly, so (1) stays
variance preserving, is exact at integers and finite where alpha_bar = 0 (k-diffusion interpolates
log sigma instead: infinite under zero terminal SNR).

    DDPM linear     beta_t = linspace(1e-4, 0.02)                     (DDPM §4, arXiv:2006.11239)
    scaled linear   beta_t = linspace(sqrt(b_0), sqrt(b_1))^2 (LDM's "linear", arXiv:2112.10752)
    cosine          alpha_bar(u) = cos^2(pi/2 (u+s)/(1+s)), beta <= 0.999
                                                          (Improved DDPM eq. 17, arXiv:2102.09672)
    sigmoid         alpha_bar(u) = (S(end) - S(start + u (end-start))) / (S(end) - S(start)),
                    S(a) = 1/(1+exp(-a/tau)), beta <= 0.999
                                                    (Jabri et al., arXiv:2212.11972, Algorithm 2)
    zero SNR        sqrt(alpha_bar)' = (sqrt(alpha_bar) - sqrt(alpha_bar_T)) *
                    sqrt(alpha_bar_0) / (sqrt(alpha_bar_0) - sqrt(alpha_bar_T))
                                                       (Lin et al. Algorithm 1, arXiv:2305.08891)
Continuous schedules are `continuous.py`'s.

A NumPy (or Python) t gives float64 NumPy; a jax t gives jax, float32 unless x64 is on: tables are
float64 and cast when gathered, as in the authors' code.
"""

import dataclasses
import functools
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.process.continuous import EDM, Flow, Levels, Times, TrigFlow, as_float, module


@runtime_checkable
class Schedule(Protocol):
    """What losses, samplers and likelihoods ask of a schedule; its t is in ``time_range``.

    ``conditioning(t)`` is what the network is told about t, ``input_scale(t)`` what its input is
    multiplied by, ``time(logsnr)`` the inverse of ``logsnr``, ``prior_std`` the standard deviation
    of x at the greatest t.
    """

    @property
    def num_steps(self) -> int | None: ...
    @property
    def time_range(self) -> tuple[float, float]: ...
    @property
    def variance_preserving(self) -> bool: ...
    @property
    def prior_std(self) -> float: ...
    @property
    def sigma_data(self) -> float | int: ...
    def alpha(self, t: Times) -> Levels: ...
    def sigma(self, t: Times) -> Levels: ...
    def logsnr(self, t: Times) -> Levels: ...
    def time(self, logsnr: Times) -> Levels: ...
    def conditioning(self, t: Times) -> Times: ...
    def input_scale(self, t: Times) -> Levels: ...


BETWEEN = ("variance", "log", "log_round")


@dataclasses.dataclass(frozen=True, eq=False)
class Discrete:
    """A variance-preserving schedule of T levels, given by alpha_bar (T,), float64.

    Between whole t alpha_bar is linear, or with ``between`` "log" log(sigma/alpha), as k-diffusion
    has it; "log_round" also tells the network the nearest whole t.
    Raises ValueError unless 1 >= alpha_bar_0 > alpha_bar_1 > ... >= 0 and T >= 1.
    """

    alpha_bar: np.ndarray
    sigma_data: float | int = 0.5
    time_scale: float | int = 1  # the network is told so many times t
    between: str = "variance"

    variance_preserving = True
    prior_std = 1.0

    def __post_init__(self) -> None:
        table = np.array(self.alpha_bar, np.float64)
        if table.ndim != 1 or table.size == 0:
            raise ValueError(
                f"alpha_bar has shape {table.shape}, but a discrete schedule needs T >= 1 levels: "
                "give at least 1"
            )
        if not np.all(np.isfinite(table)) or table[0] > 1 or table[-1] < 0:
            raise ValueError(
                f"alpha_bar runs from {table[0]} to {table[-1]}, "
                "but must be finite and lie in [0, 1]: choose every beta in [0, 1]"
            )
        rising = np.flatnonzero(np.diff(table) >= 0)
        if rising.size:
            raise ValueError(
                f"alpha_bar must decrease strictly, but alpha_bar[{rising[0]}] = "
                f"{table[rising[0]]} is followed by {table[rising[0] + 1]}: choose every beta > 0"
            )
        if self.between not in BETWEEN:
            raise ValueError(f"between={self.between!r} is unknown: choose {', '.join(BETWEEN)}")
        if self.between != "variance" and table[-1] == 0:
            raise ValueError(
                f"between={self.between!r} needs a last level with signal, which zero terminal SNR "
                "has not: choose variance"
            )
        table.flags.writeable = False
        object.__setattr__(self, "alpha_bar", table)

    @property
    def num_steps(self) -> int:
        return self.alpha_bar.size

    @property
    def time_range(self) -> tuple[float, float]:
        return 0.0, float(self.num_steps - 1)

    @property
    def betas(self) -> np.ndarray:
        """(T,), float64: beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}."""
        return 1 - self.alpha_bar / np.append(1.0, self.alpha_bar[:-1])

    @functools.cached_property
    def _tables(self) -> dict[str, np.ndarray]:
        noise = 1 - self.alpha_bar
        with np.errstate(divide="ignore"):
            logsnr = np.log(self.alpha_bar) - np.log(noise)
        roots = {"alpha": np.sqrt(self.alpha_bar), "sigma": np.sqrt(noise)}
        return roots | {"logsnr": logsnr, "noise": noise}

    def alpha(self, t: Times) -> Levels:
        if _is_integer(t):
            return _gather(self._tables["alpha"], t)
        if self.between != "variance":
            return (1 + module(t).exp(-self.logsnr(t))) ** -0.5
        return module(t).sqrt(_interpolate(self.alpha_bar, t))

    def sigma(self, t: Times) -> Levels:
        if _is_integer(t):
            return _gather(self._tables["sigma"], t)
        if self.between != "variance":
            return (1 + module(t).exp(self.logsnr(t))) ** -0.5
        return module(t).sqrt(_interpolate(self._tables["noise"], t))

    def logsnr(self, t: Times) -> Levels:
        if _is_integer(t):
            return _gather(self._tables["logsnr"], t)
        if self.between != "variance":
            return _interpolate(self._tables["logsnr"], t)
        signal, noise = _interpolate(self.alpha_bar, t), _interpolate(self._tables["noise"], t)
        with np.errstate(divide="ignore"):
            return module(t).log(signal) - module(t).log(noise)

    def time(self, logsnr: Times) -> Levels:
        """The (fractional) t of this logsnr, clamped to [0, T-1]."""
        like, logsnr = module(logsnr), as_float(logsnr)
        steps = np.arange(self.num_steps, dtype=np.float64)
        if self.between != "variance":
            return like.interp(-logsnr, -self._tables["logsnr"], steps)
        noise = 1 / (1 + like.exp(like.minimum(logsnr, 700.0)))
        return like.interp(noise, self._tables["noise"], steps)

    def conditioning(self, t: Times) -> Times:
        if self.between == "log_round" and not _is_integer(t):
            t = module(t).round(as_float(t))
        return t if self.time_scale == 1 else self.time_scale * as_float(t)

    def input_scale(self, t: Times) -> Levels:
        return 0 * as_float(t) + 1


def _is_integer(t: Times) -> bool:
    kind = t.dtype if isinstance(t, jax.Array) else np.asarray(t).dtype
    return bool(jnp.issubdtype(kind, jnp.integer))


def _gather(table: np.ndarray, t: Times) -> Levels:
    if isinstance(t, jax.Array):
        return jnp.take(jnp.asarray(table, jnp.result_type(float)), t, mode="clip")
    t = np.asarray(t)
    if np.any(t < 0) or np.any(t >= table.size):
        raise ValueError(f"t: {t} lies outside 0..{table.size - 1}, the steps of this schedule")
    return table[t]


def _interpolate(table: np.ndarray, t: Times) -> Levels:
    """table at a fractional t, linearly; exact at integers, constant beyond both ends.

    Differentiable in t, both ends included (by `where`: of `clip` half the slope would be left).
    """
    np_like, last = module(t), table.size - 1
    t = as_float(t)
    t = np_like.where(t < 0, 0 * t, np_like.where(t > last, 0 * t + last, t))
    low = np_like.minimum(np_like.floor(t), max(last - 1, 0)).astype(np.int32)
    high = np_like.minimum(low + 1, table.size - 1)
    weight = t - low
    return (1 - weight) * _gather(table, low) + weight * _gather(table, high)


def from_betas(betas: np.ndarray | list | tuple, time_scale: float | int = 1) -> Discrete:
    """The discrete schedule of these betas (T,), each in (0, 1]."""
    return Discrete(np.cumprod(1 - np.asarray(betas, np.float64)), time_scale=time_scale)


def _positive(num_steps: int) -> int:
    if num_steps < 1:
        raise ValueError(
            f"num_steps={num_steps}, but a discrete schedule needs T >= 1: "
            "DDPM uses 1000, Improved DDPM 4000"
        )
    return num_steps


def ddpm_linear(
    num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Discrete:
    """DDPM §4: betas linear in t."""
    return from_betas(np.linspace(beta_start, beta_end, _positive(num_steps), dtype=np.float64))


def scaled_linear(
    num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> Discrete:
    """LDM's and Stable Diffusion's betas: the square of a line between the square roots.

    LDM calls this "linear"; its unconditional models use beta 0.0015 to 0.0195 (0.0155 churches).
    """
    ends = np.sqrt(beta_start), np.sqrt(beta_end)
    return from_betas(np.linspace(*ends, _positive(num_steps), dtype=np.float64) ** 2)


def _from_curve(curve: np.ndarray, cap: float, time_scale: float | int = 1) -> Discrete:
    """From alpha_bar at u = 0, 1/T, .., 1, by betas capped as in Improved DDPM §3.2."""
    return from_betas(np.minimum(1 - curve[1:] / curve[:-1], cap), time_scale)


def cosine(
    num_steps: int = 1000, s: float = 0.008, cap: float = 0.999, time_scale: float | int = 1
) -> Discrete:
    """Improved DDPM eq. 17, betas capped at ``cap``. Its authors tell the network 1000 t / T
    (openai/improved-diffusion: respace.py, rescale_timesteps): that is ``time_scale`` 1000 / T.
    """
    u = np.arange(_positive(num_steps) + 1, dtype=np.float64) / num_steps
    return _from_curve(np.cos(np.pi / 2 * (u + s) / (1 + s)) ** 2, cap, time_scale)


def sigmoid(
    num_steps: int = 1000,
    start: float | int = -3.0,
    end: float | int = 3.0,
    tau: float | int = 1.0,
    cap: float = 0.999,
) -> Discrete:
    """Jabri et al. Algorithm 2 (start -3, end 3, tau 1 are its defaults), betas capped."""
    u = np.arange(_positive(num_steps) + 1, dtype=np.float64) / num_steps
    values = 1 / (1 + np.exp(-(start + u * (end - start)) / tau))
    return _from_curve((values[-1] - values) / (values[-1] - values[0]), cap)


edm = EDM
trigflow = TrigFlow
flow = Flow


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """Lin et al. Algorithm 1: shift and scale sqrt(alpha_bar) so that the last is exactly 0.

    Rectified flow ends there and is returned as it is. EDM never does: ValueError.
    """
    if isinstance(schedule, Flow):
        return schedule
    if not isinstance(schedule, Discrete) or schedule.num_steps < 2:
        raise ValueError(
            f"zero_terminal_snr of {type(schedule).__name__}, {schedule.num_steps} steps, "
            "but only a variance-preserving schedule of T >= 2 levels can be rescaled: use another "
            "schedule or leave zero_terminal_snr off"
        )
    root = np.sqrt(schedule.alpha_bar)
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return dataclasses.replace(schedule, alpha_bar=root**2)
