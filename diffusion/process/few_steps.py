r"""Objectives of generators that need one to four evaluations, on any schedule.

With tau = sigma / (alpha + sigma) and y = x / (alpha + sigma) every process here is a straight
line,

    y = (1 - tau) x_0 + tau eps,    dy/dtau = eps - x_0,                                      (1)

so that ``gaussian``'s "velocity" v = E[eps - x_0 | x_t] is the flow of y, and DDIM's step from t to
s (arXiv:2010.02502 eq. 12) is an Euler step of it. A jump is the same step with a velocity that is
averaged over the interval,

    y_s = y_t - (tau_t - tau_s) u(x_t, t, s).                                                 (2)

MeanFlow (arXiv:2505.13447) learns u of every interval from its derivative along the flow:

    u = v - (tau_t - tau_s) du/dtau,    du/dtau by one jvp, the right-hand side held fixed    (3)

(its eq. 6 and 10, where tau = t), by |u - target|^2 / (|u - target|^2 + c)^p, the denominator held
fixed (its eq. 22). At s = t, in a share of the draws, (3) is flow matching. The v of (3) is

    data      eps - x_0, whose mean given x_t is v
    guided    (1 - k) (w (eps - x_0) + (1 - w) v_null) + k v_cond, v_null and v_cond the network's
              own at s = t, held fixed: its mean is (v_cond guided by w) once v_cond is; its eq. 19
              with w for omega / (1 - kappa) and k for kappa
    teacher   v_null + w (v_cond - v_null), of a frozen network

Improved MeanFlow (arXiv:2512.02012) differentiates along the network's own v_cond instead, as (3)
asks of the mean: what is drawn, eps - x_0, then enters the target once and linearly.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from diffusion.process import gaussian, losses
from diffusion.process.keys import stream
from diffusion.process.schedules import EDM, Schedule

EQUAL_PURPOSE, SECOND_PURPOSE = 0xE0A1, 0x5EC0
held = jax.lax.stop_gradient


@dataclasses.dataclass(frozen=True)
class Method:
    """Velocities of a network and of its data (the module's v), and what each method adds:

    ``loss(network, x0, times (batch, 2 or 3), noise)`` -> (losses (batch,), aux) and
    ``draw(keys, x0, step)`` -> (times, noise): falling times t >= .. >= s, float.

    network(x_t, t, s=None, told=True, teacher=False, guidance=None) -> prediction; not ``told``:
    without its condition; ``teacher``: of the frozen network; ``guidance``: the weight that it is
    told. Unless a method says otherwise the losses' values are mean squared errors, their gradients
    weighted ones.

    times: how t and s are drawn, one of ``losses.TIMES``; "": lognormal for EDM's schedule, else
    uniform. mean, std: of logit_normal times. teacher: the prediction of the frozen network; "":
    there is none. guidance_scale: w; guidance_mix: k; guidance_times: the least and greatest t that
    are guided, (): all. ValueError where they contradict.
    """

    schedule: Schedule
    prediction: str
    _: dataclasses.KW_ONLY
    times: str = ""
    mean: float | int | None = None
    std: float | int | None = None
    teacher: str = ""
    guidance_scale: float | int = 1.0
    guidance_mix: float | int = 0.0
    guidance_times: tuple[float | int, ...] = ()

    forward_mode: ClassVar[bool] = False  # whether the loss takes a jvp of the network

    def __post_init__(self):
        for key in ("prediction", "teacher"):
            if getattr(self, key) or key == "prediction":
                name = gaussian.check_prediction(getattr(self, key), key)
                gaussian.check_terminal(self.schedule, name)
        if not 0 <= self.guidance_mix < 1 or (self.teacher and self.guidance_mix):
            raise ValueError(
                f"guidance_mix={self.guidance_mix} must lie in [0, 1), and be 0 with a teacher, "
                "which is guided by guidance_scale alone"
            )
        if self.guidance_times and not (
            len(self.guidance_times) == 2 and self.guidance_times[0] <= self.guidance_times[1]
        ):
            raise ValueError(
                f"guidance_times={self.guidance_times} must be (low, high) with low <= high, or ()"
            )
        for key in ("mean", "std"):
            if getattr(self, key) is not None and self.times != "logit_normal":
                raise ValueError(
                    f"{key}={getattr(self, key)} is of logit_normal times, but times="
                    f"{self.times!r}: leave it out, or draw those"
                )

    def tau(self, t: Array) -> Array:
        alpha, sigma = jnp.asarray(self.schedule.alpha(t)), jnp.asarray(self.schedule.sigma(t))
        return sigma / (alpha + sigma)

    def size(self, t: Array) -> Array:
        """alpha + sigma: x = size y."""
        return jnp.asarray(self.schedule.alpha(t)) + jnp.asarray(self.schedule.sigma(t))

    def of(
        self,
        network: Any,
        x_t: Array,
        t: Array,
        s: Array | None = None,
        target: str = "velocity",
        **which: Any,
    ) -> Array:
        """The network's velocity; of a jump to s, the average. ``which``: told, teacher."""
        prediction = self.teacher if which.get("teacher") else self.prediction
        bare = functools.partial(network, **which)
        output = gaussian.apply_network(bare, self.schedule, prediction, x_t, t, s)
        return self.converted(output.astype(x_t.dtype), prediction, target, x_t, t)

    def converted(self, output: Array, source: str, target: str, x_t: Array, t: Array) -> Array:
        levels = self.schedule.alpha(t), self.schedule.sigma(t), self.schedule.sigma_data
        return gaussian.convert(output, source, target, x_t, *levels)

    def wanted(self, network: Any, x0: Array, noise: Array, x_t: Array, t: Array) -> Array:
        """The v that is learnt, from data or of the teacher; held fixed."""
        plain, mixed = self.guidance_scale == 1, self.guidance_mix != 0
        w: Any = self.guidance_scale
        k: Any = self.guidance_mix
        if self.guidance_times:
            low, high = self.guidance_times
            inside = gaussian.expand((t >= low) & (t <= high), x_t) > 0
            w, k = jnp.where(inside, w, 1), jnp.where(inside, k, 0)
        if self.teacher:
            cond = self.of(network, x_t, t, teacher=True)
            if plain:
                return held(cond)
            null = self.of(network, x_t, t, teacher=True, told=False)
            return held(null + w * (cond - null))
        v = noise - x0
        if not plain:
            v = w * v + (1 - w) * self.of(network, x_t, t, t, told=False)
        if mixed:
            v = (1 - k) * v + k * self.of(network, x_t, t, t)
        return held(v)

    def moved(self, x_t: Array, t: Array, s: Array, v: Array) -> Array:
        """Eq. 2: x_s, from x_t with this velocity."""
        y = x_t / gaussian.expand(self.size(t), x_t)
        y = y - gaussian.expand(self.tau(t) - self.tau(s), x_t) * v
        return gaussian.expand(self.size(s), x_t) * y

    def along(self, function: Any, x_t: Array, t: Array, v: Array) -> tuple[Array, Array]:
        """function(x_t, t) and its derivative by t along dy/dtau = v; one jvp.

        x = size y, so dx/dt = size' y + size v tau'.
        """
        ones = jnp.ones_like(t)
        size, size_slope = jax.jvp(self.size, (t,), (ones,))
        _, tau_slope = jax.jvp(self.tau, (t,), (ones,))
        x_slope = gaussian.expand(size_slope / size, x_t) * x_t
        x_slope = x_slope + gaussian.expand(size * tau_slope, x_t) * v
        return jax.jvp(function, (x_t, t), (x_slope, ones))

    def drawn(self, keys: Key[Array, "batch"], purpose: int = losses.TIME_PURPOSE) -> Array:
        """(batch,) times."""
        name = self.times or ("lognormal" if isinstance(self.schedule, EDM) else "uniform")
        if name not in losses.TIMES:
            raise ValueError(f"times={name!r} is unknown: choose one of {', '.join(losses.TIMES)}")
        given = {"mean": self.mean, "std": self.std}
        options = {key: value for key, value in given.items() if value is not None}
        return losses.TIMES[name](stream(keys, purpose), self.schedule, **options)

    def two_times(self, keys: Key[Array, "batch"]) -> tuple[Array, Array]:
        """t and s <= t: two draws, sorted."""
        pair = self.drawn(keys), self.drawn(keys, SECOND_PURPOSE)
        return jnp.maximum(*pair), jnp.minimum(*pair)


@dataclasses.dataclass(frozen=True)
class MeanFlow(Method):
    """MeanFlow, or ``improved``. equal: the share of draws with s = t. power and offset: p and c of
    its weight; 0: none.
    """

    prediction: str = "velocity"
    _: dataclasses.KW_ONLY
    equal: float | int = 0.75
    improved: bool = False
    power: float | int = 1.0
    offset: float | int = 1e-3

    forward_mode: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.equal <= 1:
            raise ValueError(f"equal={self.equal} is a share of the draws: give one in [0, 1]")

    def loss(self, network: Any, x0: Array, pair: Array, noise: Array) -> tuple[Array, dict]:
        t, s = pair[:, 0], pair[:, 1]
        x_t = gaussian.q_sample(self.schedule, x0, t, noise)
        v = self.wanted(network, x0, noise, x_t, t)
        along = held(self.of(network, x_t, t, t)) if self.improved and not self.teacher else v
        u, slope = self.along(lambda x, t: self.of(network, x, t, s), x_t, t, along)
        _, tau_slope = jax.jvp(self.tau, (t,), (jnp.ones_like(t),))
        target = held(v - gaussian.expand((self.tau(t) - self.tau(s)) / tau_slope, x_t) * slope)
        return weighed(u - target, self.power, self.offset)

    def draw(self, keys: Key[Array, "batch"], x0: Array, step: Any = 0) -> tuple[Array, Array]:
        t, s = self.two_times(keys)
        same = jax.vmap(jax.random.uniform)(stream(keys, EQUAL_PURPOSE)) < self.equal
        pair = jnp.stack([t, jnp.where(same, t, s)], axis=1).astype(jnp.result_type(float))
        return pair, losses.noise_like(keys, x0)


def weighed(error: Array, power: float | int, offset: float | int) -> tuple[Array, dict]:
    """The mean square, with the gradient of the sum of squares over its own value to a power
    (MeanFlow eq. 22): the weighted sum itself hardly changes while the network learns.
    """
    square = jnp.sum(error.reshape(len(error), -1) ** 2, axis=1)
    mse = square / error[0].size
    weighted = square / held(square + offset) ** power if power else mse
    return held(mse - weighted) + weighted, {"mse": mse}
