r"""What a sampler is, and the one loop that runs every sampler.

A sampler is a table of coefficients, one row per evaluation of the denoiser, computed in float64
NumPy when it is made, and a pure ``step`` that applies one row. ``sample`` runs the rows under one
``lax.scan``: the denoiser is traced and compiled once, however many steps or stages there are.
Most samplers are linear in what they have seen,

    x' = c_x x + c_0 D(x, t) + c_1 D_1 + c_2 D_2 + .. + c_z z                                 (1)

with D the x_0 estimate of this evaluation, D_1, D_2 those of earlier ones and z unit noise; a
module per family derives the coefficients.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from diffusion.process import gaussian
from diffusion.process.keys import normal, stream
from diffusion.process.samplers.grid import Grid

Row = Mapping[str, Any]
Memory = tuple[Array, ...]
# evaluate(x, t[, s]) -> (x_0 estimate, variance output or None); t, s are numbers of the row
Evaluate = Callable[..., tuple[Array, Any]]
Step = Callable[[Evaluate, Array, Memory, Row, Any], tuple[Array, Memory]]


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """``rows``: arrays (evaluations, ...), with "t" the time and "index" the step of each.

    ``ends``: (steps,) the rows that finish a step. ``start(x)`` is the memory before the first row.
    ``prior_std`` scales unit noise into the first x.
    """

    rows: dict[str, np.ndarray]
    step: Step
    start: Callable[[Array], Memory]
    ends: np.ndarray
    prior_std: float
    stochastic: bool = False
    learned_variance: bool = False

    @property
    def steps(self) -> int:
        return self.ends.size

    @property
    def evaluations(self) -> int:
        """Network evaluations of one run (NFE)."""
        return self.rows["t"].shape[0]


def step_noise(keys: Key[Array, "batch"], index: Any, like: Array) -> Array:
    """The unit noise of step ``index``, like ``like``: from fold_in(keys[i], index)."""
    return normal(stream(keys, index), like.shape, like.dtype)


def sample(
    sampler: Sampler,
    denoise: gaussian.Denoise,
    x: Float[Array, "batch *shape"],
    keys: Key[Array, "batch"],
    trajectory: bool = False,
) -> Any:
    """x_0 (batch, ...) from x, the initial noise already times ``sampler.prior_std``.

    denoise(x_t, t (batch,)) -> x_0 estimate, or (x_0, variance output). ``keys`` give each
    example's step noise. With ``trajectory``, (x_0, xs) with xs (steps+1, batch, ...), x first.
    An adaptive sampler has ``integrate`` in place of rows. Raises ValueError where a learned
    variance is asked of a denoiser that has none, or an adaptive sampler for its trajectory.
    """

    def evaluate(x_t: Array, *times: Any) -> tuple[Array, Any]:
        out = denoise(x_t, *[jnp.broadcast_to(t, x_t.shape[:1]) for t in times])
        x0, variance = out if isinstance(out, tuple) else (out, None)
        if sampler.learned_variance and variance is None:
            raise ValueError(
                "variance='learned' needs a network with a variance output, but this "
                "denoise returns x0 alone: choose fixed_large or fixed_small"
            )
        return x0.astype(x_t.dtype), variance

    if (integrate := getattr(sampler, "integrate", None)) is not None:
        if trajectory:
            raise ValueError("sampler='dopri5' chooses its steps, and keeps none: use heun")
        return integrate(lambda x_t, t: evaluate(x_t, t)[0], x)

    def body(carry: tuple[Array, Memory], row: Row) -> tuple[tuple[Array, Memory], Any]:
        x_t, memory = carry
        noise = step_noise(keys, row["index"], x_t) if sampler.stochastic else None
        x_t, memory = sampler.step(evaluate, x_t, memory, row, noise)
        return (x_t, memory), (x_t if trajectory else None)

    rows = {name: _cast(table, x.dtype) for name, table in sampler.rows.items()}
    (x0, _), xs = jax.lax.scan(body, (x, sampler.start(x)), rows)
    if not trajectory:
        return x0
    return x0, jnp.concatenate([x[None], xs[sampler.ends]])


def estimates(sampler: Sampler, denoise: gaussian.Denoise, xs: Array) -> Array:
    """x_0 as estimated from each x_t of a trajectory but its last: (steps, batch, ...)."""
    begins = np.append(0, sampler.ends[:-1] + 1)
    rows = {**sampler.rows, "t": sampler.rows.get("begin", sampler.rows["t"])}
    rows["t"] = rows["t"].astype(sampler.rows["t"].dtype)
    times = [_cast(rows[name][begins], xs.dtype) for name in ("t", "s") if name in rows]

    def one(row: Any) -> Array:
        x_t, *at = row
        out = denoise(x_t, *[jnp.broadcast_to(t, x_t.shape[:1]) for t in at])
        return (out[0] if isinstance(out, tuple) else out).astype(x_t.dtype)

    return jax.lax.map(one, (xs[:-1], *times))


def _cast(table: np.ndarray, dtype: Any) -> Array:
    """Floats to the samples' dtype, integers to int32, flags as they are."""
    if np.issubdtype(table.dtype, np.floating):
        return jnp.asarray(table.astype(dtype))
    return jnp.asarray(table if table.dtype == bool else table.astype(np.int32))


def linear_step(evaluate: Evaluate, x: Array, memory: Memory, row: Row, noise: Any):
    """Eq. 1; a row with "s" asks for the x_0 of the jump to s."""
    x0, _ = evaluate(x, *[row[name] for name in ("t", "s") if name in row])
    seen = (x0, *memory)
    out = row["x"] * x
    for i, estimate in enumerate(seen):
        out = out + row["x0"][i] * estimate
    if noise is not None:
        out = out + row["noise"] * noise
    return out, seen[: len(memory)]


def linear(grid: Grid, x: np.ndarray, x0: np.ndarray, noise: np.ndarray | None = None) -> Sampler:
    """The sampler of eq. 1: ``x`` (n,), ``x0`` (n, 1 + memory), ``noise`` (n,) or None."""
    stochastic = noise is not None and bool(np.any(noise))
    rows = {"t": grid.times, "index": np.arange(grid.steps), "x": x, "x0": x0}
    if stochastic:
        rows["noise"] = noise
    finite(rows)
    return Sampler(
        rows=rows,
        step=linear_step,
        start=lambda x_t: (jnp.zeros_like(x_t),) * (x0.shape[1] - 1),
        ends=np.arange(grid.steps),
        prior_std=grid.prior_std,
        stochastic=stochastic,
    )


def finite(rows: dict[str, np.ndarray]) -> None:
    """ValueError where a coefficient is not finite: the schedule's ends do not suit the sampler."""
    for name, table in rows.items():
        bad = np.flatnonzero(
            ~np.isfinite(np.asarray(table, np.float64)).reshape(len(table), -1).all(1)
        )
        if bad.size:
            raise ValueError(
                f"the coefficient {name!r} of step {bad[0]} is not finite, since "
                "the schedule has no signal or no noise there: use ddim, or times inside the range"
            )


def need_signal(grid: Grid, sampler: str) -> None:
    """ValueError where the first level has alpha = 0, for samplers that work in sigma / alpha."""
    if grid.alpha[0] == 0:
        raise ValueError(
            f"{sampler} works in sigma/alpha, which is infinite at the first "
            f"time {grid.times[0]} of this schedule (zero terminal SNR): use ddim or dpmpp_2m, "
            "or start at a smaller time"
        )
