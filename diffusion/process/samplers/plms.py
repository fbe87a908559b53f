r"""PNDM and PLMS: linear multistep on the noise estimate (arXiv:2202.09778).

The transfer from level t to s with noise estimate e (PNDM eq. 11, an Euler step in sigma/alpha) is

    phi(x, e, t, s) = alpha_s/alpha_t x + (sigma_s - alpha_s sigma_t/alpha_t) e                (1)

and the steps apply it to a better e', e_k the estimates of earlier steps (PNDM eq. 12, Adams and
Bashforth for equal steps in t):

    e' = (55 e - 59 e_1 + 37 e_2 - 9 e_3)/24                                                   (2)

"pndm" makes its first three steps by pseudo Runge-Kutta (PNDM eq. 13, four evaluations each, at t,
twice half-way and at s). "plms", as LDM and Stable Diffusion sample, starts with a pseudo improved
Euler step, e' = (e(x_t, t) + e(phi(x_t, e, t, s), s))/2, then (3 e - e_1)/2 and
(23 e - 16 e_1 + 5 e_2)/12. Both converge with order 2 (PNDM Theorem 3.1): (2) averages e over
t, where (1) wants its average over sigma/alpha.
"""

import numpy as np
from jaxtyping import Array

from diffusion.process.samplers.base import Evaluate, Memory, Row, Sampler, finite, need_signal
from diffusion.process.samplers.grid import Grid, make_grid
from diffusion.process.schedules import Schedule

# Weights on (e, e_1, e_2, e_3, sum of a Runge-Kutta step's earlier stages).
EULER = [1.0, 0, 0, 0, 0]
IMPROVED_EULER = [1 / 2, 1 / 2, 0, 0, 0]
ADAMS_BASHFORTH = [
    EULER,
    [3 / 2, -1 / 2, 0, 0, 0],
    [23 / 12, -16 / 12, 5 / 12, 0, 0],
    [55 / 24, -59 / 24, 37 / 24, -9 / 24, 0],
]
RUNGE_KUTTA_STAGES = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


def plms(schedule: Schedule, steps: int | None = None, **options) -> Sampler:
    """PLMS, ``steps`` + 1 evaluations. ``options`` go to ``grid.make_grid``.

    Stable Diffusion's: ``steps_offset=1, final="first"``. ValueError where the first level has no
    signal.
    """
    grid = make_grid(schedule, steps, **options)
    need_signal(grid, "plms")
    rows: list[dict] = []
    for i in range(grid.steps):
        if i == 1:
            rows[0]["end"] = False
            rows.append(transfer(grid, schedule, 0, 1, IMPROVED_EULER, at=1, push=False))
        rows.append(transfer(grid, schedule, i, i + 1, ADAMS_BASHFORTH[min(i, 3)]))
    return assemble(grid, rows)


def pndm(schedule: Schedule, steps: int | None = None, **options) -> Sampler:
    """F-PNDM, ``steps`` + 9 evaluations, at least 4 steps. ``options`` go to ``grid.make_grid``.

    Half-way times may be fractional; where T // n is odd, Diffusers evaluates half a time earlier
    and steps to the level of half a time later (8 steps of 1000: 2.5e-4 of the result). ValueError
    below 4 steps and without signal at the start.
    """
    grid = make_grid(schedule, steps, **options)
    need_signal(grid, "pndm")
    if grid.steps < 4:
        raise ValueError(
            f"steps={grid.steps}, but pndm makes 3 Runge-Kutta steps first and needs at "
            "least 4: raise it or use plms"
        )
    rows = [row for i in range(3) for row in _runge_kutta(grid, schedule, i)]
    rows += [transfer(grid, schedule, i, i + 1, ADAMS_BASHFORTH[3]) for i in range(3, grid.steps)]
    return assemble(grid, rows)


def _runge_kutta(grid: Grid, schedule: Schedule, i: int) -> list[dict]:
    half, whole = i + 0.5, i + 1
    last = [RUNGE_KUTTA_STAGES[3], 0, 0, 0, 1.0]
    stages = [
        transfer(grid, schedule, i, half, EULER, at=i),
        transfer(grid, schedule, i, half, EULER, at=half, push=False),
        transfer(grid, schedule, i, whole, EULER, at=half, push=False),
        transfer(grid, schedule, i, whole, last, at=whole, push=False),
    ]
    for k, (row, gain) in enumerate(zip(stages, RUNGE_KUTTA_STAGES)):
        row.update(gain=gain, keep=float(k > 0), end=k == 3)
    return stages


def _level(grid: Grid, schedule: Schedule, place: float | int) -> tuple[float, float, float]:
    """(t, alpha, sigma) at a grid place; a half lies between two evaluated times."""
    i = int(place)
    if place == i:
        t = float(grid.times[i]) if i < grid.steps else np.nan
        return t, grid.alpha[i], grid.sigma[i]
    t = 0.5 * float(grid.times[i] + grid.times[i + 1])
    return t, float(schedule.alpha(np.asarray(t))), float(schedule.sigma(np.asarray(t)))


def transfer(
    grid: Grid,
    schedule: Schedule,
    source: int,
    target: float | int,
    weights: list,
    at: float | int | None = None,
    push: bool = True,
) -> dict:
    """Evaluate at place ``at`` (the source), and transfer from ``source`` to ``target`` (eq. 1)."""
    t, alpha, sigma = _level(grid, schedule, source if at is None else at)
    _, alpha_t, sigma_t = _level(grid, schedule, source)
    _, alpha_s, sigma_s = _level(grid, schedule, target)
    return {
        "t": t,
        "index": source,
        "alpha": alpha,
        "sigma": sigma,
        "x": alpha_s / alpha_t,
        "e": sigma_s - alpha_s * sigma_t / alpha_t,
        "weights": weights,
        "push": push,
        "gain": 0.0,
        "keep": 0.0,
        "end": True,
    }


def assemble(grid: Grid, rows: list[dict]) -> Sampler:
    """The sampler of rows made by `transfer`."""
    table = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    if np.issubdtype(grid.times.dtype, np.integer) and np.all(table["t"] % 1 == 0):
        table["t"] = table["t"].astype(np.int64)
    finite(table)
    return Sampler(
        rows=table,
        step=_step,
        start=lambda x: (x, *(x * 0,) * 4),
        ends=np.flatnonzero(table["end"]),
        prior_std=grid.prior_std,
    )


def _step(
    evaluate: Evaluate, x: Array, memory: Memory, row: Row, noise: None
) -> tuple[Array, Memory]:
    """Memory: x at the step's source, e_1, e_2, e_3, and the Runge-Kutta sum."""
    base, *past, total = memory
    x0, _ = evaluate(x, row["t"])
    e = (x - row["alpha"] * x0) / row["sigma"]
    better = row["weights"][0] * e + row["weights"][4] * total
    for weight, estimate in zip(row["weights"][1:4], past):
        better = better + weight * estimate
    out = row["x"] * base + row["e"] * better
    base = row["end"] * out + (1 - row["end"]) * base
    pushed = (e, past[0], past[1])
    past = [row["push"] * new + (1 - row["push"]) * old for new, old in zip(pushed, past)]
    return out, (base, *past, row["keep"] * total + row["gain"] * e)
