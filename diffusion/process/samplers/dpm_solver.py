r"""DPM-Solver++, multistep (arXiv:2211.01095): 2M, 3M and SDE-2M.

In lambda = log(alpha/sigma) the probability-flow ODE, with D(x, t) the x_0 estimate, is solved by

    x_s = (sigma_s/sigma_t) x_t + sigma_s int_{lambda_t}^{lambda_s} e^lambda D dlambda
                                                                       (1), DPM-Solver++ eq. 8

Let h = lambda_s - lambda_t, D_0 the estimate here, D_1, D_2 those at the two levels before, at
distances h r_0 and h (r_0 + r_1). D expanded about lambda_t in u = (lambda - lambda_t)/h,

    D = D_0 + u D' + u^2/2 D'',   int: alpha_s (p_1 D_0 + p_2 D' + p_3 D''),                  (2)
    p_1 = 1 - e^{-h},   p_2 = 1 - p_1/h,   p_3 = 1/2 - p_2/h,

gives order 1 (DDIM), order 2 with D' = (D_0 - D_1)/r_0, and order 3 with

    a = (D_0 - D_1)/r_0,   b = (D_1 - D_2)/r_1,
    D' = a + r_0/(r_0 + r_1) (a - b),   D'' = 2 (a - b)/(r_0 + r_1).                          (3)

Two habits of the authors' code are kept: 2M takes p_1/2 for p_2 (its Algorithm 2, "midpoint"; they
agree to the order of the method), and 3M takes (a - b)/(r_0 + r_1), half of D''. The half leaves an
error of the third order in one step, so that 3M as published converges with order 2, with a smaller
constant; ``exact=True`` takes D'' whole and converges with order 3.

The reverse SDE (their eq. 19-20), with q_1 = 1 - e^{-2h}, is solved by

    x_s = (sigma_s/sigma_t) e^{-h} x_t + alpha_s q_1 (D_0 + (D_0 - D_1)/(2 r_0))
          + sigma_s sqrt(q_1) z                                                               (4)

Orders rise as estimates arrive and fall at the end (``lower_order_final``): the step to clean data
has infinite h and is of order 1; below 15 steps the last is of order 1 wherever it leads and the
one before of order at most 2. A first level without signal has infinite h too; the limits hold.
"""

import numpy as np

from diffusion.process.samplers.base import Sampler, linear
from diffusion.process.samplers.grid import Grid, default_spacing, make_grid
from diffusion.process.schedules import Schedule


def dpmpp_2m(schedule: Schedule, steps: int | None = None, *, order: int = 2, **options) -> Sampler:
    """DPM-Solver++(2M), Algorithm 2. Options as ``dpmpp``."""
    return dpmpp(schedule, steps, order=order, **options)


def dpmpp_3m(schedule: Schedule, steps: int | None = None, **options) -> Sampler:
    """DPM-Solver++(3M). Options as ``dpmpp``."""
    return dpmpp(schedule, steps, order=3, **options)


def dpmpp_2m_sde(
    schedule: Schedule, steps: int | None = None, *, order: int = 2, **options
) -> Sampler:
    """SDE-DPM-Solver++(2M), eq. 4. Options as ``dpmpp``."""
    return dpmpp(schedule, steps, order=order, sde=True, **options)


def dpmpp(
    schedule: Schedule,
    steps: int | None = None,
    *,
    order: int = 2,
    sde: bool = False,
    exact: bool = False,
    lower_order_final: bool = True,
    spacing: str | None = None,
    **options,
) -> Sampler:
    """Multistep DPM-Solver++ of ``order`` 1 to 3; ``sde`` is eq. 4, of order 1 or 2.

    ``exact`` takes D'' of eq. 3 whole. ``spacing`` None is uniform for discrete schedules;
    ``options`` go to ``grid.make_grid``. Raises ValueError for an order it does not have.
    """
    if order not in (1, 2, 3) or (sde and order == 3):
        raise ValueError(
            f"order={order} with sde={sde}, but the orders are 1, 2, 3, and 1, 2 for the "
            "SDE: choose 2"
        )
    spacing = spacing or default_spacing(schedule, "uniform")
    grid = make_grid(schedule, steps, spacing=spacing, **options)
    orders = step_orders(grid, order, lower_order_final)
    weights = np.stack([_weights(grid, i, p, order, sde, exact) for i, p in enumerate(orders)])
    decay = grid.sigma[1:] / grid.sigma[:-1]
    if not sde:
        return linear(grid, decay, weights)
    shrink = np.exp(-np.diff(grid.half_logsnr))
    noise = grid.sigma[1:] * np.sqrt(1 - shrink**2)
    return linear(grid, decay * shrink, weights, noise)


def step_orders(grid: Grid, order: int, lower_order_final: bool) -> list[int]:
    """The order of each step: rising from 1, and falling at the end (module docstring)."""
    n = grid.steps
    orders = [min(order, i + 1) for i in range(n)]
    lower = lower_order_final and n < 15
    if lower or grid.sigma[-1] == 0:
        orders[-1] = 1
    if lower and n > 1:
        orders[-2] = min(orders[-2], 2)
    return orders


def _weights(grid: Grid, i: int, order: int, width: int, sde: bool, exact: bool) -> np.ndarray:
    """What multiplies D_0, D_1, D_2 in step i (eq. 2-4), (width,)."""
    lam = grid.half_logsnr
    h = lam[i + 1] - lam[i]
    p1 = -np.expm1(-2 * h) if sde else -np.expm1(-h)
    out = np.zeros(width)
    out[0] = p1
    if order > 1:
        a = np.array([1.0, -1.0, 0.0]) * h / (lam[i] - lam[i - 1])
    if order == 2:
        out[:2] += p1 / 2 * a[:2]
    if order == 3:
        r0, r1 = (lam[i] - lam[i - 1]) / h, (lam[i - 1] - lam[i - 2]) / h
        bend = a - np.array([0.0, 1.0, -1.0]) / r1
        p2 = 1 - p1 / h
        p3 = 0.5 - p2 / h
        out += p2 * (a + r0 / (r0 + r1) * bend)
        out += p3 * (2 if exact else 1) * bend / (r0 + r1)
    return grid.alpha[i + 1] * out
