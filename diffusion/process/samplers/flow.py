r"""Samplers of rectified flow: SiT's SDE (arXiv:2401.08740), Dormand and Prince's adaptive ODE.

On alpha = 1 - t, sigma = t, with e = (x - alpha D)/sigma, the velocity is u = e - D and the score
-e/sigma. For any diffusion w(t) >= 0, x_t has the same marginals (SiT eq. 6, time running down)

    dx = (u + w e/sigma) dt + sqrt(2 w) dW                                                     (1)

with w = 0 the ODE. Euler-Maruyama from t to s, h = t - s:

    x' = x - h (u + w e/sigma) + sqrt(2 w h) z                                                 (2)

The authors' w (`willisma/SiT: transport/`; their time is 1 - t): "sigma" t, which is their
"linear" as well; "constant" 1; "sbdm" t/(1 - t); "decreasing" (1 - n cos(pi t))^2 / 4;
"increasing-decreasing" sin(pi t)^2; each but the fifth times the norm n. Their grid for n steps is
n times from 1 to `last_step_size`, the step from there to 0 without noise: "mean" is (2) less its
noise, "euler" that of the ODE, whose end is D.

Dormand and Prince's pair (1980; Hairer, Norsett, Wanner, table 5.2) estimates each step's error
and chooses the next. Each example has steps of its own, so that a batch does not change it. D being
what a network is asked for, u is 0/0 at t = 0: the last evaluation is at `final_time`, where x is
replaced by D, an error of order final_time^2.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion.process.gaussian import expand
from diffusion.process.samplers.base import Sampler, linear
from diffusion.process.samplers.grid import Grid, make_grid
from diffusion.process.schedules import Flow, Schedule

DIFFUSIONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "sigma": lambda t, n: n * t,
    "constant": lambda t, n: n + 0 * t,
    "sbdm": lambda t, n: n * t / (1 - t),
    "decreasing": lambda t, n: 0.25 * (1 - n * np.cos(np.pi * t)) ** 2,
    "increasing-decreasing": lambda t, n: n * np.sin(np.pi * t) ** 2,
}


def _need_flow(schedule: Schedule, sampler: str) -> Flow:
    if not isinstance(schedule, Flow):
        raise ValueError(
            f"sampler={sampler!r} is of rectified flow's path, but the schedule is "
            f"{type(schedule).__name__}: use process.schedule.name='flow', or heun"
        )
    return schedule


def euler_maruyama(
    schedule: Schedule,
    steps: int | None = None,
    *,
    diffusion: str = "sigma",
    norm: float | int = 1.0,
    last: str = "mean",
    last_step_size: float | int = 0.04,
    times: Any = None,
) -> Sampler:
    """Eq. 2; SiT's published settings are 250 steps and the defaults.

    `times`: exactly these, and then 0. ValueError for a schedule that is no flow, unknown names,
    and a diffusion that is infinite at the first time ("sbdm" from t = 1).
    """
    flow = _need_flow(schedule, "euler_maruyama")
    for key, value, known in (("diffusion", diffusion, DIFFUSIONS), ("last", last, _LASTS)):
        if value not in known:
            raise ValueError(f"{key}={value!r} is unknown: choose one of {', '.join(known)}")
    if not 0 < last_step_size < 1 or norm < 0:
        raise ValueError(
            f"last_step_size={last_step_size}, norm={norm}, but the first must lie in (0, 1) and "
            "the second be 0 (the ODE) or more: SiT's are 0.04 and 1"
        )
    if times is None:
        steps = 250 if steps is None else steps
        times = np.linspace(1.0, last_step_size, steps) if steps != 1 else np.ones(1)
        times = flow.shifted(times)
    grid = make_grid(schedule, times=times)
    t, h = grid.times.astype(np.float64), grid.sigma[:-1] - grid.sigma[1:]
    if diffusion == "sbdm" and t[0] == 1:
        raise ValueError(
            "diffusion='sbdm' is infinite at t = 1: choose sigma, or start at a smaller time"
        )
    w = DIFFUSIONS[diffusion](t, float(norm))
    noise = np.sqrt(2 * w * h)
    noise[-1] = 0.0
    w = np.append(w[:-1], w[-1] * (last == "mean"))
    slope = h * (1 + w / t) / t  # of e t
    return linear(grid, 1 - slope, (h + slope * (1 - t))[:, None], noise)


_LASTS = ("mean", "euler")


# -- the adaptive ODE ----------------------------------------------------------------------------

NODES = (0.0, 0.2, 0.3, 0.8, 8 / 9, 1.0, 1.0)
TABLEAU = (  # the last row is the solution of order 5, and the first stage of the next step
    (0.0,),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
FIRST_STEP, SAFETY, SHRINK, GROW = 0.01, 0.9, 0.2, 10.0


@dataclasses.dataclass(frozen=True, eq=False)
class Dopri5(Sampler):
    """From `rows["t"][0]` down; its rows say no more than how many steps an example may take."""

    rtol: float = 1e-3
    atol: float = 1e-6
    final_time: float = 1e-3

    @property
    def evaluations(self) -> int:
        """At most."""
        return 1 + 6 * self.steps

    def integrate(self, evaluate: Callable[[Array, Array], Array], x: Array) -> Array:
        """x_0 by one `while_loop`, an evaluation a turn; NaN where the steps did not suffice."""
        rows = np.array([[*row, *[0.0] * (7 - len(row))] for row in TABLEAU])
        tableau, nodes = (jnp.asarray(a, x.dtype) for a in (rows, NODES))

        def advance(carry: tuple) -> tuple:
            count, stage, x, t, h, slopes, x0 = carry
            left = t - self.final_time
            done, step = left <= 0, jnp.minimum(h, left)
            at = x - expand(step, x) * jnp.tensordot(tableau[stage], slopes, 1)
            time = expand(t - nodes[stage] * step, x)
            found = evaluate(at, time.reshape(len(x)))
            slope = (at - (1 - time) * found) / time - found
            slopes = slopes.at[stage].set(slope)
            ratio = self._ratio(step, slopes, x, at)
            good = (ratio <= 1) & ~done & (stage == 6)
            factor = jnp.clip(SAFETY * jnp.maximum(ratio, 1e-10) ** -0.2, SHRINK, GROW)
            factor = jnp.where(good, jnp.maximum(factor, 1.0), factor)
            factor = jnp.where(jnp.isfinite(ratio), factor, SHRINK)
            h = jnp.where((stage == 6) & ~done, step * factor, h)
            # Not t - step: the last step ends where it should, to the bit.
            t = jnp.where(good, jnp.where(step < left, t - step, self.final_time), t)
            taken = expand(good, x) != 0
            x, x0 = jnp.where(taken, at, x), jnp.where(taken, found, x0)
            slopes = slopes.at[0].set(jnp.where(taken, slope, slopes[0]))
            return count + 1, jnp.where(stage == 6, 1, stage + 1), x, t, h, slopes, x0

        def unfinished(carry: tuple) -> Array:
            return (carry[0] < self.evaluations) & jnp.any(carry[3] > self.final_time)

        t, zero = jnp.full(len(x), self.rows["t"][0], x.dtype), jnp.zeros((), jnp.int32)
        h = FIRST_STEP * (t - self.final_time)
        first = (zero, zero, x, t, h, jnp.zeros((7, *x.shape), x.dtype), x)
        _, _, _, t, _, _, x0 = jax.lax.while_loop(unfinished, advance, first)
        return jnp.where(expand(t > self.final_time, x0) != 0, jnp.nan, x0)

    def _ratio(self, step: Array, slopes: Array, old: Array, new: Array) -> Array:
        """The estimated error of a step in units of the tolerance, (batch,)."""
        error = expand(step, old) * jnp.tensordot(jnp.asarray(ERROR, old.dtype), slopes, 1)
        scale = self.atol + self.rtol * jnp.maximum(jnp.abs(old), jnp.abs(new))
        return jnp.sqrt(jnp.mean((error / scale).reshape(len(old), -1) ** 2, axis=1))


def dopri5(
    schedule: Schedule,
    steps: int | None = None,
    *,
    rtol: float | int = 1e-3,
    atol: float | int = 1e-6,
    final_time: float | int = 1e-3,
    times: Any = None,
) -> Sampler:
    """SiT's ODE sampler, with its tolerances; `steps` (50): the most that an example may try.

    `times`: begins at the first, with as many steps. ValueError for a schedule that is no flow and
    for tolerances or an end that are none.
    """
    _need_flow(schedule, "dopri5")
    if not (rtol > 0 and atol >= 0 and 0 < final_time < 1):
        raise ValueError(
            f"rtol={rtol}, atol={atol}, final_time={final_time}, but rtol must be above 0, atol 0 "
            "or more and final_time within (0, 1): SiT's are 1e-3 and 1e-6; the end here 1e-3"
        )
    grid: Grid = make_grid(schedule, None if times is not None else steps or 50, times=times)
    if grid.times[0] <= final_time:
        raise ValueError(f"final_time={final_time} is not below the first time {grid.times[0]}")
    return Dopri5(
        rows={"t": grid.times.astype(np.float64), "index": np.arange(grid.steps)},
        step=_never,
        start=lambda x: (),
        ends=np.arange(grid.steps),
        prior_std=grid.prior_std,
        rtol=float(rtol),
        atol=float(atol),
        final_time=float(final_time),
    )


def _never(*_: Any) -> Any:
    raise AssertionError("an adaptive sampler has no fixed rows to step by")
