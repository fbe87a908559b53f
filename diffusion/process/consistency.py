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

(locuslab/ect: training/loss.py; the pseudo-Huber norm is iCT's, arXiv:2310.14189, section 3.3).
With the teacher's velocity for the rest, too, it is progressive distillation (arXiv:2202.00512).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from diffusion.process import few_steps, gaussian, losses
from diffusion.process.keys import stream
from diffusion.process.schedules import EDM


def _jump(u: Array, parts: tuple[Array, Array], v: Array, rest: Array) -> Array:
    """u less eq. 1's target; ``parts``: the lengths in tau of its two parts."""
    first, second = parts
    share = jnp.where(first + second > 0, first / jnp.maximum(first + second, 1e-30), 1.0)
    share = gaussian.expand(share, u)
    rest = jnp.where(share < 1, rest, v)  # where nothing is left, it may not be finite
    return u - few_steps.held(share * v + (1 - share) * rest)


@dataclasses.dataclass(frozen=True)
class Consistency(few_steps.Method):
    """Consistency training from data, or distillation of a teacher: eq. 1.

    clean: the share of draws whose jump ends at clean data; below 1 for networks of two times. r is
    t less ``skip`` of the time range, or where skip is 0 ECT's of eq. 2, whose steps are made q
    times smaller every ``double_steps`` steps of training (0: never). The error is weighed as
    MeanFlow's where ``power`` is given, else by eq. 3 with c = ``huber``.
    """

    prediction: str = "edm"
    _: dataclasses.KW_ONLY
    clean: float | int = 1.0
    skip: float | int = 0.0
    q: float | int = 2.0
    double_steps: int = 0
    huber: float | int = 0.0
    power: float | int = 0.0
    offset: float | int = 1e-3

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.clean <= 1:
            raise ValueError(f"clean={self.clean} is a share of the draws: give one in [0, 1]")
        if not self.teacher and (self.guidance_scale != 1 or self.guidance_mix):
            raise ValueError(
                f"guidance_scale={self.guidance_scale}, guidance_mix={self.guidance_mix} without a "
                "teacher, but a consistency function has no velocity to guide: set them to 1 and "
                "0, or give a teacher"
            )
        given, ect = 0 < self.skip < 1, isinstance(self.schedule, EDM) and self.q > 1
        if not given and not (self.skip == 0 and ect):
            raise ValueError(
                f"skip={self.skip} must lie in (0, 1), or be 0 with EDM's schedule and q > 1 "
                "(ECT's steps)"
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
        ends = jax.vmap(jax.random.uniform)(stream(keys, few_steps.EQUAL_PURPOSE)) < self.clean
        s = jnp.where(ends, low, s)
        if self.skip:
            r = t - self.skip * (high - low)
        else:
            stage = jnp.asarray(step) // (self.double_steps or 2**30) + 1.0
            r = t * (1 - (1 + 8 * jax.nn.sigmoid(-t)) / self.q**stage)
        triple = jnp.stack([t, jnp.maximum(r, s), s], axis=1)
        return triple.astype(jnp.result_type(float)), losses.noise_like(keys, x0)


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
