"""Schedules: published constants, closed forms, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.process import schedules

# Independently computed alpha_bar at the last step, to the digits written; the figures printed
# upstream agree.
LAST = {
    "ddpm": (schedules.ddpm_linear(), 4.0358e-5),
    "stable diffusion": (schedules.scaled_linear(), 4.6601e-3),
    "ldm .0195": (schedules.scaled_linear(beta_start=0.0015, beta_end=0.0195), 1.4230e-4),
    "ldm .0155": (schedules.scaled_linear(beta_start=0.0015, beta_end=0.0155), 6.6867e-4),
    "ldm .0205": (schedules.scaled_linear(beta_start=0.0015, beta_end=0.0205), 9.6911e-5),
    "cosine": (schedules.cosine(), 2.43e-9),
}


@pytest.mark.parametrize("name", LAST)
def test_last_alpha_bar_is_the_published_one(name):
    schedule, expected = LAST[name]
    assert schedule.num_steps == 1000
    digits = 2 if name == "cosine" else 4
    assert f"{schedule.alpha_bar[-1]:.{digits}e}" == f"{expected:.{digits}e}"


def test_stable_diffusion_does_not_end_in_noise():
    np.testing.assert_allclose(schedules.scaled_linear().alpha(999), 0.068265, atol=1e-6)


def test_cosine_has_one_beta_at_its_cap():
    betas = schedules.cosine().betas
    assert np.sum(np.isclose(betas, 0.999, atol=1e-9)) == 1
    # Improved DDPM eq. 17 directly, away from the cap
    f = np.cos((np.array([0, 500]) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(schedules.cosine().alpha_bar[499], f[1] / f[0], rtol=1e-12)


def test_linear_and_scaled_linear_betas():
    betas = schedules.ddpm_linear(10).betas
    np.testing.assert_allclose(betas, 1e-4 + np.arange(10) / 9 * (0.02 - 1e-4), rtol=1e-10)
    roots = np.sqrt(schedules.scaled_linear(10).betas)
    np.testing.assert_allclose(np.diff(roots), np.diff(roots)[0], rtol=1e-8)


def test_sigmoid_is_symmetric_about_its_middle():
    alpha_bar = schedules.sigmoid(100).alpha_bar
    np.testing.assert_allclose(alpha_bar[49], 0.5, rtol=1e-12)
    np.testing.assert_allclose(alpha_bar[:99] + alpha_bar[:99][::-1], 1, rtol=1e-10)


@pytest.mark.parametrize("name", LAST)
def test_zero_terminal_snr_moves_the_last_and_keeps_the_first(name):
    before = LAST[name][0]
    after = schedules.zero_terminal_snr(before)
    assert after.alpha(999) == 0 and after.sigma(999) == 1
    assert after.logsnr(999) == -np.inf
    np.testing.assert_allclose(after.alpha_bar[0], before.alpha_bar[0], rtol=1e-12)
    # Lin et al. Algorithm 1 is affine in sqrt(alpha_bar)
    slope = np.diff(np.sqrt(after.alpha_bar)) / np.diff(np.sqrt(before.alpha_bar))
    np.testing.assert_allclose(slope, slope[0], rtol=1e-6)


def test_zero_terminal_snr_of_continuous_schedules():
    flow = schedules.flow()
    assert schedules.zero_terminal_snr(flow) is flow
    with pytest.raises(ValueError, match=r"^zero_terminal_snr of EDM.*variance-preserving"):
        schedules.zero_terminal_snr(schedules.edm())


def test_edm_and_flow_are_what_their_papers_say():
    edm, flow = schedules.edm(), schedules.flow()
    t = np.array([0.002, 0.5, 80.0])
    np.testing.assert_array_equal(edm.sigma(t), t)
    np.testing.assert_allclose(edm.conditioning(t), np.log(t) / 4)
    np.testing.assert_allclose(edm.input_scale(t), 1 / np.sqrt(t**2 + 0.25))
    assert edm.prior_std == 80
    trig, size = schedules.trigflow(), 1 / np.sqrt(1 + 4 * t**2)
    at = trig.time(-2 * np.log(t))
    np.testing.assert_allclose(trig.alpha(at), size)
    np.testing.assert_allclose(trig.sigma(at), size * t)
    np.testing.assert_allclose(trig.sigma(t) ** 2 + 0.25 * trig.alpha(t) ** 2, 0.25)
    np.testing.assert_array_equal(trig.conditioning(t), t)
    u = np.array([0.0, 0.25, 1.0])
    np.testing.assert_allclose(flow.alpha(u) + flow.sigma(u), 1)
    np.testing.assert_allclose(flow.conditioning(u), 1000 * u)


ALL = {
    "ddpm": schedules.ddpm_linear(),
    "scaled_linear": schedules.scaled_linear(),
    "cosine": schedules.cosine(),
    "sigmoid": schedules.sigmoid(),
    "zero": schedules.zero_terminal_snr(schedules.cosine()),
    "edm": schedules.edm(),
    "trigflow": schedules.trigflow(),
    "flow": schedules.flow(),
}


@pytest.mark.parametrize("name", ALL)
def test_time_inverts_logsnr(name):
    schedule = ALL[name]
    low, high = schedule.time_range
    t = low + (high - low) * np.array([0.001, 0.2, 0.5003, 0.9, 0.99])
    np.testing.assert_allclose(schedule.time(schedule.logsnr(t)), t, rtol=1e-6)


@pytest.mark.parametrize("name", ["ddpm", "cosine", "zero"])
def test_between_steps_levels_are_interpolated_and_variance_preserved(name):
    schedule = ALL[name]
    t = np.array([0.0, 0.25, 410.75, 998.5, 999.0])
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1, rtol=1e-14)
    whole = np.arange(1000)
    np.testing.assert_array_equal(schedule.alpha(whole.astype(float)), schedule.alpha(whole))
    middle = schedule.alpha(410.5) ** 2
    np.testing.assert_allclose(middle, schedule.alpha_bar[410:412].mean(), rtol=1e-14)
    jax_middle = schedule.alpha(jnp.asarray([410.5, 999.0]))
    np.testing.assert_allclose(jax_middle, schedule.alpha(np.array([410.5, 999.0])), rtol=1e-6)


def test_small_sigma_keeps_its_digits_in_float32():
    schedule = schedules.ddpm_linear()
    assert schedule.sigma(jnp.asarray(0)).dtype == jnp.float32
    np.testing.assert_allclose(schedule.sigma(jnp.asarray(0)), np.sqrt(1e-4), rtol=1e-7)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: schedules.Discrete(np.array([0.9, 0.9, 0.5])),
            r"decrease strictly.*alpha_bar\[0\]",
        ),
        (lambda: schedules.from_betas([0.1, -0.1]), r"decrease strictly.*every beta > 0"),
        (lambda: schedules.Discrete(np.array([1.2, 0.5])), r"1\.2.*lie in \[0, 1\]"),
        (lambda: schedules.Discrete(np.array([])), "^alpha_bar .*T >= 1.*at least 1"),
        (lambda: schedules.ddpm_linear(0), "^num_steps=0, .*T >= 1"),
        (lambda: schedules.cosine(-3), "^num_steps=-3, .*T >= 1"),
        (lambda: schedules.edm(sigma_min=1.0, sigma_max=0.5), "sigma_min < sigma_max"),
        (lambda: schedules.ddpm_linear().alpha(1000), r"outside 0\.\.999"),
        (lambda: schedules.ddpm_linear().alpha(-1), r"outside 0\.\.999"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
