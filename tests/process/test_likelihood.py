"""The bound against closed forms: a Gaussian model's entropy, and DDPM's own decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from diffusion.process import gaussian, likelihood, schedules


def test_normal_kl_is_the_integral(x64):
    x, dx = np.linspace(-30, 30, 200_001, retstep=True)
    log_p = -0.5 * ((x - 0.3) ** 2 / np.exp(0.4) + 0.4 + np.log(2 * np.pi))
    log_q = -0.5 * ((x + 0.5) ** 2 / np.exp(-0.2) - 0.2 + np.log(2 * np.pi))
    expected = np.sum(np.exp(log_p) * (log_p - log_q)) * dx
    got = likelihood.normal_kl(*(jnp.asarray(v) for v in (0.3, 0.4, -0.5, -0.2)))
    np.testing.assert_allclose(got, expected, rtol=1e-8)


def test_decoder_is_a_distribution_over_256_levels(x64):
    levels = jnp.asarray(np.arange(256) / 127.5 - 1).reshape(256, 1, 1)
    for mean, std in ((0.1, 0.03), (-0.99, 0.2), (1.2, 0.05)):
        log_p = likelihood.discretized_log_likelihood(
            levels, jnp.full_like(levels, mean), jnp.full_like(levels, np.log(std))
        )
        np.testing.assert_allclose(jnp.exp(log_p).sum(), 1, atol=1e-6)
        # the authors' tanh for the normal CDF is within 5e-4
        x = np.asarray(levels)
        true = ndtr((x + 1 / 255 - mean) / std) - ndtr((x - 1 / 255 - mean) / std)
        inside = slice(1, -1)
        np.testing.assert_allclose(np.exp(log_p)[inside], true[inside], atol=1e-3)


@pytest.mark.parametrize(
    "name, variance, within",
    [
        ("linear", "learned", 0.01),
        ("cosine", "learned", 0.01),
        ("cosine", "fixed_large", 0.01),
        # the variance of one pixel's reverse step is neither of the two: a gap, in closed form
        ("linear", "fixed_large", 0.02),
        ("linear", "fixed_small", 0.12),
    ],
)
def test_gaussian_model_reaches_the_entropy(variance, name, within, exact):
    """Data N(0.2, 0.3^2) rounded to 256 levels, exact denoiser: the bound is the entropy plus
    sum_t (r - 1 - log r)/2, r the true over the model's variance of each reverse step.
    """
    schedule = {"linear": schedules.ddpm_linear(), "cosine": schedules.cosine(2000)}[name]
    mean, std = 0.2, 0.3
    levels = np.arange(256) / 127.5 - 1
    edges = (levels[1:] + levels[:-1]) / 2
    p = np.diff(np.concatenate([[0], ndtr((edges - mean) / std), [1]]))
    entropy = -np.sum(p * np.log2(p))

    # every level in proportion, so that the data add no Monte-Carlo error of their own
    x0 = levels[np.searchsorted(np.cumsum(p), (np.arange(4096) + 0.5) / 4096)]
    x0 = jnp.asarray(x0.reshape(8, 512, 1), jnp.float32)
    denoise = exact.denoiser(schedule, exact.gaussian)
    if variance == "learned":
        inner, denoise = denoise, lambda x, t: (inner(x, t), _best(schedule, x, t, std))
    keys = jax.random.split(jax.random.key(0), 8)
    out = jax.jit(lambda x0, keys: likelihood.bits_per_dim(denoise, schedule, x0, keys, variance))(
        x0, keys
    )
    total = float(out["bits_per_dim"].mean())
    assert total > entropy * 0.999, "below the entropy: not a bound"
    assert total < entropy * (1 + within), (total, entropy)
    if name == "linear":  # finer steps than a level (cosine) leave x0 discrete: no closed form
        gap = _gap(schedule, variance, std)
        np.testing.assert_allclose(total, entropy + gap, rtol=5e-3)
        if variance == "learned":  # bits that x_t has of x0, and what is left of its spread
            parts = (np.asarray(out[k].mean(0)) for k in ("terms", "x0_mse"))
            curve = likelihood.rate_distortion(float(out["prior"].mean()), *parts)
            np.testing.assert_allclose(
                curve["rate"][0] + out["terms"][:, 0].mean(), total, rtol=1e-5
            )
            snr = (schedule.alpha_bar / (1 - schedule.alpha_bar))[[100, 300, 500, 700]]
            rate, left = (curve[k][[100, 300, 500, 700]] for k in ("rate", "distortion"))
            np.testing.assert_allclose(rate, 0.5 * np.log2(1 + snr * std**2), rtol=0.02)
            spread = 127.5 * std / np.sqrt(1 + snr * std**2)
            np.testing.assert_allclose(left, spread, rtol=0.05)
    assert out["terms"].shape == out["x0_mse"].shape == (8, schedule.num_steps)
    np.testing.assert_allclose(out["prior"] + out["terms"].sum(1), out["bits_per_dim"], rtol=1e-5)
    # the error of the exact denoiser is the posterior variance of x0
    a2, s2 = schedule.alpha_bar, 1 - schedule.alpha_bar
    expected = std**2 * s2 / (a2 * std**2 + s2)
    middle = schedule.num_steps // 3
    np.testing.assert_allclose(out["x0_mse"].mean(0)[middle], expected[middle], rtol=0.12)


def _best(schedule, x, t, std):
    """The v whose variance is that of the true reverse step of Gaussian data."""
    tables = gaussian.posterior_tables(schedule)
    low, high = tables["log_variance"], tables["log_beta"]
    v = 2 * (_true_log_variance(schedule, std) - low) / np.maximum(high - low, 1e-12) - 1
    return gaussian.expand(jnp.asarray(v, jnp.float32)[t], x) + 0 * x


def _true_log_variance(schedule, std):
    """Of q(x_{t-1} | x_t) for Gaussian data: the posterior's plus that of x0 given x_t."""
    tables, a2 = gaussian.posterior_tables(schedule), schedule.alpha_bar
    spread = std**2 * (1 - a2) / (a2 * std**2 + 1 - a2)
    return np.log(tables["variance"] + tables["x0"] ** 2 * spread)


def _gap(schedule, variance, std):
    """Bits that the bound lies above the entropy."""
    true, model = _true_log_variance(schedule, std), _model_log_variance(schedule, variance, std)
    ratio = np.exp(true - model)[1:]
    first = _rounded_kl(np.exp(0.5 * true[0]), np.exp(0.5 * model[0]))
    return first + 0.5 * np.sum(ratio - 1 - np.log(ratio)) / np.log(2)


def _rounded_kl(true, model):
    """Bits between two centred Gaussians rounded to levels, over all places between two levels."""
    places = (np.arange(64) + 0.5) / 64 / 127.5
    levels = np.arange(-40, 41) / 127.5 - places[:, None]

    def mass(std):
        return ndtr((levels + 1 / 255) / std) - ndtr((levels - 1 / 255) / std)

    p, q = mass(true), np.maximum(mass(model), 1e-12)
    return np.mean(np.sum(np.where(p > 0, p * np.log2(np.maximum(p, 1e-300) / q), 0), axis=1))


def _model_log_variance(schedule, variance, std):
    if variance == "learned":
        return _true_log_variance(schedule, std)
    name = {"fixed_small": "log_variance", "fixed_large": "log_noise_variance"}[variance]
    return gaussian.posterior_tables(schedule)[name]


def test_bound_terms_are_the_kl_of_equation_3(x64):
    """At t > 0 with fixed_small only the means differ: |x0 - x0'|^2 times the SNR step / 2."""
    schedule = schedules.ddpm_linear(100)
    rng = np.random.default_rng(0)
    x0, x_t, wrong = jnp.asarray(rng.uniform(-1, 1, size=(3, 2, 6, 1)))
    for t in (1, 40, 99):
        times = jnp.full((2,), t)
        got = likelihood.bound_term(schedule, x0, x_t, times, wrong, "fixed_small")
        snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
        # VDM eq. 13 (arXiv:2107.00630)
        expected = 0.5 * (snr[t - 1] - snr[t]) * ((x0 - wrong) ** 2).mean((1, 2)) / np.log(2)
        np.testing.assert_allclose(got, expected, rtol=1e-8)


def test_prior_term(x64):
    schedule = schedules.scaled_linear()
    x0 = jnp.full((2, 5, 1), 0.5)
    bar = schedule.alpha_bar[-1]
    expected = 0.5 * (bar * 0.25 + (1 - bar) - 1 - np.log(1 - bar)) / np.log(2)
    np.testing.assert_allclose(likelihood.prior_term(schedule, x0), expected, rtol=1e-8)


def test_what_is_refused():
    x0, keys = jnp.zeros((2, 3, 1)), jax.random.split(jax.random.key(0), 2)

    def same(x, t):
        return x

    with pytest.raises(ValueError, match=r"Flow has no posterior per step.*ddpm_linear"):
        likelihood.bits_per_dim(same, schedules.flow(), x0, keys)
    with pytest.raises(ValueError, match=r"^variance='big' is unknown"):
        likelihood.bits_per_dim(same, schedules.ddpm_linear(10), x0, keys, "big")
    with pytest.raises(ValueError, match="'learned' needs a denoise that returns"):
        likelihood.bits_per_dim(same, schedules.ddpm_linear(10), x0, keys, "learned")
