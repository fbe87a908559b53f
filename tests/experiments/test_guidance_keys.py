"""The settings of guidance are a config's and a command's: each does what its function does."""

import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from diffusion.process import guidance
from experiments import sample
from experiments.host import cli
from experiments.run import build, tasks

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 3)), jnp.float32)
T = jnp.array([100, 900])
SCALE = 6.0


def denoised(scale=SCALE, **settings):
    """x0 of a network that says the half of x_t where it is told something, else a tenth of it."""
    config = common.denoiser()
    config.process.prediction = "x0"
    config.sample.update({"guidance_scale": scale, **settings})
    predict = lambda x_t, t, told: x_t * told["gain"].reshape(-1, 1, 1, 1) + 0.3  # noqa: E731
    told, nothing = ({"gain": jnp.full(2, gain)} for gain in (0.5, 0.1))
    return build.settings(config).denoise(predict, told, nothing)(X, T)


def wanted(**options):
    sides = [lambda x, t, gain=gain: x * gain + 0.3 for gain in (0.5, 0.1)]
    return guidance.classifier_free(*sides, SCALE, **options)(X, T)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, lambda: wanted()),
        ({"guidance_rescale": 0.7}, lambda: wanted(rescale=0.7)),
        ({"guidance_channels": 2}, lambda: wanted(channels=2)),
        ({"guidance_interval": (0, 500)}, lambda: wanted(interval=(0, 500))),
        (
            {"dynamic_threshold": 0.9, "clip": True},
            lambda: guidance.dynamic_threshold(lambda *_: wanted(), 0.9)(X, T),
        ),
        ({"clip": True}, lambda: jnp.clip(wanted(), -1, 1)),
    ],
)
def test_a_setting_does_what_its_function_does(settings, expected):
    found = denoised(**settings)
    np.testing.assert_allclose(found, expected(), rtol=1e-5, atol=1e-6)
    assert not settings or np.abs(found - denoised()).max() > 0.1


def test_outside_the_interval_there_is_no_guidance():
    found, alone = denoised(guidance_interval=(0, 500)), denoised(scale=1.0)
    np.testing.assert_allclose(found[1], alone[1], rtol=1e-6)
    assert np.abs(found[0] - alone[0]).max() > 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_rescale": 1.5},
        {"guidance_interval": (5.0,)},
        {"guidance_channels": -1},
        {"guidance_interval": (500, 0)},
        {"dynamic_threshold": 1.5},
    ],
)
def test_what_cannot_be_is_refused_before_training(settings):
    from configs import digits_pixel

    config = digits_pixel.get_config("smoke")
    config.sample.update(settings)
    with pytest.raises(ValueError, match=f"sample.{next(iter(settings))}"):
        tasks.denoiser(config)


def test_flags_change_the_configs_settings(job):
    declared = cli.Flags()
    sample.define(declared)
    flags = ("--guidance_rescale=0.7", "--guidance_interval=100,600", "--steps=3")
    declared.values(["sample", f"--workdir={job}/ldm", *flags])
    how = sample.open_model(declared.values).pipeline.how
    assert (how.guidance_rescale, how.guidance_interval, how.steps) == (0.7, (100.0, 600.0), 3)
