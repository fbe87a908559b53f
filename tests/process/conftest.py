"""Data with a known density, so that the exact denoiser can be written down."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.fixture(scope="session")
def exact():
    """The functions above, and the mixture's moments."""
    mean = sum(w * m for w, m in zip(WEIGHTS, MEANS))
    second = sum(w * (s**2 + m**2) for w, m, s in zip(WEIGHTS, MEANS, STDS))
    return types.SimpleNamespace(
        gaussian=gaussian_estimate,
        mixture=mixture_estimate,
        denoiser=denoiser,
        components=tuple(np.array(c) for c in (MEANS, STDS, WEIGHTS)),
        mean=mean,
        variance=second - mean**2,
    )
