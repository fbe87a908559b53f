"""Samples of every sampler, with the exact denoiser, have the data's mean and variance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.process import keys as ks
from diffusion.process import schedules
from diffusion.process.samplers import SAMPLERS, sample
from diffusion.process.samplers.base import estimates

COSINE, FLOW, EDM = schedules.cosine(), schedules.flow(), schedules.edm()
ZERO = schedules.zero_terminal_snr(COSINE)
EXAMPLES = (40, 1000, 1)  # keys, draws a key, channels
# Steps enough that the sampler's own bias is small beside the Monte-Carlo error.
CASES = [
    ("ddpm", COSINE, {"steps": 1000}),
    ("ddpm", COSINE, {"steps": 1000, "variance": "fixed_large"}),
    ("ddpm", COSINE, {"steps": 1000, "variance": "learned"}),
    ("ddim", COSINE, {"steps": 500}),
    ("ddim", ZERO, {"steps": 500, "spacing": "trailing", "eta": 0.5}),
    ("dpmpp_2m", COSINE, {"steps": 100, "spacing": "logsnr"}),
    ("dpmpp_2m", ZERO, {"steps": 500, "spacing": "trailing"}),
    ("dpmpp_3m", COSINE, {"steps": 100, "spacing": "logsnr"}),
    ("dpmpp_3m", ZERO, {"steps": 500, "spacing": "trailing"}),
    ("dpmpp_2m_sde", COSINE, {"steps": 200, "spacing": "logsnr"}),
    ("unipc", COSINE, {"steps": 100, "order": 3, "spacing": "logsnr"}),
    ("unipc", ZERO, {"steps": 500, "spacing": "trailing"}),
    ("plms", COSINE, {"steps": 250}),
    ("pndm", COSINE, {"steps": 250}),
    ("euler", FLOW, {"steps": 400}),
    ("heun", FLOW, {"steps": 50}),
    ("euler_maruyama", FLOW, {"steps": 200, "last_step_size": 0.005}),
    ("dopri5", FLOW, {}),
    ("euler_ancestral", EDM, {"steps": 400}),
    ("heun", EDM, {"steps": 40}),
    ("heun", EDM, {"steps": 100, "churn": 30, "churn_min": 0.01, "churn_max": 10}),
]


@pytest.mark.parametrize("data", ["gaussian", "mixture"])
@pytest.mark.parametrize(
    "name, schedule, options", CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_mean_and_variance(name, schedule, options, data, exact):
    estimate = {"gaussian": exact.gaussian, "mixture": exact.mixture}[data]
    mean, variance = (0.2, 0.09) if data == "gaussian" else (exact.mean, exact.variance)
    denoise = exact.denoiser(schedule, estimate)
    s = SAMPLERS[name](schedule, **options)
    if s.learned_variance:  # an output of -1 is the posterior's variance
        inner, denoise = denoise, lambda x, t: (inner(x, t), jnp.full_like(x, -1.0))

    @jax.jit
    def draw(key):
        first, steps = jax.random.split(key)
        keys = jax.random.split(first, EXAMPLES[0])
        x = s.prior_std * ks.normal(keys, EXAMPLES)
        return sample(s, denoise, x, jax.random.split(steps, EXAMPLES[0]))

    x = np.asarray(draw(jax.random.key(11)), np.float64)
    n = x.size
    fourth = 3 * variance**2  # of a Gaussian; more than the mixture's
    assert abs(x.mean() - mean) < 4 * np.sqrt(variance / n) + 1e-3
    # 1% for the discretisation, beside four standard errors
    assert abs(x.var() - variance) < 4 * np.sqrt((fourth - variance**2) / n) + 0.01 * variance


@pytest.mark.parametrize(("name", "options"), [("ddim", {}), ("heun", {}), ("heun", {"churn": 40})])
def test_estimates_are_asked_at_the_levels_of_their_states(name, options):
    """A state of a trajectory lies at the level that its step begins at, before any churn."""
    schedule = schedules.EDM()
    method, plain = SAMPLERS[name](schedule, 6, **options), SAMPLERS[name](schedule, 6)
    assert len(plain.rows["t"]) == (6 if name == "ddim" else 11)
    told = estimates(method, lambda x, t: t[:, None] + 0 * x, jnp.zeros((7, 1, 1)))
    wanted = plain.rows["t"][:: 1 if name == "ddim" else 2]
    np.testing.assert_allclose(told[:, 0, 0], wanted, rtol=1e-6)
    assert bool(options) == (float(method.rows["t"][0]) > float(wanted[0]) * 1.001)
