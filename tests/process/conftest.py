"""Data with a known density, so that the exact denoiser can be written down."""

import importlib.util
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.process.samplers import SAMPLERS, sample, step_noise

WEIGHTS, MEANS, STDS = (0.4, 0.6), (-0.6, 0.5), (0.15, 0.25)


def gaussian_estimate(x, alpha, sigma, mean=0.2, std=0.3):
    """E[x0 | x_t] of N(mean, std^2) data, elementwise."""
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    return mean + gain * (x - alpha * mean)


def mixture_estimate(x, alpha, sigma):
    """E[x0 | x_t] of the two-component mixture, elementwise; NumPy or jax."""
    xp = jnp if isinstance(x, jax.Array) else np
    logits, estimates = [], []
    for weight, mean, std in zip(WEIGHTS, MEANS, STDS):
        variance = alpha**2 * std**2 + sigma**2
        z2 = (x - alpha * mean) ** 2 / variance
        logits.append(xp.log(weight) - 0.5 * xp.log(variance) - 0.5 * z2)
        estimates.append(gaussian_estimate(x, alpha, sigma, mean, std))
    share = 1 / (1 + xp.exp(logits[1] - logits[0]))
    return share * estimates[0] + (1 - share) * estimates[1]


def denoiser(schedule, estimate=mixture_estimate):
    """The jax denoise(x, t) of an ``estimate(x, alpha, sigma)``."""

    def denoise(x, t):
        shape = (-1,) + (1,) * (x.ndim - 1)
        alpha = jnp.asarray(schedule.alpha(t), x.dtype).reshape(shape)
        sigma = jnp.asarray(schedule.sigma(t), x.dtype).reshape(shape)
        return estimate(x, alpha, sigma)

    return denoise


def level(bar):
    """(alpha, sigma) of an alpha_bar."""
    return np.sqrt(bar), np.sqrt(1 - bar)


def mixture_eps(x, bar):
    """The mixture's noise estimate at an alpha_bar."""
    a, s = level(bar)
    return (x - a * mixture_estimate(x, a, s)) / s


@pytest.fixture(scope="session")
def exact():
    """The functions above, and the mixture's moments."""
    mean = sum(w * m for w, m in zip(WEIGHTS, MEANS))
    second = sum(w * (s**2 + m**2) for w, m, s in zip(WEIGHTS, MEANS, STDS))
    return types.SimpleNamespace(
        gaussian=gaussian_estimate,
        mixture=mixture_estimate,
        denoiser=denoiser,
        level=level,
        eps=mixture_eps,
        components=tuple(np.array(c) for c in (MEANS, STDS, WEIGHTS)),
        mean=mean,
        variance=second - mean**2,
    )


@pytest.fixture
def run(exact, x64):
    """run(schedule, name, transcription, **options): the two trajectories, compared."""

    def compare(schedule, name, transcription, steps=None, **options):
        s = SAMPLERS[name](schedule, steps, **options)
        keys = jax.random.split(jax.random.key(7), 3)
        x = s.prior_std * jnp.asarray(np.random.default_rng(3).normal(size=(3, 5, 1)))
        _, xs = sample(s, exact.denoiser(schedule), x, keys, trajectory=True)
        noises = np.stack([step_noise(keys, i, x) for i in range(s.steps)])
        x = np.asarray(x)
        expected = [x]
        expected.extend(transcription(x, noises))
        assert xs.shape == np.shape(expected)
        np.testing.assert_allclose(xs, np.stack(expected), rtol=0, atol=1e-10 * s.prior_std)
        assert np.ptp(np.asarray(xs[-1])) > 0.3, "the trajectories went nowhere"

    return compare


@pytest.fixture(scope="session")
def known():
    """The module beside this file."""
    path = pathlib.Path(__file__).with_name("gaussian_flow.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
