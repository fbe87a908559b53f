"""Power-function averages and what is made of them after training (EDM2): closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.training import ema, optim
from diffusion.training import state as ts

STEPS = 1024


def weights(length, at, steps=STEPS):
    """What each update counts in a profile at update `at`: the integral of eq. 4 over its step."""
    n, power = np.arange(1, steps + 1.0), ema.exponent(length) + 1
    return np.where(n <= at, (n / at) ** power - ((n - 1) / at) ** power, 0)


def path(steps=STEPS):
    """Parameters that fall into place and go on wandering."""
    n, rng = np.arange(1, steps + 1)[:, None], np.random.default_rng(0)
    walk = np.cumsum(rng.normal(size=(steps, 8)), 0) / np.sqrt(steps)
    return 1 + np.exp(-n / 150) * rng.normal(size=(1, 8)) + 0.1 * walk


@pytest.mark.parametrize(("length", "exponent"), [(0.05, 16.97), (0.1, 6.94), (12**-0.5, 0.0)])
def test_a_length_is_the_deviation_of_its_profile(length, exponent):
    g = ema.exponent(length)
    np.testing.assert_allclose(g, exponent, atol=5e-3)  # EDM2, section 3.1
    t = (np.arange(200_000) + 0.5) / 200_000
    p = (g + 1) * t**g / len(t)
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(np.sqrt((p * t**2).sum() - (p * t).sum() ** 2), length, rtol=1e-5)


def test_the_inner_product_is_the_integral():
    t, rows = (np.arange(400_000) + 0.5) / 400_000 * 30, []
    for length, n in ((0.05, 30), (0.1, 12), (0.2, 30)):
        g = ema.exponent(length)
        rows.append(np.where(t <= n, (g + 1) * t**g / float(n) ** (g + 1), 0))
    g, n = np.array([ema.exponent(x) for x in (0.05, 0.1, 0.2)]), np.array([30.0, 12.0, 30.0])
    found = ema._inner(g[:, None], n[:, None], g[None], n[None])
    np.testing.assert_allclose(found, np.array(rows) @ np.array(rows).T * (t[1] - t[0]), rtol=1e-4)


def test_what_a_step_keeps_is_the_profile():
    rate = optim.learning_rate(1.0)
    optimizer = ts.Optimizer({"net": optim.make_transform(rate, "sgd", b1=0.0)}, rate)
    averages = ema.Ema(0.0, networks=("net",), profiles=(0.05, 0.2))
    wanted = path()[:60]
    params = {"net": {"w": jnp.zeros(8)}}
    state = ts.create_state(jax.random.key(0), params, optimizer, averages, {})
    assert not state.ema

    @jax.jit
    def step(state, to, loss):
        grads = {"net": {"w": state.params["net"]["w"] - to}}
        return ts.apply_gradients(state, grads, loss, optimizer, averages)[0]

    for n, to in enumerate(jnp.asarray(wanted, jnp.float32)):
        if n == 30:  # one that is not taken counts in no average
            state = step(state, 9 * to, jnp.float32(jnp.nan))
        state = step(state, to, jnp.float32(0))
    for length in (0.05, 0.2):
        found = state.profiles[ema.profile_name(length)]["net"]["w"]
        np.testing.assert_allclose(found, weights(length, 60, 60) @ wanted, rtol=1e-5)


def test_a_late_update_keeps_its_rate_in_single_precision():
    rate = ema.Ema(0.0, networks=("net",), profiles=(0.1,)).profile_rates(jnp.int32(2_000_000))
    wanted = -np.expm1((ema.exponent(0.1) + 1) * np.log1p(-1 / 2e6))
    np.testing.assert_allclose(rate["0.1"], wanted, rtol=1e-6)


def reconstruction_error(length, count):
    """Of `count` snapshots of two profiles, against the one that was tracked."""
    times = np.repeat(np.arange(1, count + 1) * STEPS // count, 2)
    lengths, theta = [0.05, 0.1] * count, path()
    kept = np.stack([weights(x, n) @ theta for x, n in zip(lengths, times)])
    made = ema.combination(lengths, times.tolist(), length, STEPS) @ kept
    tracked = weights(length, STEPS) @ theta
    return np.linalg.norm(made - tracked) / np.linalg.norm(tracked)


@pytest.mark.parametrize("length", [0.06, 0.075, 0.09])
def test_two_profiles_give_a_third_and_the_better_the_more_snapshots_there_are(length):
    e4, e8, e16, e32 = (reconstruction_error(length, count) for count in (4, 8, 16, 32))
    assert e32 < e16 / 4 < e8 / 16 < e4 / 64
    assert e32 < 1e-4 < e4


def test_a_tracked_length_is_given_back():
    assert reconstruction_error(0.05, 8) < 1e-9 and reconstruction_error(0.1, 8) < 1e-9


def test_a_length_outside_the_tracked_ones_is_refused():
    for length in (0.04, 0.11):
        with pytest.raises(
            ValueError, match=rf"length={length} is outside the tracked 0.05 .. 0.1"
        ):
            ema.combination([0.05, 0.1], [10, 10], length, 10)


@pytest.mark.parametrize("profiles", [(0.0,), (0.3,), (0.1, 0.1), (-0.1, 0.05)])
def test_lengths_that_are_none_are_refused(profiles):
    with pytest.raises(ValueError, match=r"profiles=.*above 0 and up to 0.2887"):
        ema.Ema(0.9, profiles=profiles)
