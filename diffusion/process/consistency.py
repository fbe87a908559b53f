r"""Consistency training, tuning and distillation, and progressive distillation (`few_steps.py`).

A jump is also a shorter one, by v from t to r, and the rest of it:

    (tau_t - tau_s) u(x_t, t, s) = (tau_t - tau_r) v + (tau_r - tau_s) u(x_r, r, s).          (1)

With s clean data, u is the velocity of a consistency function f = y_t - tau_t u (consistency
models, arXiv:2303.01469), and (1), its right-hand side held fixed, is consistency training where v
is of data, distillation where it is a teacher's, and with any s that of trajectories
(arXiv:2310.02279). The least time of a schedule stands for clean data.
Consistency tuning (ECT, arXiv:2406.14548) starts from a trained network, on EDM's schedule with

    r = max(0, t (1 - n(t) / q^a)),   n(t) = 1 + 8 sigmoid(-t),  a = 1 + floor(step / d)      (2)
    (sqrt(|f - f_r|^2 + c^2) - c) (t^2 + sigma_data^2) / (t sigma_data)^2                     (3)

(locuslab/ect: training/loss.py). The pseudo-Huber norm is iCT's (arXiv:2310.14189, section 3.3),
which starts from nothing, weighs it by 1 / (sigma_t - sigma_r), and has for t and r neighbours of
the N + 1 levels of EDM's sampler, N doubling (its section 3.4), the two that a level of
ln sigma ~ N(P_mean, P_std^2) falls between (its section 3.5, whose erf is that distribution's).
With the teacher's velocity for the rest, too, it is progressive distillation (arXiv:2202.00512).

Where the steps are infinitely small (sCM, arXiv:2410.11081) the target is a derivative. TrigFlow's
angle is a = arctan(sigma / (alpha d)) on any schedule, d = sigma_data, and its scaled x_t is
z = x_t / n, n = |(sigma, alpha d)|. With F of ``gaussian``'s "edm" (sCM's has the other sign) and
F_v that of v,

    f / d = z cos a + F sin a,   df/da = d (cos a (F - F_v) - sin a (z - dF/da))               (4)
    |F - held(F) + g / (|g| + c)|^2,   g = cos a df/da, held                                   (5)

(its eq. 8 and section 4.2; sin a grows in (4) over the first steps). Their learned weight of t is
not here: (5) has as good as the same value at every t.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from diffusion.process import few_steps, gaussian, losses
from diffusion.process.continuous import edm_norm
from diffusion.process.few_steps import held
from diffusion.process.keys import stream
from diffusion.process.schedules import EDM


def _jump(u: Array, parts: tuple[Array, Array], v: Array, rest: Array) -> Array:
    """u less eq. 1's target; ``parts``: the lengths in tau of its two parts."""
    first, second = parts
    share = jnp.where(first + second > 0, first / jnp.maximum(first + second, 1e-30), 1.0)
    share = gaussian.expand(share, u)
    rest = jnp.where(share < 1, rest, v)  # where nothing is left, it may not be finite
    return u - held(share * v + (1 - share) * rest)


@dataclasses.dataclass(frozen=True)
class Consistency(few_steps.Method):
    """Consistency training from data, or distillation of a teacher: eq. 1.

    clean: the share of draws whose jump ends at clean data; below 1 for networks of two times. r is
    t less ``skip`` of the time range, or where skip is 0 ECT's of eq. 2, its t being sigma / alpha
    of any schedule, whose steps are made q times smaller every ``double_steps`` steps of training
    (0: never). levels: iCT's least and greatest N in place of that, doubled as often. The error is
    weighed as MeanFlow's where ``power`` is given, else by eq. 3 with c = ``huber``, or iCT's.
    """

    prediction: str = "edm"
    _: dataclasses.KW_ONLY
    clean: float | int = 1.0
    skip: float | int = 0.0
    q: float | int = 2.0
    double_steps: int = 0
    levels: tuple[int, ...] = ()
    huber: float | int = 0.0
    power: float | int = 0.0
    offset: float | int = 1e-3

    def __post_init__(self):
        super().__post_init__()
        _check_guidance(self)
        if not 0 <= self.clean <= 1:
            raise ValueError(f"clean={self.clean} is a share of the draws: give one in [0, 1]")
        if self.levels and (len(self.levels) != 2 or not 1 <= self.levels[0] <= self.levels[1]):
            raise ValueError(f"levels={self.levels} must be a least and a greatest number, or ()")
        if self.levels and self.times:
            raise ValueError(f"times={self.times!r}, but levels draw times of their own: set ''")
        given = 0 < self.skip < 1 and not self.levels
        by_level = self.skip == 0 and (
            isinstance(self.schedule, EDM) if self.levels else self.q > 1
        )
        if not given and not by_level:
            raise ValueError(
                f"skip={self.skip} must lie in (0, 1), or be 0 with q > 1 (ECT's steps) or with "
                "levels of EDM's schedule or TrigFlow (iCT's)"
            )

    def loss(self, network: Any, x0: Array, triple: Array, noise: Array) -> tuple[Array, dict]:
        t, r, s = triple.T
        x_t = gaussian.q_sample(self.schedule, x0, t, noise)
        v = self.wanted(network, x0, noise, x_t, t)
        end = () if self.clean == 1 else (s,)
        u = self.of(network, x_t, t, *end)
        rest = self.of(network, self.moved(x_t, t, r, v), r, *end)
        parts = self.tau(t) - self._end(r), self._end(r) - self._end(s)
        error = _jump(u, parts, v, rest)
        if self.power:
            return few_steps.weighed(error, self.power, self.offset)
        alpha, sigma = jnp.asarray(self.schedule.alpha(t)), jnp.asarray(self.schedule.sigma(t))
        error = gaussian.expand(self.tau(t), x_t) * error
        square = jnp.sum(error.reshape(len(error), -1) ** 2, axis=1)
        w = losses.weight("edm", "x0", alpha, sigma, sigma_data=self.schedule.sigma_data)
        if self.levels:
            w = 1 / (self._level(t) - self._level(r))
        value = w * (jnp.sqrt(square + self.huber**2 + 1e-20) - self.huber)
        return value, {"mse": square / error[0].size}

    def _end(self, t: Array) -> Array:
        """tau of a jump's end: the least time stands for clean data."""
        return jnp.where(t > self.schedule.time_range[0], self.tau(t), 0.0)

    def draw(self, keys: Key[Array, "batch"], x0: Array, step: Any = 0) -> tuple[Array, Array]:
        low, high = self.schedule.time_range
        t, s = self.two_times(keys)
        if self.clean == 1:
            t = self.drawn(keys)
        stage = jnp.asarray(step) // (self.double_steps or 2**30)
        ends = jax.vmap(jax.random.uniform)(stream(keys, few_steps.EQUAL_PURPOSE)) < self.clean
        s = jnp.where(ends, low, s)
        if self.skip:
            r = t - self.skip * (high - low)
        elif self.levels:
            t, r = self._neighbours(keys, stage)
        else:
            logsnr = jnp.asarray(self.schedule.logsnr(t))
            nearer = 8 * jax.nn.sigmoid(-jnp.exp(-0.5 * logsnr))
            nearer = 1 - (1 + nearer) / self.q ** (stage + 1.0)
            r = self.schedule.time(logsnr - 2 * jnp.log(jnp.maximum(nearer, 1e-30)))
            r = jnp.minimum(jnp.where(nearer > 0, r, low), t)  # steps below the rounding of a time
        triple = jnp.stack([t, jnp.maximum(r, s), s], axis=1)
        return triple.astype(jnp.result_type(float)), losses.noise_like(keys, x0)

    def _level(self, t: Array) -> Array:
        """sigma over alpha, EDM's t."""
        return jnp.asarray(self.schedule.sigma(t)) / jnp.asarray(self.schedule.alpha(t))

    def _neighbours(self, keys: Key[Array, "batch"], stage: Array) -> tuple[Array, Array]:
        """iCT's t and r."""
        process: Any = self.schedule
        ends = np.asarray([process.sigma_min, process.sigma_max], np.float64)
        below, above = (np.log(ends) - process.p_mean) / process.p_std
        unit = functools.partial(jax.random.truncated_normal, lower=below, upper=above)
        drawn = jax.vmap(unit)(stream(keys, losses.TIME_PURPOSE))
        low, high = ends ** (1 / process.rho)
        number = jnp.minimum(self.levels[0] * 2.0**stage, self.levels[1])
        place = jnp.exp((process.p_mean + process.p_std * drawn) / process.rho)
        place = jnp.clip(jnp.floor((place - low) / (high - low) * number), 0, number - 1)
        roots = (low + (place + k) / number * (high - low) for k in (1, 0))
        t, r = (jnp.asarray(process.time(-2 * process.rho * jnp.log(root))) for root in roots)
        return t, jnp.where(place == 0, process.time_range[0], r)


def _check_guidance(method: few_steps.Method) -> None:
    if not method.teacher and (method.guidance_scale != 1 or method.guidance_mix):
        raise ValueError(
            f"guidance_scale={method.guidance_scale}, guidance_mix={method.guidance_mix} without a "
            "teacher, but a consistency function has no velocity to guide: set them to 1 and 0, or "
            "give a teacher"
        )


@dataclasses.dataclass(frozen=True)
class ContinuousConsistency(few_steps.Method):
    """sCM, from data or a teacher: eq. 4 and 5, whose second "time" is the share of sin a.

    offset: c; 0: g as it is. warmup_steps: in which that share grows to 1; 0: it is.
    """

    prediction: str = "edm"
    _: dataclasses.KW_ONLY
    offset: float | int = 0.1
    warmup_steps: int = 10_000

    forward_mode: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        _check_guidance(self)
        if self.offset < 0 or self.warmup_steps < 0:
            raise ValueError(
                f"offset={self.offset}, warmup_steps={self.warmup_steps}: neither may be below 0"
            )

    def loss(self, network: Any, x0: Array, pair: Array, noise: Array) -> tuple[Array, dict]:
        t, share = pair.T
        d = self.schedule.sigma_data
        x_t = gaussian.q_sample(self.schedule, x0, t, noise)
        v = self.wanted(network, x0, noise, x_t, t)
        output, slope = self.along(lambda x, t: self.of(network, x, t, target="edm"), x_t, t, v)
        _, angle_slope = jax.jvp(self._angle, (t,), (jnp.ones_like(t),))
        cos, sin = (gaussian.expand(f(self._angle(t)), x_t) for f in (jnp.cos, jnp.sin))
        off = output - self.converted(v, "velocity", "edm", x_t, t)
        n = edm_norm(jnp.asarray(self.schedule.alpha(t)), jnp.asarray(self.schedule.sigma(t)), d)
        z = x_t / gaussian.expand(n, x_t)
        bend = z - slope / gaussian.expand(angle_slope, x_t)
        g = held(d * cos * (cos * off - gaussian.expand(share, x_t) * sin * bend))
        square = jnp.sum(g.reshape(len(g), -1) ** 2, axis=1)
        unit = g / gaussian.expand(jnp.sqrt(square) + self.offset, x_t) if self.offset else g
        error = output - held(output) + unit
        value, mse = jnp.mean(error.reshape(len(g), -1) ** 2, axis=1), square / g[0].size
        return held(mse - value) + value, {"mse": mse}

    def _angle(self, t: Array) -> Array:
        alpha, sigma = jnp.asarray(self.schedule.alpha(t)), jnp.asarray(self.schedule.sigma(t))
        return jnp.arctan2(sigma, self.schedule.sigma_data * alpha)

    def draw(self, keys: Key[Array, "batch"], x0: Array, step: Any = 0) -> tuple[Array, Array]:
        t = self.drawn(keys)
        share = jnp.minimum(jnp.asarray(step) / (self.warmup_steps or 1), 1.0)
        share = share if self.warmup_steps else 1.0
        pair = jnp.stack([t, jnp.broadcast_to(share, t.shape)], axis=1)
        return pair.astype(jnp.result_type(float)), losses.noise_like(keys, x0)


@dataclasses.dataclass(frozen=True)
class Progressive(few_steps.Method):
    """Progressive distillation to ``steps`` steps of DDIM, from a teacher's twice as many: eq. 1,
    its rest the teacher's too; the error of x_0 times max(SNR, 1) (arXiv:2202.00512 section 4).
    """

    prediction: str = "v"
    _: dataclasses.KW_ONLY
    steps: int = 1

    def __post_init__(self):
        super().__post_init__()
        if not self.teacher or self.times or self.steps < 1:
            raise ValueError(
                f"teacher={self.teacher!r}, times={self.times!r}, steps={self.steps}: it needs a "
                "teacher's prediction, draws times of its own (leave process.times empty), and at "
                "least 1 step"
            )

    def loss(self, network: Any, x0: Array, triple: Array, noise: Array) -> tuple[Array, dict]:
        t, m, r = triple.T
        x_t = gaussian.q_sample(self.schedule, x0, t, noise)
        v = self.wanted(network, x0, noise, x_t, t)
        rest = self.wanted(network, x0, noise, self.moved(x_t, t, m, v), m)
        end = jnp.where(r > self.schedule.time_range[0], self.tau(r), 0.0)
        parts = self.tau(t) - self.tau(m), self.tau(m) - end
        error = _jump(self.of(network, x_t, t), parts, v, rest)
        square = jnp.sum(error.reshape(len(error), -1) ** 2, axis=1) / error[0].size
        return jnp.maximum(1 - self.tau(t), self.tau(t)) ** 2 * square, {"mse": square}

    def draw(self, keys: Key[Array, "batch"], x0: Array, step: Any = 0) -> tuple[Array, Array]:
        low, high = self.schedule.time_range
        place = functools.partial(jax.random.randint, shape=(), minval=0, maxval=self.steps)
        i = jax.vmap(place)(stream(keys, losses.TIME_PURPOSE))[:, None]
        triple = high - (high - low) * (i + jnp.asarray([[0.0, 0.5, 1.0]])) / self.steps
        triple = jnp.round(triple) if self.schedule.num_steps is not None else triple
        return triple.astype(jnp.result_type(float)), losses.noise_like(keys, x0)
