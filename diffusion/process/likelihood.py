r"""The variational bound on -log p(x_0), in bits per dimension, as DDPM computes it.

    -log p(x_0) <= L_T + sum_{t>1} L_{t-1} + L_0                              (1), DDPM eq. 5
    L_T     = KL(q(x_T | x_0) || N(0, I))                                     (2)
    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))                   (3)
    L_0     = -log p(x_0 | x_1), a Gaussian discretised to 256 levels:
              the mass of N(mean, std) within 1/255 of x, the outermost levels
              reaching to -inf and +inf                                       (4), DDPM eq. 13

with the normal CDF approximated by (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) / 2, as in the
authors' diffusion_tf/utils.py: the error is below 5e-4 in probability. The model's variance is
fixed_small (the posterior's), fixed_large (beta, and the posterior's at t = 1 for the first step)
or learned,

    log variance = f log beta + (1 - f) log posterior variance, f = (v + 1) / 2
                                                              (5), Improved DDPM eq. 15

for a network output v (arXiv:2102.09672). Steps are t = 0..T-1: L_0 is the term at t = 0.
DDPM: arXiv:2006.11239.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Shaped

from diffusion.process import gaussian
from diffusion.process.keys import normal, stream
from diffusion.process.schedules import Schedule

VARIANCES = ("fixed_small", "fixed_large", "learned")


def normal_kl(mean_p: Array, logvar_p: Array, mean_q: Array, logvar_q: Array) -> Array:
    """KL(N(mean_p, e^logvar_p) || N(mean_q, e^logvar_q)) elementwise, in nats."""
    return 0.5 * (
        logvar_q
        - logvar_p
        + jnp.exp(logvar_p - logvar_q)
        + (mean_p - mean_q) ** 2 * jnp.exp(-logvar_q)
        - 1
    )


def _normal_cdf(z: Array) -> Array:
    return 0.5 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def discretized_log_likelihood(
    x: Float[Array, "batch *shape"], mean: Array, log_std: Array
) -> Float[Array, "batch *shape"]:
    """log of eq. 4 elementwise, in nats; x holds 256 levels from -1 to 1."""
    centred, inverse_std = x - mean, jnp.exp(-log_std)
    upper = _normal_cdf((centred + 1 / 255) * inverse_std)
    lower = _normal_cdf((centred - 1 / 255) * inverse_std)
    mass = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(mass, 1e-12))


def check_variance(variance: str) -> str:
    """The name itself, or ValueError."""
    if variance not in VARIANCES:
        raise ValueError(f"variance={variance!r} is unknown: choose one of {', '.join(VARIANCES)}")
    return variance


def log_variance(
    tables: dict[str, np.ndarray], t: Array, variance: str, output: Array | None, like: Array
) -> Array:
    """The model's log-variance at t (batch,), shaped to combine with ``like`` (eq. 5)."""

    def gather(name: str) -> Array:
        return gaussian.expand(jnp.asarray(tables[name], like.dtype)[t], like)

    if check_variance(variance) == "fixed_small":
        return gather("log_variance")
    if variance == "fixed_large":
        return gather("log_noise_variance")
    if output is None:
        raise ValueError(
            "variance='learned' needs a denoise that returns (x0, variance output): make it with "
            "learned_variance=True, or choose fixed_large"
        )
    fraction = (output + 1) / 2
    return fraction * gather("log_beta") + (1 - fraction) * gather("log_variance")


def bound_term(
    schedule: Schedule,
    x0: Float[Array, "batch *shape"],
    x_t: Float[Array, "batch *shape"],
    t: Shaped[Array, "batch"],
    estimate: Float[Array, "batch *shape"],
    variance: str = "fixed_large",
    variance_output: Array | None = None,
) -> Float[Array, "batch"]:
    """L_{t-1} of eq. 3, or L_0 of eq. 4 where t = 0: bits per dimension, (batch,).

    ``estimate`` is the model's x_0, ``variance_output`` its v where the variance is learned.
    """
    tables = gaussian.posterior_tables(schedule)
    true_mean, true_logvar = gaussian.posterior(schedule, x0, x_t, t)
    mean, _ = gaussian.posterior(schedule, estimate, x_t, t)
    logvar = log_variance(tables, t, variance, variance_output, x0)
    logvar = jnp.broadcast_to(logvar, x0.shape)
    kl = normal_kl(true_mean, gaussian.expand(true_logvar, x0), mean, logvar)
    decoder = -discretized_log_likelihood(x0, mean, 0.5 * logvar)
    return _bits(jnp.where(gaussian.expand(t, x0) == 0, decoder, kl))


def _bits(nats: Array) -> Array:
    return jnp.mean(nats.reshape(nats.shape[0], -1), axis=1) / np.log(2)


def prior_term(schedule: Schedule, x0: Float[Array, "batch *shape"]) -> Float[Array, "batch"]:
    """L_T of eq. 2, bits per dimension, (batch,)."""
    last = np.asarray(schedule.time_range[1])
    alpha, sigma = float(schedule.alpha(last)), float(schedule.sigma(last))
    logvar = jnp.asarray(2 * np.log(sigma), x0.dtype)
    zero = jnp.zeros((), x0.dtype)
    return _bits(normal_kl(alpha * x0, logvar, zero, zero))


def bits_per_dim(
    denoise: gaussian.Denoise,
    schedule: Schedule,
    x0: Float[Array, "batch *shape"],
    keys: Key[Array, "batch"],
    variance: str = "fixed_large",
) -> dict[str, Array]:
    """The whole bound (eq. 1) of each example and its parts, one network evaluation a step.

    denoise(x_t, t) -> x_0 (clip it with ``guidance.clip_x0``, as DDPM does), or
    (x_0, variance output) for a learned variance; ``keys`` give the noise of each example.

    Returns ``bits_per_dim`` (batch,), ``prior`` (batch,), ``terms`` (batch, T) with L_0 at t = 0,
    and ``x0_mse`` (batch, T). Raises ValueError on a schedule that is not discrete and variance
    preserving.
    """
    gaussian.posterior_tables(schedule)  # refuse other schedules before any work
    check_variance(variance)

    def body(_: None, step: Array) -> tuple[None, Any]:
        return None, _term(denoise, schedule, x0, keys, step, variance)

    _, (terms, errors) = jax.lax.scan(body, None, jnp.arange(schedule.num_steps))
    prior = prior_term(schedule, x0)
    return {
        "bits_per_dim": prior + terms.sum(0),
        "prior": prior,
        "terms": terms.T,
        "x0_mse": errors.T,
    }


def rate_distortion(
    prior: float, terms: Float[np.ndarray, "T"], x0_mse: Float[np.ndarray, "T"]
) -> dict[str, np.ndarray]:
    """Progressive lossy coding (DDPM, section 4.3, figure 5) by the parts of a bound, averaged.

    "rate": bits/dim that have brought x_t, the prior's and the terms after t. "distortion": of the
    x_0 estimated from it, the root of the mean squared error in levels of 0 to 255.
    """
    after = np.append(np.cumsum(terms[::-1])[::-1][1:], 0.0)
    return {"rate": prior + after, "distortion": 127.5 * np.sqrt(x0_mse)}


def _term(denoise, schedule, x0, keys, step, variance) -> tuple[Array, Array]:
    """The bound's term and the error of x_0 at one step, each (batch,)."""
    t = jnp.full(x0.shape[:1], step, jnp.int32)
    noise = normal(stream(keys, step), x0.shape, x0.dtype)
    x_t = gaussian.q_sample(schedule, x0, t, noise)
    out = denoise(x_t, t)
    estimate, output = out if isinstance(out, tuple) else (out, None)
    estimate = estimate.astype(x0.dtype)
    term = bound_term(schedule, x0, x_t, t, estimate, variance, output)
    return term, jnp.mean(((estimate - x0) ** 2).reshape(x0.shape[0], -1), axis=1)
