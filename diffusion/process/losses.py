r"""Training objectives. They take t and noise as arguments; ``draw`` draws them.

With x_t = alpha x_0 + sigma eps and a network that predicts y (any type of ``gaussian``),

    L = w(t) |y - y_true|^2      (or |.|_1), averaged over dimensions, per example            (1)

DDPM's L_simple (eq. 14, arXiv:2006.11239) is y = eps, w = 1. Weights are usually given on the
error of x_0, which is |y - y_true| / J(t) at fixed x_t, so w = w_{x_0} / J^2 with

    J:  eps alpha/sigma | x0 1 | v (alpha^2+sigma^2)/sigma | velocity (alpha+sigma)/sigma
        | edm n/(sigma d),  n^2 = sigma^2 + alpha^2 d^2,  d = sigma_data                      (2)

    simple    w = 1 in y's own space
    min_snr   w_{x_0} = min(SNR, gamma), SNR = alpha^2/sigma^2: eps min(SNR, gamma)/SNR,
              v min(SNR, gamma)/(SNR + 1)                       (Min-SNR §3.4, arXiv:2303.09556)
    velocity  w_{x_0} = (alpha + sigma)^2 / max(sigma, 0.05)^2: the error of the velocity, whatever
              is predicted                                        (JiT §3.3, arXiv:2511.13720)
    edm       w_{x_0} = n^2 / (sigma d)^2 (EDM eq. 8, arXiv:2206.00364); 1 for y = F
    vlb       the term of the variational bound at t, times T: its mean over uniform t is the bound
              in bits/dim without the prior's constant

Improved DDPM's hybrid (eq. 16, arXiv:2102.09672) trains the learned variance by 0.001 L_vlb beside
L_simple, the mean of the bound held fixed. Flow matching (arXiv:2210.02747; times of
arXiv:2403.03206 §3.1) is y = velocity with t uniform or logit-normal on (0, 1); EDM draws
ln sigma ~ N(-1.2, 1.2^2).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from diffusion.process import gaussian, likelihood
from diffusion.process.keys import normal, stream
from diffusion.process.schedules import EDM, Flow, Schedule

TIME_PURPOSE, NOISE_PURPOSE = 0x71DE, 0x4015E
NORMS = ("l2", "l1")
WEIGHTINGS = ("simple", "min_snr", "edm", "velocity", "vlb")
LEAST_SIGMA = 0.05  # of weighting "velocity": JiT's t_eps
Objective = Callable[..., tuple[Array, dict[str, Array]]]


def uniform_times(keys: Key[Array, "batch"], schedule: Schedule) -> Array:
    """(batch,) int32 uniform on 0..T-1, or float uniform on the schedule's range, then shifted."""
    if schedule.num_steps is not None:
        bounds = functools.partial(jax.random.randint, minval=0, maxval=schedule.num_steps)
        return jax.vmap(lambda key: bounds(key, (), dtype=jnp.int32))(keys)
    low, high = schedule.time_range
    t = jax.vmap(lambda key: jax.random.uniform(key, (), minval=low, maxval=high))(keys)
    return jnp.asarray(schedule.shifted(t)) if isinstance(schedule, Flow) else t


def lognormal_times(keys: Key[Array, "batch"], schedule: Schedule) -> Array:
    """EDM's training levels: sigma = exp(P_mean + P_std n), (batch,), as times of the schedule."""
    if not isinstance(schedule, EDM):
        raise ValueError(
            f"times='lognormal' draws levels sigma for EDM's schedule or TrigFlow, not for "
            f"{type(schedule).__name__}: choose uniform or logit_normal"
        )
    logsnr = -2 * (schedule.p_mean + schedule.p_std * normal(keys, keys.shape))
    return jnp.asarray(schedule.time(logsnr))


def logit_normal_times(
    keys: Key[Array, "batch"],
    schedule: Schedule,
    mean: float | int | None = None,
    std: float | int | None = None,
) -> Array:
    """t = sigmoid(mean + std n), (batch,): SD3's eq. 19, arXiv:2403.03206, then the schedule's
    shift. None: the schedule's."""
    if not isinstance(schedule, Flow):
        raise ValueError(
            f"times='logit_normal' draws t in (0, 1), which {type(schedule).__name__} "
            "does not run over: choose uniform, or the schedule flow"
        )
    mean = schedule.p_mean if mean is None else mean
    std = schedule.p_std if std is None else std
    return jnp.asarray(schedule.shifted(jax.nn.sigmoid(mean + std * normal(keys, keys.shape))))


TIMES: dict[str, Callable[..., Array]] = {
    "uniform": uniform_times,
    "lognormal": lognormal_times,
    "logit_normal": logit_normal_times,
}


def draw(
    keys: Key[Array, "batch"],
    schedule: Schedule,
    x0: Float[Array, "batch *shape"],
    times: str | None = None,
    **options: Any,
) -> tuple[Array, Array]:
    """(t (batch,), unit noise like x0), example i from keys[i] alone.

    ``times``: a name of ``TIMES``; None is lognormal for EDM and uniform otherwise. ``options`` go
    to the time sampler (``mean``, ``std`` of logit_normal).
    """
    times = times or ("lognormal" if isinstance(schedule, EDM) else "uniform")
    if times not in TIMES:
        raise ValueError(f"times={times!r} is unknown: choose one of {', '.join(TIMES)}")
    t = TIMES[times](stream(keys, TIME_PURPOSE), schedule, **options)
    return t, noise_like(keys, x0)


def noise_like(keys: Key[Array, "batch"], x0: Float[Array, "batch *shape"]) -> Array:
    """A training step's noise."""
    return normal(stream(keys, NOISE_PURPOSE), x0.shape, x0.dtype)


def squared_jacobian(prediction: str, alpha: Array, sigma: Array, sigma_data: float | int) -> Array:
    """sigma^2 J^2 of eq. 2: finite at both ends of every schedule."""
    n2 = sigma**2 + alpha**2 * sigma_data**2
    table = {
        "eps": lambda: alpha**2,
        "x0": lambda: sigma**2,
        "v": lambda: (alpha**2 + sigma**2) ** 2,
        "velocity": lambda: (alpha + sigma) ** 2,
        "edm": lambda: n2 / sigma_data**2,
    }
    return table[gaussian.check_prediction(prediction)]()


def weight(
    weighting: str,
    prediction: str,
    alpha: Float[Array, "batch"],
    sigma: Float[Array, "batch"],
    gamma: float | int = 5.0,
    sigma_data: float | int = 0.5,
) -> Float[Array, "batch"]:
    """w(t) of eq. 1 on the squared error of this prediction, (batch,)."""
    if weighting == "simple":
        return jnp.ones_like(sigma)
    if weighting == "min_snr":
        scaled = jnp.minimum(alpha**2, gamma * sigma**2)
    elif weighting == "velocity":
        scaled = (sigma * (alpha + sigma) / jnp.maximum(sigma, LEAST_SIGMA)) ** 2
    elif weighting == "edm":
        scaled = (sigma**2 + alpha**2 * sigma_data**2) / sigma_data**2
    else:
        raise ValueError(
            f"weighting={weighting!r} is unknown: choose one of {', '.join(WEIGHTINGS)}"
        )
    return scaled / squared_jacobian(prediction, alpha, sigma, sigma_data)


def objective(
    schedule: Schedule,
    prediction: str = "eps",
    *,
    norm: str = "l2",
    weighting: str = "simple",
    gamma: float | int = 5.0,
    cosine: float | int = 0.0,
    variance: str = "fixed_large",
    vlb_weight: float | int = 0.001,
) -> Objective:
    """The callable (network, x0, t, noise) -> (loss (batch,), aux).

    network(x_t, t) -> prediction (batch, ...), twice the channels for variance="learned"; x0 and
    noise: (batch, ...), t: (batch,). ``norm`` is l2 or l1. ``cosine`` times 1 - cos of the angle
    between prediction and target over channels is added (LightningDiT, arXiv:2501.01423).
    ``variance`` enters weighting="vlb", and "learned" adds ``vlb_weight`` times the bound to the
    other weightings (the hybrid). aux holds "mse", the unweighted error of the prediction (batch,),
    and "vlb", bits/dim times T (batch,), where it is computed. Raises ValueError for names,
    schedules and channels that do not fit.
    """
    _check(schedule, prediction, norm, weighting, variance)
    if cosine and (weighting == "vlb" or prediction == "mu"):
        raise ValueError(
            f"cosine={cosine} has no angle with weighting={weighting!r} and prediction="
            f"{prediction!r}: set it to 0"
        )

    def loss(network: gaussian.Network, x0: Array, t: Array, noise: Array):
        alpha, sigma = jnp.asarray(schedule.alpha(t)), jnp.asarray(schedule.sigma(t))
        x_t = gaussian.q_sample(schedule, x0, t, noise)
        output = gaussian.apply_network(network, schedule, prediction, x_t, t)
        output, v = gaussian.split_variance(output.astype(x0.dtype), x0, variance == "learned")
        output, kind, factor = gaussian.plain(output, prediction, schedule, x_t, t)
        target = gaussian.targets(kind, x0, noise, alpha, sigma, schedule.sigma_data)
        error = gaussian.expand(factor, x0) * (output - target)
        error = error.reshape(x0.shape[0], -1)
        aux = {"mse": jnp.mean(error**2, axis=1)}
        if weighting == "vlb" or variance == "learned":
            mean = output if weighting == "vlb" else jax.lax.stop_gradient(output)
            aux["vlb"] = _bound(schedule, kind, mean, v, x0, x_t, t, variance)
        if weighting == "vlb":
            return aux["vlb"], aux
        distance = aux["mse"] if norm == "l2" else jnp.mean(jnp.abs(error), axis=1)
        w = weight(weighting, prediction, alpha, sigma, gamma, schedule.sigma_data)
        total = w.astype(x0.dtype) * distance
        if cosine:
            total = total + cosine * _angle(output, target)
        return (total + vlb_weight * aux["vlb"] if variance == "learned" else total), aux

    return loss


def _angle(a: Array, b: Array) -> Array:
    """1 - cos over channels, its mean over places, (batch,)."""
    squares = jnp.sum(a**2, axis=-1) * jnp.sum(b**2, axis=-1)
    cos = jnp.sum(a * b, axis=-1) / jnp.sqrt(jnp.maximum(squares, 1e-16))  # networks start at 0
    return 1 - cos.reshape(len(a), -1).mean(axis=1)


def _bound(schedule, prediction, output, v, x0, x_t, t, variance) -> Array:
    """T times the bound's term at t, bits/dim."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    estimate = gaussian.convert(output, prediction, "x0", x_t, alpha, sigma, schedule.sigma_data)
    return schedule.num_steps * likelihood.bound_term(schedule, x0, x_t, t, estimate, variance, v)


def _check(schedule: Schedule, prediction: str, norm: str, weighting: str, variance: str) -> None:
    gaussian.check_terminal(schedule, gaussian.known(prediction, schedule))
    if prediction == "mu" and weighting not in ("simple", "vlb"):
        raise ValueError(
            f"weighting={weighting!r} is of other predictions than 'mu': use simple or vlb"
        )
    likelihood.check_variance(variance)
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown: choose one of {', '.join(NORMS)}")
    if weighting not in WEIGHTINGS:
        raise ValueError(
            f"weighting={weighting!r} is unknown: choose one of {', '.join(WEIGHTINGS)}"
        )
    if weighting == "vlb" or variance == "learned":
        gaussian.posterior_tables(schedule)
    if norm == "l1" and weighting != "simple":
        raise ValueError(
            f"norm='l1' with weighting={weighting!r}, which weighs squared errors: choose "
            "weighting simple, or norm l2"
        )


# Loss-second-moment resampling of t (Improved DDPM §3.3): p_t ~ sqrt(E[L_t^2]), from a history of
# the last losses of each t. Pure: the history (T, length) is state, NaN where nothing was seen.


def second_moment_history(schedule: Schedule, length: int = 10) -> Float[Array, "steps length"]:
    """An empty history (T, length); Improved DDPM keeps 10 losses a step."""
    gaussian.posterior_tables(schedule)
    return jnp.full((schedule.num_steps or 0, length), jnp.nan)


def second_moment_update(
    history: Float[Array, "steps length"], t: Int[Array, "batch"], losses: Float[Array, "batch"]
) -> Float[Array, "steps length"]:
    """The history with these losses pushed in, in order; the oldest of each step drop out."""

    def push(table: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        step, value = pair
        row = jnp.append(table[step, 1:], value)
        return table.at[step].set(row), None

    return jax.lax.scan(push, history, (t, losses.astype(history.dtype)))[0]


def second_moment_probabilities(
    history: Float[Array, "steps length"], uniform: float | int = 0.001
) -> Float[Array, "steps"]:
    """p_t (T,): uniform until every step has a full history; ``uniform`` is mixed in for ever."""
    steps = history.shape[0]
    moment = jnp.sqrt(jnp.mean(jnp.nan_to_num(history) ** 2, axis=1))
    p = (1 - uniform) * moment / jnp.maximum(moment.sum(), 1e-30) + uniform / steps
    full = jnp.all(jnp.isfinite(history))
    return jnp.where(full, p, jnp.full_like(p, 1 / steps))


def resampled_times(
    keys: Key[Array, "batch"], probabilities: Float[Array, "steps"]
) -> tuple[Int[Array, "batch"], Float[Array, "batch"]]:
    """(t (batch,), weight 1/(T p_t) (batch,)), which keeps the mean loss unbiased."""
    folded = stream(keys, TIME_PURPOSE)
    t = jax.vmap(lambda key: jax.random.categorical(key, jnp.log(probabilities)))(folded)
    t = t.astype(jnp.int32)
    return t, 1 / (probabilities.shape[0] * probabilities[t])
