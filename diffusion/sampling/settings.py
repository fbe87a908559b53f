"""How x_0 is found: the noise schedule, a sampler and its steps, guidance, and what bounds x_0."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.process import gaussian, guidance
from diffusion.process.gaussian import Denoise
from diffusion.process.samplers import SAMPLERS, Sampler
from diffusion.process.schedules import Schedule
from diffusion.sampling.precision import STATES

# predict(x_t, t, told[, s]) -> the network's output, told what conditions say.
Predict = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Settings:
    """`options` are the sampler's own (`process/samplers/`); the others are `configs/common.py`'s.

    ValueError, beginning with the field or option, for what no sampler or guidance takes.
    """

    schedule: Schedule
    prediction: str = "eps"
    variance: str = "fixed_large"
    sampler: str = "ddim"
    steps: int = 50
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    guidance_scale: float | int = 1.0
    guidance_interval: tuple[float | int, ...] = ()
    guidance_rescale: float | int = 0.0
    guidance_channels: int = 0
    image_guidance_scale: float | int = 1.5
    clip: bool = False
    dynamic_threshold: float | int = 0.0
    classifier_scale: float | int = 1.0  # of a pipeline that has a classifier
    state: str = "float32"  # of x between the network's calls, or "float64"

    def __post_init__(self):
        if self.state not in STATES:
            raise ValueError(f"state={self.state!r} is unknown: use {' or '.join(STATES)}")
        if len(self.guidance_interval) not in (0, 2):
            raise ValueError(
                f"guidance_interval={self.guidance_interval} must be (low, high), or ()"
            )
        self.method()
        self._bounded(self._guided(lambda x, t: x, lambda x, t: x))

    def changed(self, **given: Any) -> "Settings":
        """With the fields that are not None. Options are one sampler's: another has none."""
        given = {k: v for k, v in given.items() if v is not None}
        if given.get("sampler", self.sampler) != self.sampler:
            given = {"options": {}, **given}
        return dataclasses.replace(self, **given)

    def method(self, strength: float | int = 1.0) -> Sampler:
        """The sampler; of `strength` in (0, 1] only that fraction of its steps, the last ones."""
        if not 0 < strength <= 1:
            raise ValueError(f"strength={strength} must lie in (0, 1]: 1 keeps nothing of an image")
        options = dict(self.options)
        if self.sampler == "ddpm":
            options = {"variance": self.variance, **options}
        full = self._make(options, steps=self.steps)
        if (kept := int(full.steps * strength)) == full.steps:
            return full
        if not kept:
            raise ValueError(f"strength={strength} of {full.steps} steps is none: raise one")
        times = full.rows["t"][np.append(0, full.ends[:-1] + 1)][-kept:]
        options = {k: v for k, v in options.items() if k not in ("spacing", "steps_offset")}
        return self._make(options, times=times)

    def _make(self, options: dict[str, Any], **more: Any) -> Sampler:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler={self.sampler!r} is unknown: use one of {sorted(SAMPLERS)}")
        try:
            return SAMPLERS[self.sampler](self.schedule, **options, **more)
        except TypeError as error:
            raise ValueError(
                f"options={options} has a key that {self.sampler} lacks ({error})"
            ) from error

    def denoise(
        self,
        predict: Predict,
        told: Any,
        nothing: Any = None,
        scale: jax.Array | None = None,
        worse: Denoise | None = None,
        image: Any = None,
    ) -> Denoise:
        """denoise(x_t, t) -> x_0, or (x_0, variance output) of a learned variance.

        With classifier-free guidance away from `nothing`, what says nothing, all in one call of the
        network; None, or a scale of 1: without. scale: each picture's own (batch,). image: what
        says of the image alone, for InstructPix2Pix's second guidance.
        worse: what is guided away from in its place, a worse model told the same (autoguidance,
        https://arxiv.org/abs/2406.02507, eq. 3; LDM's scale is their w).
        """

        def estimate(given: Any) -> Denoise:
            return gaussian.make_denoise(
                lambda x_t, t, *s: predict(x_t, t, given, *s),
                self.schedule,
                self.prediction,
                learned_variance=self.variance == "learned",
            )

        one = scale is None and self.guidance_scale == 1
        if one and (image is None or self.image_guidance_scale == 1):
            return self._bounded(estimate(told))
        if worse is not None:
            return self._bounded(self._guided(estimate(told), worse, scale=scale))
        if nothing is None:
            return self._bounded(estimate(told))
        ways = [told, nothing] if image is None else [told, image, nothing]
        together = estimate(jax.tree.map(lambda *a: _beside(a), *ways))

        def guided(x_t: jax.Array, *times: jax.Array) -> Any:
            found = together(*[_beside([a] * len(ways)) for a in (x_t, *times)])
            each = [jax.tree.map(lambda x, i=i: x[i :: len(ways)], found) for i in range(len(ways))]
            return self._guided(*[lambda *_, e=e: e for e in each], scale=scale)(x_t, *times)

        return self._bounded(guided)

    def _guided(self, conditional: Denoise, *others: Denoise, scale: Any = None) -> Denoise:
        scale = self.guidance_scale if scale is None else scale
        if len(others) == 2:
            return guidance.two_guidances(conditional, *others, scale, self.image_guidance_scale)
        try:
            return guidance.classifier_free(
                conditional,
                others[0],
                scale,
                self.guidance_interval or None,
                self.guidance_rescale,
                self.guidance_channels,
            )
        except ValueError as error:  # it begins with the argument's name
            raise ValueError(f"guidance_{error}") from error

    def classified(
        self, denoise: Denoise, judge: Callable[..., jax.Array], label: jax.Array
    ) -> Denoise:
        """Led by the gradient of a classifier's judge(x, t), logits, to each one's class.

        ValueError for a schedule whose last alpha is 0: the gradient is divided by it.
        """
        if float(self.schedule.alpha(np.asarray(self.schedule.time_range[1]))) == 0:
            raise ValueError(
                f"classifier_scale={self.classifier_scale} cannot lead from a last alpha of 0 (zero"
                " terminal SNR, rectified flow), by which the gradient is divided: leave it out"
            )
        log_p = guidance.log_probability(judge, self.schedule, label)
        return guidance.by_classifier(denoise, log_p, self.schedule, self.classifier_scale)

    def _bounded(self, denoise: Denoise) -> Denoise:
        if not self.dynamic_threshold:
            return guidance.clip_x0(denoise) if self.clip else denoise
        try:
            return guidance.dynamic_threshold(denoise, self.dynamic_threshold)
        except ValueError as error:
            raise ValueError(f"dynamic_threshold={self.dynamic_threshold}: {error}") from error


def _beside(arrays: Sequence[jax.Array]) -> jax.Array:
    """k times (n, ...) to (k n, ...), a0 b0 a1 b1 ...: those of one picture stay on its device."""
    return jnp.stack(arrays, axis=1).reshape(len(arrays) * len(arrays[0]), *arrays[0].shape[1:])
