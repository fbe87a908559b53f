r"""UniPC, multistep, data prediction (arXiv:2302.04867).

With lambda, h, D_0 as in ``dpm_solver``, and r_k = (lambda_{-k} - lambda_t)/h for the k-th level
before, the predictor UniP-p and the corrector UniC-p of the step from t to s are

    x_s  = (sigma_s/sigma_t) x_t + alpha_s (1 - e^{-h}) D_0
           - alpha_s B sum_{k<p} rho_k (D_k - D_0)/r_k                            (1), UniP
    x_s^c = .. - alpha_s B [ sum_{k<p} rho'_k (D_k - D_0)/r_k + rho'_p (D_s - D_0) ]  (2), UniC

where D_s = D(x_s, s) is the evaluation that the next predictor needs anyway: one evaluation a step.
B is e^{-h} - 1 (bh2) or -h (bh1). The weights solve, with r_p = 1,

    sum_k rho_k r_k^{j-1} = j! phi_j / B,   j = 1 .. p-1 (rho), 1 .. p (rho'),          (3), eq. 5-9
    phi_1 = (e^{-h} - 1)/(-h) - 1,  phi_j = phi_{j-1}/(-h) - 1/j!

except that rho = 1/2 for UniP-2 and rho' = 1/2 for UniC-1, as the authors simplify. UniPC-p
converges with order p + 1. Orders rise as estimates arrive and, with ``lower_order_final``, fall to
1 at the end. A first level without signal is left out of (3), where its r is infinite.
"""

import math

import numpy as np
from jaxtyping import Array

from diffusion.process.samplers.base import Evaluate, Memory, Row, Sampler, finite
from diffusion.process.samplers.grid import Grid, default_spacing, make_grid
from diffusion.process.schedules import Schedule


def unipc(
    schedule: Schedule,
    steps: int | None = None,
    *,
    order: int = 2,
    variant: str = "bh2",
    lower_order_final: bool = True,
    spacing: str | None = None,
    **options,
) -> Sampler:
    """UniPC of ``order`` p in 1..3 (2 guided, 3 unconditional), ``variant`` bh1 or bh2.

    ``spacing`` None is uniform for discrete schedules; ``options`` go to ``grid.make_grid``.
    Raises ValueError for other orders and variants, and for bh1 where a step is infinite.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order={order}, but UniPC here has orders 1, 2, 3: choose 2")
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"variant={variant!r} is unknown: choose bh1 or bh2")
    spacing = spacing or default_spacing(schedule, "uniform")
    grid = make_grid(schedule, steps, spacing=spacing, **options)
    orders = _orders(grid, order, lower_order_final)
    rows = {"t": grid.times, "index": np.arange(grid.steps)}
    rows["x"] = grid.sigma[1:] / grid.sigma[:-1]
    predict = [_weights(grid, i, p, variant, False) for i, p in enumerate(orders)]
    correct = [np.zeros(4)] + [
        _weights(grid, i, p, variant, True) for i, p in enumerate(orders[:-1])
    ]
    rows["predict"], rows["correct"] = np.stack(predict)[:, 1:], np.stack(correct)
    rows["last"] = np.append(0.0, rows["x"][:-1])
    rows["first"] = np.arange(grid.steps) == 0
    finite(rows)
    return Sampler(
        rows=rows,
        step=_step,
        start=lambda x: (x * 0,) * 4,
        ends=np.arange(grid.steps),
        prior_std=grid.prior_std,
    )


def _orders(grid: Grid, order: int, lower_order_final: bool) -> list[int]:
    n = grid.steps
    known = np.cumsum(np.isfinite(grid.half_logsnr[:-1]))
    orders = [max(1, min(order, int(known[i]))) for i in range(n)]
    if lower_order_final:
        return [min(p, n - i) for i, p in enumerate(orders)]
    return [*orders[:-1], 1] if grid.sigma[-1] == 0 else orders


def _weights(grid: Grid, i: int, order: int, variant: str, corrector: bool) -> np.ndarray:
    """What multiplies D_s, D_0, D_1, D_2 in step i (eq. 1, or 2 with ``corrector``), (4,)."""
    lam = grid.half_logsnr
    h = lam[i + 1] - lam[i]
    big = -h if variant == "bh1" else np.expm1(-h)
    out = np.array([0.0, -np.expm1(-h), 0.0, 0.0])
    r = [(lam[i - k] - lam[i]) / h for k in range(1, order)]
    nodes = np.array([*r, 1.0] if corrector else r)
    for k, (node, rho) in enumerate(zip(nodes, _rho(nodes, order, h, big, corrector)), start=1):
        place = 0 if corrector and k == order else k + 1
        out[place] -= big * rho / node
        out[1] += big * rho / node
    return grid.alpha[i + 1] * out


def _rho(nodes: np.ndarray, order: int, h: float, big: float, corrector: bool) -> np.ndarray:
    """Eq. 3."""
    if nodes.size == 0:
        return nodes
    if order == (1 if corrector else 2):
        return np.array([0.5])
    phi, right = np.expm1(-h) / -h - 1, []
    for j in range(1, nodes.size + 1):
        right.append(math.factorial(j) * phi / big)
        phi = phi / -h - 1 / math.factorial(j + 1)
    return np.linalg.solve(nodes[None, :] ** np.arange(nodes.size)[:, None], np.array(right))


def _step(
    evaluate: Evaluate, x: Array, memory: Memory, row: Row, noise: None
) -> tuple[Array, Memory]:
    """Correct the x that was predicted for this level, then predict the next."""
    last, d1, d2, d3 = memory
    d0, _ = evaluate(x, row["t"])
    corrected = row["last"] * last
    for weight, estimate in zip(row["correct"], (d0, d1, d2, d3)):
        corrected = corrected + weight * estimate
    x = row["first"] * x + (1 - row["first"]) * corrected
    out = row["x"] * x
    for weight, estimate in zip(row["predict"], (d0, d1, d2)):
        out = out + weight * estimate
    return out, (x, d0, d1, d2)
