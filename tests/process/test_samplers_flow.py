"""SiT's samplers on the linear path: Euler-Maruyama by exact moments, dopri5 by its order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.process import schedules
from diffusion.process.samplers import SAMPLERS, flow, grid, sample

FLOW = schedules.flow()
KEYS = jax.random.split(jax.random.key(0), 5)
MEAN, STD = 0.2, 0.3


def moments(s, exact):
    """Mean and variance of x_0 for Gaussian data: every step is affine in x, so they are exact."""
    mean, variance = 0.0, 1.0
    rows = s.rows
    for i, t in enumerate(rows["t"]):
        at0, at1 = (exact.gaussian(x, 1 - t, t, MEAN, STD) for x in (0.0, 1.0))
        gain = rows["x"][i] + rows["x0"][i, 0] * (at1 - at0)
        mean = gain * mean + rows["x0"][i, 0] * at0
        variance = gain**2 * variance + (rows["noise"][i] ** 2 if "noise" in rows else 0)
    return mean, variance


@pytest.mark.parametrize("diffusion", ["sigma", "constant", "decreasing", "increasing-decreasing"])
def test_euler_maruyama_is_of_weak_order_one(diffusion, exact):
    errors = []
    for n in (100, 200, 400, 800):
        given = {"diffusion": diffusion, "last_step_size": 1 / n, "last": "euler"}
        mean, variance = moments(SAMPLERS["euler_maruyama"](FLOW, n, **given), exact)
        errors.append([abs(mean - MEAN), abs(variance - STD**2)])
    errors = np.array(errors)
    slopes = np.log2(errors[:-1, 1] / errors[1:, 1])
    assert abs(slopes[-1] - 1) < 0.15, slopes
    assert errors[-1].max() < 2e-3  # that of the mean ends in rounding noise


def test_sbdm_has_the_moments_from_where_it_is_finite(exact):
    """From t = 0.99, at whose level the first x is all but unit noise."""
    times = np.linspace(0.99, 1 / 400, 400)
    s = SAMPLERS["euler_maruyama"](FLOW, times=times, diffusion="sbdm")
    np.testing.assert_allclose(moments(s, exact), [MEAN, STD**2], atol=5e-5)
    with pytest.raises(ValueError, match="diffusion='sbdm' is infinite at t = 1"):
        SAMPLERS["euler_maruyama"](FLOW, 10, diffusion="sbdm")


def test_the_grid_and_a_step_are_the_authors():
    """250 times from 1 to 0.04, then one step without noise (transport/integrators.py)."""
    s = SAMPLERS["euler_maruyama"](FLOW, 250)
    np.testing.assert_allclose(s.rows["t"], np.linspace(1, 0.04, 250))
    assert s.evaluations == 250 and s.rows["noise"][-1] == 0 and s.rows["noise"][-2] > 0
    x, x0, t, h = 1.7, -0.4, s.rows["t"][100], 0.96 / 249
    score = (0 - (x - (1 - t) * x0)) / t**2
    velocity = x0 - (x - (1 - t) * x0) / t  # theirs points to the data
    mean = x + h * (velocity + t * score)
    assert s.rows["x"][100] * x + s.rows["x0"][100, 0] * x0 == pytest.approx(mean, rel=1e-12)
    assert s.rows["noise"][100] == pytest.approx(np.sqrt(2 * t * h), rel=1e-12)
    np.testing.assert_allclose(s.rows["x"][-1] * x + s.rows["x0"][-1] * x0, x0 - (x - 0.96 * x0))
    euler = SAMPLERS["euler_maruyama"](FLOW, 250, last="euler")
    np.testing.assert_allclose(euler.rows["x"][-1] * x + euler.rows["x0"][-1] * x0, x0)


def test_without_diffusion_it_is_the_ode():
    """Of equal steps; the last one ends in D either way."""
    s = SAMPLERS["euler_maruyama"](FLOW, 20, norm=0, last_step_size=0.05)
    plain = SAMPLERS["euler"](FLOW, times=s.rows["t"])
    assert not s.stochastic
    for name in ("x", "x0"):
        np.testing.assert_allclose(s.rows[name], plain.rows[name], atol=1e-12)


@pytest.fixture(scope="module")
def states(exact):
    """x at some times of quantiles of the mixture, without a solver."""
    from tests.process.test_samplers_order import flow_map

    quantiles = np.array([0.02, 0.2, 0.41, 0.6, 0.95])
    return {t: flow_map(exact, t, quantiles) for t in (0.7, 0.2, 0.0)}


def test_the_tableau_is_of_order_five_and_its_estimate_of_order_four(exact, states):
    def slope(x, t):
        x0 = exact.mixture(x, 1 - t, t)
        return (x - (1 - t) * x0) / t - x0

    errors, estimates = [], []
    for n in (4, 8, 16, 32):
        x, h, estimate = states[0.7], -0.5 / n, 0.0
        for i in range(n):
            seen, at = [], x
            for node, row in zip(flow.NODES, flow.TABLEAU, strict=True):
                at = x + h * sum(a * u for a, u in zip(row, seen))
                seen.append(slope(at, 0.7 + (i + node) * h))
            x, estimate = at, estimate + h * sum(e * u for e, u in zip(flow.ERROR, seen))
        errors.append(np.abs(x - states[0.2]).max())
        estimates.append(np.abs(estimate).max())
    assert abs(np.log2(errors[-2] / errors[-1]) - 5) < 0.4, errors
    assert abs(np.log2(estimates[-2] / estimates[-1]) - 4) < 0.4, estimates


def test_the_adaptive_solver_keeps_its_tolerance_and_no_step_depends_on_the_batch(
    exact, states, x64
):
    denoise = exact.denoiser(FLOW)
    x = jnp.asarray(states[0.7])
    errors = []
    for rtol in (1e-3, 1e-5, 1e-7):
        s = SAMPLERS["dopri5"](FLOW, times=np.linspace(0.7, 0, 100, endpoint=False), rtol=rtol)
        errors.append(np.abs(sample(s, denoise, x, KEYS) - states[0.0]).max())
    # The last leaves what ends at t = 1e-3, whose square it is.
    assert errors[0] < 2e-3 and errors[1] < errors[0] / 10 and errors[2] < 1e-5, errors
    alone = sample(s, denoise, x[2:3], KEYS[2:3])
    np.testing.assert_array_equal(alone, sample(s, denoise, x, KEYS)[2:3])


def test_what_is_not_done_within_the_steps_is_nan(exact):
    s = SAMPLERS["dopri5"](FLOW, 3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 1)), jnp.float32)
    assert np.isnan(sample(s, exact.denoiser(FLOW), x, KEYS)).all()
    assert np.isfinite(sample(SAMPLERS["dopri5"](FLOW), exact.denoiser(FLOW), x, KEYS)).all()
    with pytest.raises(ValueError, match="chooses its steps"):
        sample(s, exact.denoiser(FLOW), x, KEYS, trajectory=True)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("euler_maruyama", {"diffusion": "vp"}, "diffusion='vp' is unknown"),
        ("euler_maruyama", {"last": "none"}, "last='none' is unknown"),
        ("euler_maruyama", {"last_step_size": 0.0}, r"last_step_size=0.0, norm=1.0.*\(0, 1\)"),
        ("dopri5", {"rtol": 0.0}, "rtol=0.0.*rtol must be above 0"),
        ("dopri5", {"final_time": 0.5, "times": (0.4, 0.2)}, "final_time=0.5 is not below"),
    ],
)
def test_impossible_settings_are_refused(name, options, said):
    with pytest.raises(ValueError, match=said):
        SAMPLERS[name](FLOW, **options)


@pytest.mark.parametrize("name", ["euler_maruyama", "dopri5"])
def test_another_path_is_refused(name):
    with pytest.raises(ValueError, match=f"sampler='{name}' is of rectified flow's path"):
        SAMPLERS[name](schedules.cosine(), 10)


@pytest.mark.parametrize(
    ("scale", "last"), [(1000.0, 1e-3), (100.0, 1e-2), (10.0, 1e-3), (1.0, 1e-3)]
)
def test_even_times_end_at_a_step_of_a_thousand_where_the_scale_counts_none(scale, last):
    flow_of = schedules.flow(time_scale=scale)
    times = grid.make_grid(flow_of, 4, spacing="even").times
    np.testing.assert_allclose(times, np.linspace(1, last, 4), rtol=1e-6)
