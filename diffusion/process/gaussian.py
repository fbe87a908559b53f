r"""The Gaussian process: noising, its posterior, and what a network may predict.

    q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I)                                     (1), DDPM eq. 4

For two levels s < t, with a = alpha_t / alpha_s and b^2 = sigma_t^2 - a^2 sigma_s^2,

    q(x_t | x_s) = N(a x_s, b^2 I)                                                 (2), DDPM eq. 2
    q(x_s | x_t, x_0) = N(a sigma_s^2/sigma_t^2 x_t + alpha_s b^2/sigma_t^2 x_0,
                          b^2 sigma_s^2/sigma_t^2 I)                               (3), DDPM eq. 6-7

(variance preserving, s = t-1: b^2 = beta_t). A network predicts one of

    eps        the noise                                                 DDPM, arXiv:2006.11239
    x0         the data
    v          alpha eps - sigma x_0                  progressive distillation, arXiv:2202.00512
    velocity   eps - x_0                              rectified flow, arXiv:2209.03003
    edm        F = (sigma x_0 - alpha d^2 eps) / (d n), n^2 = sigma^2 + alpha^2 d^2, d = sigma_data
                                                      EDM eq. 7, arXiv:2206.00364, for any alpha

Every prediction is linear in (x_0, eps) and, with (1), determines both; so a conversion is "to the
pair" followed by "from the pair":

    eps:      x_0 = (x_t - sigma eps) / alpha                                      (4)
    x0:       eps = (x_t - alpha x_0) / sigma                                      (5)
    v:        x_0 = (alpha x_t - sigma v) / m,  eps = (sigma x_t + alpha v) / m
              with m = alpha^2 + sigma^2
    velocity: x_0 = (x_t - sigma u) / (alpha + sigma),  eps = (x_t + alpha u) / (alpha + sigma)
    edm:      x_0 = (alpha d^2 x_t / n + sigma d F) / n,  eps = (sigma x_t / n - alpha d F) / n

(4) alone is singular at alpha = 0 and (5) alone at sigma = 0; v, velocity and edm never are.

DDPM's first choice (section 3.2), "mu", the mean of (3) from t to s = t-1, is linear in (x_t, x_0)
with factors c_x, c_0 that t alone does not tell, but its schedule: it is read as x_0,

    mu:       x_0 = (mu - c_x x_t) / c_0                                           (6)
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from diffusion.process.continuous import edm_norm
from diffusion.process.schedules import Schedule

PREDICTIONS = ("eps", "x0", "v", "velocity", "edm")
Network = Callable[..., Array]
Denoise = Callable[..., Any]


def expand(values: Any, like: Array) -> Array:
    """values, () or (batch,), shaped and typed to multiply ``like`` (batch, ...)."""
    values = jnp.asarray(values, like.dtype)
    return (
        values.reshape(values.shape + (1,) * (like.ndim - values.ndim)) if values.ndim else values
    )


def q_sample(
    schedule: Schedule,
    x0: Float[Array, "batch *shape"],
    t: Shaped[Array, "#batch"],
    eps: Float[Array, "batch *shape"],
) -> Float[Array, "batch *shape"]:
    """x_t = alpha(t) x_0 + sigma(t) eps (eq. 1)."""
    return expand(schedule.alpha(t), x0) * x0 + expand(schedule.sigma(t), x0) * eps


def transition(alpha: np.ndarray, sigma: np.ndarray) -> dict[str, np.ndarray]:
    """Coefficients of eq. 3 between each level and the next, cleaner one; NumPy float64.

    ``alpha``, ``sigma``: (n+1,), noise first. Returns arrays (n,): ``x`` and ``x0`` multiply x_t
    and x_0 in the mean, ``variance`` is eq. 3's, ``noise_variance`` is b^2.
    """
    a = alpha[:-1] / alpha[1:]
    noise = sigma[:-1] ** 2 - a**2 * sigma[1:] ** 2
    keep = sigma[1:] ** 2 / sigma[:-1] ** 2
    return {
        "x": a * keep,
        "x0": alpha[1:] * noise / sigma[:-1] ** 2,
        "variance": noise * keep,
        "noise_variance": noise,
    }


def posterior_tables(schedule: Schedule) -> dict[str, np.ndarray]:
    """Eq. 3 from t to t-1 for t = 0..T-1 (t-1 = -1 is clean data), each (T,), float64.

    As ``transition``, with ``log_variance`` (the variance at t = 0, which is 0, replaced by that
    at t = 1) and ``log_noise_variance`` (fixed_large: log beta, its first entry likewise
    replaced), as in the authors' diffusion_utils_2.py.
    """
    if not schedule.num_steps or not schedule.variance_preserving:
        raise ValueError(
            f"schedule={type(schedule).__name__} has no posterior per step: the "
            "variational bound needs a discrete variance-preserving schedule, as ddpm_linear"
        )
    t = np.arange(schedule.num_steps)[::-1]
    alpha = np.append(np.asarray(schedule.alpha(t)), 1.0)
    sigma = np.append(np.asarray(schedule.sigma(t)), 0.0)
    tables = {name: table[::-1].copy() for name, table in transition(alpha, sigma).items()}
    noise = tables["noise_variance"]
    first = tables["variance"][1] if noise.size > 1 else noise[0]
    tables["log_variance"] = np.log(np.append(first, tables["variance"][1:]))
    tables["log_noise_variance"] = np.log(np.append(first, noise[1:]))
    tables["log_beta"] = np.log(noise)
    return tables


def posterior(
    schedule: Schedule,
    x0: Float[Array, "batch *shape"],
    x_t: Float[Array, "batch *shape"],
    t: Shaped[Array, "batch"],
) -> tuple[Array, Array]:
    """Mean (batch, ...) and clipped log-variance (batch,) of q(x_{t-1} | x_t, x_0) (DDPM eq. 7)."""
    tables = posterior_tables(schedule)

    def gather(name: str) -> Array:
        return jnp.asarray(tables[name], x0.dtype)[t]

    mean = expand(gather("x"), x0) * x_t + expand(gather("x0"), x0) * x0
    return mean, gather("log_variance")


def _pair_from_eps(eps, x, a, s, d):
    return (x - s * eps) / a, eps


def _pair_from_x0(x0, x, a, s, d):
    return x0, (x - a * x0) / s


def _pair_from_v(v, x, a, s, d):
    m = a**2 + s**2
    return (a * x - s * v) / m, (s * x + a * v) / m


def _pair_from_velocity(u, x, a, s, d):
    return (x - s * u) / (a + s), (x + a * u) / (a + s)


def _pair_from_edm(f, x, a, s, d):
    n = edm_norm(a, s, d)
    return (a * d**2 * x / n + s * d * f) / n, (s * x / n - a * d * f) / n


# name: (to the pair (x0, eps), from the pair)
CONVERSIONS: dict[str, tuple[Callable, Callable]] = {
    "eps": (_pair_from_eps, lambda x0, eps, a, s, d: eps),
    "x0": (_pair_from_x0, lambda x0, eps, a, s, d: x0),
    "v": (_pair_from_v, lambda x0, eps, a, s, d: a * eps - s * x0),
    "velocity": (_pair_from_velocity, lambda x0, eps, a, s, d: eps - x0),
    "edm": (
        _pair_from_edm,
        lambda x0, eps, a, s, d: (s * x0 - a * d**2 * eps) / (d * edm_norm(a, s, d)),
    ),
}


def check_prediction(prediction: str, argument: str = "prediction") -> str:
    """The name itself, or ValueError, which names the argument."""
    if prediction not in CONVERSIONS:
        raise ValueError(
            f"{argument}={prediction!r} is unknown: choose one of {', '.join(PREDICTIONS)}"
        )
    return prediction


def known(prediction: str, schedule: Schedule) -> str:
    """The name itself, once it and what it needs of the schedule are known to be."""
    if prediction == "mu":
        posterior_tables(schedule)
        return prediction
    return check_prediction(prediction)


def convert(
    output: Float[Array, "batch *shape"],
    source: str,
    target: str,
    x_t: Float[Array, "batch *shape"],
    alpha: Any,
    sigma: Any,
    sigma_data: float | int = 0.5,
) -> Float[Array, "batch *shape"]:
    """One prediction type as another.

    ``alpha``, ``sigma``: () or (batch,). ``sigma_data`` matters to "edm" only. Where source and
    target agree the output is returned untouched.
    """
    to_pair, _ = CONVERSIONS[check_prediction(source, "source")]
    _, from_pair = CONVERSIONS[check_prediction(target, "target")]
    if source == target:
        return output
    a, s = expand(alpha, x_t), expand(sigma, x_t)
    return from_pair(*to_pair(output, x_t, a, s, sigma_data), a, s, sigma_data)


def targets(
    prediction: str, x0: Array, eps: Array, alpha: Any, sigma: Any, sigma_data: float | int = 0.5
) -> Array:
    """What a network of this prediction should have said, from the true x_0 and eps."""
    _, from_pair = CONVERSIONS[check_prediction(prediction)]
    return from_pair(x0, eps, expand(alpha, x0), expand(sigma, x0), sigma_data)


def apply_network(
    network: Network,
    schedule: Schedule,
    prediction: str,
    x_t: Array,
    t: Shaped[Array, "batch"],
    s: Shaped[Array, "batch"] | None = None,
) -> Array:
    """network(scaled x_t, conditioning of t [and of s]): c_in and c_noise of EDM Table 1, else x_t
    and t. s: where a jump ends, of a network of two times (`few_steps.py`).
    """
    times = [jnp.asarray(schedule.conditioning(time)) for time in (t, s) if time is not None]
    if prediction == "edm":
        alpha, sigma = jnp.asarray(schedule.alpha(t)), jnp.asarray(schedule.sigma(t))
        scale = 1 / edm_norm(alpha, sigma, schedule.sigma_data)
    elif schedule.num_steps is not None:
        return network(x_t, *times)
    else:
        scale = schedule.input_scale(t)
    return network(expand(scale, x_t) * x_t, *times)


def plain(
    output: Array, prediction: str, schedule: Schedule, x_t: Array, t: Shaped[Array, "batch"]
) -> tuple[Array, str, Array | float]:
    """A network's output as a prediction of CONVERSIONS, its name, and how often its error is in
    the output's: (output, prediction, 1), of "mu" (x_0 by eq. 6, "x0", c_0)."""
    if prediction != "mu":
        return output, check_prediction(prediction), 1.0
    tables = posterior_tables(schedule)
    of_x, of_x0 = (jnp.asarray(tables[name], x_t.dtype)[t] for name in ("x", "x0"))
    return (output - expand(of_x, x_t) * x_t) / expand(of_x0, x_t), "x0", of_x0


def split_variance(output: Array, x: Array, learned: bool) -> tuple[Array, Array | None]:
    """(prediction, variance output or None), or ValueError where the channels do not fit."""
    channels, expected = output.shape[-1], x.shape[-1] * (2 if learned else 1)
    if channels != expected:
        raise ValueError(
            f"the network has {channels} output channels for {x.shape[-1]} of data, but "
            f"{'learned' if learned else 'fixed'} variance needs {expected}: choose "
            f"{'fixed_large' if learned else 'learned'} or change the network"
        )
    if not learned:
        return output, None
    mean, variance = jnp.split(output, 2, axis=-1)
    return mean, variance


def check_terminal(schedule: Schedule, prediction: str) -> None:
    """ValueError where the prediction says nothing of x_0 at the greatest t (eps at alpha = 0)."""
    alpha = float(schedule.alpha(np.asarray(schedule.time_range[1])))
    if prediction == "eps" and alpha == 0:
        raise ValueError(
            "prediction='eps' cannot give x0 on a schedule whose last alpha is 0 (zero "
            "terminal SNR, rectified flow), since eq. 4 divides by alpha: predict 'v', 'x0' or "
            "'velocity'"
        )


def make_denoise(
    network: Network, schedule: Schedule, prediction: str, *, learned_variance: bool = False
) -> Denoise:
    """denoise(x_t, t) -> x_0 estimate, from network(x_t, t) -> output of that prediction type.

    x_t: (batch, *space, channels); t: (batch,). With ``learned_variance`` the network has twice
    the channels and denoise returns (x_0, variance output). denoise(x_t, t, s) asks a network of
    two times for the x_0 of a jump to s (`few_steps.py`). Raises ValueError for an unknown
    prediction, eps at zero terminal SNR, and a wrong number of channels.
    """
    check_terminal(schedule, known(prediction, schedule))

    def denoise(x_t: Array, t: Array, *s: Array) -> Any:
        output = apply_network(network, schedule, prediction, x_t, t, *s)
        output, variance = split_variance(output, x_t, learned_variance)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        output, kind, _ = plain(output.astype(x_t.dtype), prediction, schedule, x_t, t)
        x0 = convert(output, kind, "x0", x_t, alpha, sigma, schedule.sigma_data)
        return (x0, variance.astype(x_t.dtype)) if variance is not None else x0

    return denoise
