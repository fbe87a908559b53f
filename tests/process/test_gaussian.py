"""Noising, posterior and conversions against closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.process import gaussian, schedules
from diffusion.process import keys as ks

SCHEDULES = {
    "ddpm": (schedules.ddpm_linear(), 300),
    "cosine": (schedules.cosine(), 700),
    "edm": (schedules.edm(), 3.0),
    "flow": (schedules.flow(), 0.4),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("source, target", list(itertools.product(gaussian.PREDICTIONS, repeat=2)))
def test_conversions_reach_the_target_and_return(name, source, target, x64):
    schedule, t = SCHEDULES[name]
    rng = np.random.default_rng(0)
    x0, eps = jnp.asarray(rng.normal(size=(2, 3, 5, 4, 2)))
    a, s = float(schedule.alpha(t)), float(schedule.sigma(t))
    x_t = a * x0 + s * eps
    start = gaussian.targets(source, x0, eps, a, s)
    there = gaussian.convert(start, source, target, x_t, a, s)
    np.testing.assert_allclose(there, gaussian.targets(target, x0, eps, a, s), atol=1e-11)
    back = gaussian.convert(there, target, source, x_t, a, s)
    np.testing.assert_allclose(back, start, atol=1e-11)


def test_targets_are_the_papers(x64):
    x0, eps = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 2, 1)))
    a, s = jnp.array([0.8, 0.6, 0.1]), jnp.array([0.6, 0.8, np.sqrt(0.99)])

    def wide(v):
        return v.reshape(3, 1, 1)

    v = gaussian.targets("v", x0, eps, a, s)
    np.testing.assert_allclose(v, wide(a) * eps - wide(s) * x0)
    np.testing.assert_allclose(gaussian.targets("velocity", x0, eps, a, s), eps - x0)
    # EDM eq. 8: F* = (x0 - c_skip x) / c_out at alpha = 1
    sigma, d = 3.0, 0.5
    c_skip = d**2 / (sigma**2 + d**2)
    c_out = sigma * d / np.sqrt(sigma**2 + d**2)
    f = gaussian.targets("edm", x0, eps, 1.0, sigma, d)
    np.testing.assert_allclose(f, (x0 - c_skip * (x0 + sigma * eps)) / c_out)
    # With unit data variance on a variance-preserving schedule, F is -v.
    np.testing.assert_allclose(gaussian.targets("edm", x0, eps, a, s, 1.0), -v, atol=1e-12)


# x0 and eps at alpha = 0, sigma = s (then x_t = s eps), and at sigma = 0, alpha = a (x_t = a x0),
# from the pair's own definitions; the data's deviation is 0.5.
@pytest.mark.parametrize(
    "prediction, no_signal, no_noise",
    [
        ("v", lambda y, x, s: (-y / s, x / s), lambda y, x, a: (x / a, y / a)),
        ("velocity", lambda y, x, s: (x / s - y, x / s), lambda y, x, a: (x / a, x / a + y)),
        ("edm", lambda y, x, s: (0.5 * y, x / s), lambda y, x, a: (x / a, -y)),
        ("x0", lambda y, x, s: (y, x / s), None),
        ("eps", None, lambda y, x, a: (x / a, y)),
    ],
)
def test_no_signal_and_no_noise_are_no_singularities(prediction, no_signal, no_noise, x64):
    output, x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 2, 3, 1)))
    for level, (a, s), expected in ((0.7, (0.0, 0.7), no_signal), (0.8, (0.8, 0.0), no_noise)):
        if expected is None:
            continue
        for target, wanted in zip(("x0", "eps"), expected(output, x, level)):
            got = gaussian.convert(output, prediction, target, x, a, s)
            np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_posterior_is_ddpm_equation_7(x64):
    schedule = schedules.ddpm_linear(50)
    rng = np.random.default_rng(0)
    x0, x_t = jnp.asarray(rng.normal(size=(2, 4, 3, 1)))
    t = jnp.asarray([1, 7, 30, 49])
    beta, bar = schedule.betas[t][:, None, None], schedule.alpha_bar[t][:, None, None]
    before = schedule.alpha_bar[np.asarray(t) - 1][:, None, None]
    mean = np.sqrt(before) * beta / (1 - bar) * x0
    mean += np.sqrt(1 - beta) * (1 - before) / (1 - bar) * x_t
    variance = (1 - before) / (1 - bar) * beta
    got_mean, got_logvar = gaussian.posterior(schedule, x0, x_t, t)
    np.testing.assert_allclose(got_mean, mean, atol=1e-12)
    np.testing.assert_allclose(got_logvar, np.log(variance)[:, 0, 0], rtol=1e-10)
    # the variance at t = 0 is 0; its logarithm is taken from t = 1 (authors' code)
    tables = gaussian.posterior_tables(schedule)
    assert tables["variance"][0] == 0
    np.testing.assert_allclose(tables["log_variance"][0], tables["log_variance"][1])
    np.testing.assert_allclose(tables["log_noise_variance"][0], tables["log_variance"][1])
    np.testing.assert_allclose(tables["log_noise_variance"][1:], np.log(schedule.betas[1:]))


def test_q_sample_has_the_moments_of_equation_1(x64):
    schedule, t = schedules.ddpm_linear(), 300
    keys = jax.random.split(jax.random.key(0), 4)
    noise = ks.normal(keys, (4, 100, 100, 1))
    x_t = gaussian.q_sample(schedule, jnp.full(noise.shape, 0.7), jnp.full((4,), t), noise)
    np.testing.assert_allclose(x_t.mean(), 0.7 * schedule.alpha(t), atol=5 * 0.005)
    np.testing.assert_allclose(x_t.std(), schedule.sigma(t), rtol=5 * 0.0036)


def test_noise_depends_on_the_key_alone():
    keys = jax.random.split(jax.random.key(3), 6)
    whole = ks.normal(keys, (6, 4, 2))
    np.testing.assert_array_equal(whole[4:], ks.normal(keys[4:], (2, 4, 2)))
    assert not np.allclose(whole[0], whole[1])


@pytest.mark.parametrize("prediction", gaussian.PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_denoise_of_a_perfect_network_is_x0(name, prediction, x64):
    if (name, prediction) == ("flow", "eps"):
        pytest.skip("refused: no signal at t = 1")
    schedule, t = SCHEDULES[name]
    x0, eps = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 2)))
    times = jnp.full((3,), t)
    a, s = float(schedule.alpha(t)), float(schedule.sigma(t))
    x_t = gaussian.q_sample(schedule, x0, times, eps)
    seen = {}

    def network(x, c):
        seen.update(x=x, c=c)
        return gaussian.targets(prediction, x0, eps, a, s)

    denoise = gaussian.make_denoise(network, schedule, prediction)
    np.testing.assert_allclose(denoise(x_t, times), x0, atol=1e-11)
    if name == "edm" or prediction == "edm":
        np.testing.assert_allclose(seen["x"], x_t / np.sqrt(s**2 + 0.25 * a**2))
    else:
        np.testing.assert_array_equal(seen["x"], x_t)
    np.testing.assert_allclose(seen["c"], np.full(3, schedule.conditioning(t)))


def test_learned_variance_splits_the_channels():
    schedule = schedules.ddpm_linear()
    x, t = jnp.ones((2, 3, 4)), jnp.array([3, 500])

    def network(x, t):
        return jnp.concatenate([0 * x, 7 + 0 * x], axis=-1)

    x0, variance = gaussian.make_denoise(network, schedule, "x0", learned_variance=True)(x, t)
    assert x0.shape == variance.shape == x.shape
    assert np.all(x0 == 0) and np.all(variance == 7)


def test_what_is_refused():
    schedule = schedules.ddpm_linear()
    x, t = jnp.ones((2, 3, 4)), jnp.array([3, 500])

    def double(x, t):
        return jnp.concatenate([x, x], axis=-1)

    with pytest.raises(ValueError, match=r"8 output channels for 4.*fixed variance needs 4"):
        gaussian.make_denoise(double, schedule, "eps")(x, t)
    with pytest.raises(ValueError, match=r"4 output channels.*learned variance needs 8"):
        gaussian.make_denoise(lambda x, t: x, schedule, "eps", learned_variance=True)(x, t)
    with pytest.raises(ValueError, match=r"^prediction='noise' is unknown: choose one of eps"):
        gaussian.make_denoise(double, schedule, "noise")
    zero = schedules.zero_terminal_snr(schedule)
    with pytest.raises(ValueError, match=r"'eps' cannot give x0.*predict 'v'"):
        gaussian.make_denoise(double, zero, "eps")
    with pytest.raises(ValueError, match="EDM has no posterior per step"):
        gaussian.posterior_tables(schedules.edm())
