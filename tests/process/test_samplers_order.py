"""Convergence of every deterministic sampler on a problem whose solution is known.

In one dimension the probability-flow ODE keeps the distribution function: F_t(x_t) is constant, and
for Gaussian-mixture data F_t is known. So exact states exist at every time, without a solver; from
them a multistep sampler is given its exact past, and its order is the theory's. The production
start (first steps of low order) is measured beside it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import ndtr

from diffusion.process import schedules
from diffusion.process.samplers import SAMPLERS, sample

FLOW = schedules.flow()
HIGH, LOW, WARM = 0.7, 0.2, 3
EXTRA = {"lower_order_final": False}
# our sampler: (options, order of the method, order with the production start)
ORDERS = {
    "ddim": ("ddim", {}, 1, 1),
    "euler": ("euler", {}, 1, 1),
    "heun": ("heun", {}, 2, 2),
    "heun flow": ("heun", {"coordinates": "flow"}, 2, 2),
    "dpmpp_2m": ("dpmpp_2m", EXTRA, 2, 2),
    # as published: half of D'' (see dpm_solver.py), hence 2; exact=True is the third-order method
    "dpmpp_3m": ("dpmpp_3m", EXTRA, 2, 2),
    "dpmpp_3m exact": ("dpmpp_3m", EXTRA | {"exact": True}, 3, 2),
    "unipc 1": ("unipc", EXTRA | {"order": 1}, 2, 2),
    "unipc 2": ("unipc", EXTRA | {"order": 2}, 3, 3),
    # its start of order 2 shows only at steps far smaller than these
    "unipc 3": ("unipc", EXTRA | {"order": 3}, 4, 4),
    "plms": ("plms", {}, 2, 2),
    "pndm": ("pndm", {}, 2, 2),
}
STEPS = (40, 80, 160, 320)


def flow_map(exact, t, quantiles):
    """x_t of these quantiles."""
    means, stds, weights = exact.components

    def distribution(x):
        spread = np.sqrt((1 - t) ** 2 * stds**2 + t**2)
        return np.sum(weights * ndtr((x - (1 - t) * means) / spread))

    def solve(q):
        return brentq(lambda x: distribution(x) - q, -20, 20, xtol=1e-15, rtol=1e-14)

    return np.array([solve(q) for q in quantiles])[:, None]


def started_exactly(s, exact, states, times):
    """The sampler from step WARM on, with the memory that exact steps would have left."""
    x0 = [exact.mixture(x, 1 - t, t) for x, t in zip(states, times)]
    eps = [(x - (1 - t) * d) / t for x, t, d in zip(states, times, x0)]
    first = WARM
    if s.start(jnp.zeros(1)) == ():
        memory = ()
    elif "e" in s.rows:  # plms: one row more; pndm: nine
        first, memory = s.evaluations - s.steps + WARM, (states[3], *eps[2::-1], 0 * states[0])
    elif "predict" in s.rows:
        memory = (states[2], *x0[2::-1])
    elif "corrector" in s.rows:
        first, memory = 2 * WARM, (0 * states[0], 0 * states[0])
    else:
        memory = tuple(x0[2::-1])[: s.rows["x0"].shape[1] - 1]
    memory = tuple(jnp.asarray(m) for m in memory)
    rows = {name: table[first:] for name, table in s.rows.items()}
    ends = s.ends[WARM:] - first
    return dataclasses.replace(s, rows=rows, ends=ends, start=lambda x: memory)


@pytest.fixture(scope="module")
def solution(exact):
    quantiles = np.array([0.02, 0.2, 0.41, 0.6, 0.95])
    cache = {}

    def state(t):
        if t not in cache:
            cache[t] = flow_map(exact, t, quantiles)
        return cache[t]

    return state


def errors(exact, solution, name, options, exact_start):
    out = []
    keys = jax.random.split(jax.random.key(0), 5)
    denoise = exact.denoiser(FLOW)
    for n in STEPS:
        h = (HIGH - LOW) / n
        times = HIGH + h * (WARM * exact_start - np.arange(n + WARM * exact_start))
        s = SAMPLERS[name](FLOW, times=times, final=LOW, **options)
        x = solution(HIGH)
        if exact_start:
            states = [solution(t) for t in times[:WARM]] + [x]
            s = started_exactly(s, exact, states, times)
        out.append(np.abs(sample(s, denoise, jnp.asarray(x), keys) - solution(LOW)).max())
    return np.array(out)


@pytest.mark.parametrize("case", ORDERS)
def test_order_of_convergence(case, exact, solution, x64, record_property):
    name, options, order, production = ORDERS[case]
    for exact_start, expected in ((True, order), (False, production)):
        measured = errors(exact, solution, name, options, exact_start)
        slopes = np.log2(measured[:-1] / measured[1:])
        key = "order, exact start" if exact_start else "order, production start"
        record_property(key, [round(float(v), 2) for v in slopes])
        print(case, key, np.round(slopes, 2), measured)
        # asymptotic slope; an accidental extra order would be as wrong as a missing one
        assert abs(slopes[-1] - expected) < 0.3, (key, slopes, measured)


# At about 10 evaluations ------------------------------------------------------------------------

EDM = schedules.edm()
TEN = {
    "ddpm": ("ddpm", {}, 10),
    "ddim": ("ddim", {}, 10),
    "heun": ("heun", {}, 6),  # 11 evaluations
    "dpmpp_2m": ("dpmpp_2m", {}, 10),
    "dpmpp_3m": ("dpmpp_3m", {}, 10),
    "unipc_3": ("unipc", {"order": 3}, 10),
    "plms": ("plms", {}, 9),  # 10 evaluations
}


def distance(exact, name, options, steps, repeats=20):
    """Root mean square distance of sorted samples from the quantiles of the data."""
    quantiles = (np.arange(200) + 0.5) / 200
    means, stds, weights = exact.components

    def inverse(q, sigma):
        spread = np.sqrt(stds**2 + sigma**2)
        return brentq(lambda x: np.sum(weights * ndtr((x - means) / spread)) - q, -500, 500)

    s = SAMPLERS[name](EDM, steps, spacing="logsnr", **options)
    assert abs(s.evaluations - 10) <= 1
    repeats = repeats if s.stochastic else 1
    x = np.repeat([inverse(q, EDM.sigma_max) for q in quantiles], repeats)[:, None]
    keys = jax.random.split(jax.random.key(0), x.size)
    out = jax.jit(lambda x, k: sample(s, exact.denoiser(EDM), x, k))(jnp.asarray(x), keys)
    sorted_mean = np.sort(np.asarray(out)[:, 0]).reshape(200, repeats).mean(1)
    return np.sqrt(np.mean((sorted_mean - [inverse(q, 0.0) for q in quantiles]) ** 2))


def test_ranking_at_ten_evaluations(exact, x64):
    """As in the published FIDs on CIFAR-10, EDM levels, 10 evaluations: UniPC-3 2.89 and iPNDM 2.77
    before DPM-Solver++(3M) 3.00 before Euler 15.7 before Heun 15.9; DDIM before ancestral sampling.
    """
    error = {name: distance(exact, *case) for name, case in TEN.items()}
    print({name: round(float(e), 4) for name, e in error.items()})
    best, *rest = ["dpmpp_3m", "dpmpp_2m", "ddim", "heun"]
    assert max(error["unipc_3"], error["plms"]) < error[best]
    for worse in rest:
        assert error[best] < error[worse], (best, worse, error)
        best = worse
    assert error["ddim"] < error["ddpm"]
    assert error["dpmpp_3m"] < error["ddim"] / 2
