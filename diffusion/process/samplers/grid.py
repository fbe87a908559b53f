r"""Which times a sampler visits, and the levels there, in float64 NumPy.

A grid is n evaluated times, noise first, and a final level that is reached but not evaluated. For a
discrete schedule of T levels (names as in Lin et al. Table 2, arXiv:2305.08891):

    leading   i floor(T/n) + offset, i = n-1 .. 0        Diffusers; with offset 1 Stable Diffusion
    stride    i floor(T/n) + offset, all i below T/that    LDM's DDIM and PLMS with offset 1: more
                                                         than n where n does not divide T
    linspace  round(linspace(T-1, 0, n))                 both ends; Improved DDPM §4
    trailing  round(T - i T/n) - 1, i = 0 .. n-1         always starts at the last level
    uniform   round(linspace(T-1, 0, n+1)), last dropped   DPM-Solver's time_uniform
    open      i floor(T/(n+1)) + offset, i = n .. 1        "leading" in Diffusers' DPM-Solver, UniPC
    even      linspace(T-1, 0, n), not rounded            "linspace" in Diffusers' Euler and Heun

and for any schedule, as real times:

    karras    sigma/alpha = (max^(1/rho) + i/(n-1) (min^(1/rho) - max^(1/rho)))^rho
                                                          EDM eq. 5, arXiv:2206.00364
    exponential   log(sigma/alpha) uniform over n levels, both ends
    beta      min + q (max - min), q the quantiles of Beta(0.6, 0.6) at 1 .. 0; arXiv:2407.12173
    logsnr    logsnr uniform over n+1 levels, last dropped    DPM-Solver §3.3, arXiv:2206.00927

between the schedule's ends, or those of the spacing that is ``span``.

On continuous schedules linspace and uniform are those lines without rounding, and trailing is
uniform; rectified flow then shifts them, and its even is linspace(1, s, n) with s = 1/1000 (1 over
``time_scale``, where that is 100 at least) shifted, as Diffusers' flow-matching Euler has it. The
final level is ``clean`` (alpha = 1, sigma = 0; Diffusers' set_alpha_to_one), ``first`` (the
schedule's least noise, as LDM's alpha_bar[0] and DPM-Solver's t_0), or a time.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import betaincinv

from diffusion.process.schedules import Flow, Schedule

SPACINGS = (
    "leading",
    "linspace",
    "trailing",
    "uniform",
    "stride",
    "open",
    "even",
    "karras",
    "exponential",
    "beta",
    "logsnr",
)
LEVELS = ("karras", "exponential", "beta", "logsnr")

COUNTED = ("leading", "stride", "open")  # in whole steps from the least noise


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """``times`` (n,) evaluated; ``alpha``, ``sigma`` (n+1,), the last of them the final level.

    ``final_time`` is its time, NaN where it is clean data.
    """

    times: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    prior_std: float
    final_time: float

    @property
    def steps(self) -> int:
        return self.times.size

    @property
    def half_logsnr(self) -> np.ndarray:
        """lambda = log(alpha / sigma), (n+1,); +-inf where there is no noise or no signal."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)

    @property
    def ratio(self) -> np.ndarray:
        """sigma / alpha (n+1,), k-diffusion's sigma; inf where there is no signal."""
        with np.errstate(divide="ignore"):
            return self.sigma / self.alpha


def make_grid(
    schedule: Schedule,
    steps: int | None = None,
    *,
    final: str | float | int = "clean",
    times: Sequence | np.ndarray | None = None,
    prior: str = "unit",
    **spaced: Any,
) -> Grid:
    """The grid of ``steps`` evaluated times (50), ``spaced`` as in ``spaced_times``, or of exactly
    these ``times``.

    ``prior``: the first x of a variance-preserving schedule is unit noise, or with "level" only as
    much as its level has, as k-diffusion starts. Raises ValueError for unknown names, steps < 1,
    steps > T, and times that do not fall.
    """
    if times is None:
        times, steps = spaced_times(schedule, 50 if steps is None else steps, **spaced), None
    elif unknown := spaced.keys() - {"spacing", "steps_offset", "rho", "span"}:
        raise TypeError(f"a grid of given times has no {', '.join(sorted(unknown))}")
    times = _checked_times(schedule, np.asarray(times), steps)
    if prior not in ("unit", "level"):
        raise ValueError(f"prior={prior!r} is unknown: choose unit or level")
    unit = schedule.prior_std == 1 and prior == "unit"
    alpha, sigma, final_time = _final_level(schedule, final)
    if sigma > schedule.sigma(times[-1]):
        raise ValueError(
            f"final={final!r} has more noise (sigma {sigma}) than the last evaluated time "
            f"{times[-1]}: choose 'clean' or a smaller time"
        )
    return Grid(
        times=times,
        alpha=np.append(schedule.alpha(times), alpha),
        sigma=np.append(schedule.sigma(times), sigma),
        prior_std=1.0 if unit else float(schedule.sigma(times[0])),
        final_time=final_time,
    )


def spaced_times(
    schedule: Schedule,
    steps: int,
    *,
    spacing: str | None = None,
    steps_offset: int = 0,
    rho: float | int = 7.0,
    span: str = "",
) -> np.ndarray:
    """(steps,) times, noise first. ``spacing`` None is karras for EDM's schedule, uniform for other
    continuous ones, leading for discrete."""
    _check_steps(schedule, steps)
    spacing = spacing or default_spacing(schedule)
    if span and spacing not in LEVELS:
        raise ValueError(
            f"span={span!r} with spacing={spacing!r}: only {', '.join(LEVELS)} have one"
        )
    if spacing not in LEVELS:
        return _spaced(schedule, steps, spacing, steps_offset)
    ends = np.asarray(schedule.time_range)[::-1]
    if span:
        ends = _spaced(schedule, steps, span, steps_offset)[[0, -1]]
    return _by_level(schedule, steps, spacing, rho, ends)


def default_spacing(schedule: Schedule, discrete: str = "leading") -> str:
    """The habit of the schedule: ``discrete`` where it has steps, karras for EDM, else uniform."""
    if schedule.num_steps is not None:
        return discrete
    return "karras" if schedule.prior_std != 1 else "uniform"


def _check_steps(schedule: Schedule, steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps={steps}, but at least 1 step is needed: raise it")
    if schedule.num_steps is not None and steps > schedule.num_steps:
        raise ValueError(
            f"steps={steps}, but the schedule has only {schedule.num_steps} steps: choose at most "
            f"{schedule.num_steps}"
        )


def _spaced(schedule: Schedule, steps: int, spacing: str, offset: int) -> np.ndarray:
    if spacing not in SPACINGS:
        raise ValueError(f"spacing={spacing!r} is unknown: choose one of {', '.join(SPACINGS)}")
    if offset and spacing not in COUNTED:
        raise ValueError(
            f"steps_offset={offset} with spacing={spacing!r}, but only {', '.join(COUNTED)} have "
            "an offset: set it to 0"
        )
    if schedule.num_steps is not None:
        return _discrete(schedule.num_steps, steps, spacing, offset)
    if spacing in COUNTED:
        raise ValueError(
            f"spacing={spacing!r} counts steps, which {type(schedule).__name__} does not "
            "have: choose uniform, linspace, karras or logsnr"
        )
    low, high = schedule.time_range
    if spacing == "even" and isinstance(schedule, Flow):
        # A small time scale counts no steps: as of Diffusers' usual thousand there.
        low = schedule.shifted(1 / (schedule.time_scale if schedule.time_scale >= 100 else 1000))
    points = steps if spacing in ("linspace", "even") else steps + 1
    times = np.linspace(high, low, points)[:steps]
    return np.asarray(schedule.shifted(times)) if isinstance(schedule, Flow) else times


def _discrete(total: int, steps: int, spacing: str, offset: int) -> np.ndarray:
    if spacing == "leading":
        times = np.arange(steps)[::-1] * (total // steps) + offset
    elif spacing == "stride":
        times = np.arange(0, total, total // steps)[::-1] + offset
    elif spacing == "open":
        times = np.arange(1, steps + 1)[::-1] * (total // (steps + 1)) + offset
    elif spacing == "even":
        if steps == 1:
            raise ValueError(
                "steps=1 with spacing='even' is the last time alone, which has no noise to remove: "
                "take more, or trailing"
            )
        return np.linspace(total - 1, 0, steps)
    elif spacing == "linspace":
        times = np.round(np.linspace(total - 1, 0, steps))
    elif spacing == "trailing":
        times = np.round(total - np.arange(steps) * (total / steps)) - 1
    else:
        times = np.round(np.linspace(total - 1, 0, steps + 1))[:-1]
    return times.astype(np.int64)


def _by_level(
    schedule: Schedule, steps: int, spacing: str, rho: float | int, between: np.ndarray
) -> np.ndarray:
    """`between`: the first and the last time."""
    ends = np.array([float(schedule.logsnr(np.asarray(float(t)))) for t in between])
    if not np.all(np.isfinite(ends)):
        raise ValueError(
            f"spacing={spacing!r} needs a finite logsnr at both ends of the schedule, "
            f"which runs from {ends[0]} to {ends[1]}: choose uniform or trailing"
        )
    if spacing == "logsnr":
        return np.asarray(schedule.time(np.linspace(ends[0], ends[1], steps + 1)[:-1]))
    if spacing == "exponential":
        return np.asarray(schedule.time(np.linspace(ends[0], ends[1], steps)))
    largest, least = np.exp(-0.5 * ends)
    if spacing == "beta":
        level = least + betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, steps)) * (largest - least)
    else:
        largest, least = largest ** (1 / rho), least ** (1 / rho)
        level = (largest + np.linspace(0, 1, steps) * (least - largest)) ** rho
    return np.asarray(schedule.time(-2 * np.log(level)))


def _checked_times(schedule: Schedule, times: np.ndarray, steps: int | None) -> np.ndarray:
    if times.ndim != 1 or times.size == 0 or (steps is not None and times.size != steps):
        raise ValueError(
            f"times of shape {times.shape} with steps={steps}, but there must be one "
            "time a step: leave one of the two out"
        )
    low, high = schedule.time_range
    # EDM's times are levels: any positive one is in the schedule, TrigFlow's to pi / 2.
    inside = times.min() >= low
    if schedule.prior_std != 1:
        inside = np.all(times > 0) and schedule.alpha(times.max()) >= 0
    if not inside or (schedule.prior_std == 1 and times.max() > high):
        raise ValueError(
            f"times={times[0]} .. {times[-1]} leave the schedule's {low} .. {high}: lower "
            "steps_offset or choose times inside"
        )
    rising = np.flatnonzero(np.diff(times) >= 0)
    if rising.size:
        raise ValueError(
            f"times must decrease strictly, but {times[rising[0]]} is followed by "
            f"{times[rising[0] + 1]} among {len(times)}: lower steps or choose another spacing"
        )
    integral = np.all(times == np.round(times)) and schedule.num_steps is not None
    return times.astype(np.int64 if integral else np.float64)


def _final_level(schedule: Schedule, final: str | float | int) -> tuple[float, float, float]:
    """(alpha, sigma, t) of the final level."""
    if final == "clean":
        return 1.0, 0.0, float("nan")
    if final == "first":
        final = schedule.time_range[0]
    if isinstance(final, str):
        raise ValueError(f"final={final!r} is unknown: choose clean, first or a time")
    t = np.asarray(float(final))
    return float(schedule.alpha(t)), float(schedule.sigma(t)), float(t)
