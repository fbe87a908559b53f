r"""Latent consistency distillation (LCM, arXiv:2310.04378), also by low-rank updates (2311.05556).

On a discrete schedule's times t_i = i T/N - 1, i = 1 .. N, r = t_{i-1} (0 for i = 1), the teacher
takes one step of DDIM by v guided by 1 + w, and the student is to say at t what it says at r,

    f(x, t, w) = c_skip(t) x + c_out(t) D(x, t, w)           c_skip, c_out: `samplers/lcm.py`   (1)
    L = mean(sqrt((f(x_t, t, w) - held(f(x_r, r, w)))^2 + c^2) - c)                             (2)

with w uniform in `weights` and told to a network that can be (`models/second_time.py`); one that
cannot, as LCM-LoRA's, learns all of them at once. (2) is what the authors' training scripts have
(Diffusers: examples/consistency_distillation), c = 0.001; so are N = 50 and c_skip's factor of 10.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from diffusion.process import few_steps, gaussian, losses
from diffusion.process.few_steps import held
from diffusion.process.keys import stream
from diffusion.process.samplers.lcm import boundary


@dataclasses.dataclass(frozen=True)
class LatentConsistency(few_steps.Method):
    """Eq. 2. weights: the least and greatest w; the sampler is told guidance_scale = 1 + w."""

    prediction: str = "eps"
    _: dataclasses.KW_ONLY
    weights: tuple[float | int, ...] = (5.0, 15.0)
    original_steps: int = 50
    timestep_scaling: float | int = 10.0
    huber: float | int = 0.001

    def __post_init__(self):
        super().__post_init__()
        levels = self.schedule.num_steps or 0
        if not self.teacher or self.times or self.guidance_scale != 1 or self.guidance_times:
            raise ValueError(
                f"teacher={self.teacher!r}, times={self.times!r}, guidance_scale="
                f"{self.guidance_scale}, guidance_times={self.guidance_times}: it needs a teacher, "
                "draws times of its own and is guided by weights: leave the others out"
            )
        if not 1 <= self.original_steps <= levels:
            raise ValueError(
                f"original_steps={self.original_steps} must lie in 1..{levels}, the levels of a "
                "discrete schedule"
            )
        if len(self.weights) != 2 or not 0 <= self.weights[0] <= self.weights[1] or self.huber < 0:
            raise ValueError(
                f"weights={self.weights}, huber={self.huber} must be a least and a greatest w of 0 "
                "or more, and 0 or more"
            )

    def loss(self, network: Any, x0: Array, triple: Array, noise: Array) -> tuple[Array, dict]:
        t, r, w = triple.T
        x_t = gaussian.q_sample(self.schedule, x0, t, noise)
        cond = self.of(network, x_t, t, teacher=True)
        null = self.of(network, x_t, t, teacher=True, told=False)
        x_r = held(self.moved(x_t, t, r, cond + gaussian.expand(w, x_t) * (cond - null)))
        error = self._function(network, x_t, t, w) - held(self._function(network, x_r, r, w))
        error = error.reshape(len(error), -1)
        value = jnp.mean(jnp.sqrt(error**2 + self.huber**2 + 1e-20) - self.huber, axis=1)
        return value, {"mse": jnp.mean(error**2, axis=1)}

    def _function(self, network: Any, x: Array, t: Array, w: Array) -> Array:
        skip, out = (gaussian.expand(c, x) for c in boundary(self.timestep_scaling * t))
        return skip * x + out * self.of(network, x, t, target="x0", guidance=w)

    def draw(self, keys: Key[Array, "batch"], x0: Array, step: Any = 0) -> tuple[Array, Array]:
        steps: Any = self.schedule.num_steps
        gap, (low, high) = steps // self.original_steps, self.weights
        i = jax.vmap(lambda key: jax.random.randint(key, (), 1, self.original_steps + 1))(
            stream(keys, losses.TIME_PURPOSE)
        )
        w = jax.vmap(jax.random.uniform)(stream(keys, few_steps.SECOND_PURPOSE))
        triple = jnp.stack([i * gap - 1.0, jnp.maximum(i * gap - gap - 1.0, 0.0)], axis=1)
        triple = jnp.concatenate([triple, (low + (high - low) * w)[:, None]], axis=1)
        return triple.astype(jnp.result_type(float)), losses.noise_like(keys, x0)
