r"""Wrappers denoise -> denoise: guidance without and with a classifier, thresholding, inpainting.

``denoise(x_t, t)`` gives an estimate of x_0, or (x_0, variance output); a wrapper changes the
estimate and passes the conditional variance output on. At fixed x_t every prediction type is affine
in x_0, so guiding x_0 is guiding eps, v or the score:

    x_0 = x_0^u + s (x_0^c - x_0^u)                                                           (1)

(classifier-free guidance, arXiv:2207.12598 eq. 6, with LDM's s = 1 + w). Rescaling (Lin et al.
eq. 15-16, arXiv:2305.08891), with standard deviations over each example,

    x_0' = phi x_0 std(x_0^c) / std(x_0) + (1 - phi) x_0                                      (2)

Deviation: (2) acts on x_0, as denoise returns it; the authors act on the network's own output.

A classifier p(y | x_t) moves the score by s grad log p (ADM algorithm 2, arXiv:2105.05233:
eps - s sigma grad log p), and so, since x_0 = (x_t + sigma^2 score) / alpha,

    x_0' = x_0 + s sigma^2 / alpha grad log p(y | x_t)                                        (3)

ADM's algorithm 1, for ancestral steps, moves their mean by s times their variance instead: equal to
the first order in the step.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diffusion.process.gaussian import Denoise, apply_network, expand
from diffusion.process.schedules import Schedule


def _split(output: Any) -> tuple[Array, tuple[Array, ...]]:
    return (output[0], tuple(output[1:])) if isinstance(output, tuple) else (output, ())


def _join(x0: Array, rest: tuple[Array, ...]) -> Any:
    return (x0, *rest) if rest else x0


def _map_x0(denoise: Denoise, function: Any) -> Denoise:
    def wrapped(x_t: Array, t: Array, *s: Array) -> Any:
        x0, rest = _split(denoise(x_t, t, *s))
        return _join(function(x0), rest)

    return wrapped


def _std(x: Array) -> Array:
    return jnp.std(x.reshape(x.shape[0], -1), axis=1)


def classifier_free(
    denoise_cond: Denoise,
    denoise_uncond: Denoise,
    scale: float | int | Array,
    interval: tuple | None = None,
    rescale: float | int = 0.0,
    channels: int = 0,
) -> Denoise:
    """Eq. 1 with ``scale`` s (1 is no guidance; () or (batch,)) and eq. 2 with phi = ``rescale``.

    ``interval`` (low, high), in the schedule's t, both included: outside it the conditional
    estimate is returned alone (Kynkaanniemi et al., arXiv:2404.07724). ``channels``: how many of
    the first are guided, 0: all; the others are the conditional estimate's, as DiT has its fourth
    (facebookresearch/DiT: models.py, forward_with_cfg). Raises ValueError for an empty interval, a
    rescale outside [0, 1] or a negative number of channels.
    """
    if channels < 0:
        raise ValueError(f"channels={channels}, but it must be 0 (all) or more")
    if interval is not None and not interval[0] <= interval[1]:
        raise ValueError(f"interval={interval}, but low <= high must hold: swap the two")
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale={rescale}, but it must lie in [0, 1]: the paper uses 0.7")

    def denoise(x_t: Array, t: Array, *s: Array) -> Any:
        cond, rest = _split(denoise_cond(x_t, t, *s))
        uncond, _ = _split(denoise_uncond(x_t, t, *s))
        x0 = uncond + expand(scale, cond) * (cond - uncond)
        if rescale:
            factor = rescale * _std(cond) / jnp.maximum(_std(x0), 1e-12) + (1 - rescale)
            x0 = expand(factor, x0) * x0
        if interval is not None:
            inside = (t >= interval[0]) & (t <= interval[1])
            x0 = jnp.where(expand(inside, x0) != 0, x0, cond)
        if channels:
            x0 = jnp.concatenate([x0[..., :channels], cond[..., channels:]], axis=-1)
        return _join(x0, rest)

    return denoise


def log_probability(
    network: Callable[..., Array], schedule: Schedule, label: Int[Array, " batch"]
) -> Callable[[Array, Array], Array]:
    """For `by_classifier`: log p(label | x_t) (batch,) of a network(x, t) that gives logits."""

    def log_p(x_t: Array, t: Array) -> Array:
        logits = apply_network(network, schedule, "eps", x_t, t)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)[:, 0]

    return log_p


def by_classifier(
    denoise: Denoise, log_p: Callable[[Array, Array], Array], schedule: Schedule, scale: Any
) -> Denoise:
    """Eq. 3: ``log_p(x_t, t)`` gives log p(y | x_t) (batch,) of each one's class; ``scale`` s is ()
    or (batch,). Bounds of x_0 belong inside, as the authors have theirs (clip_denoised)."""

    def wrapped(x_t: Array, t: Array, *s: Array) -> Any:
        x0, rest = _split(denoise(x_t, t, *s))
        gradient = jax.grad(lambda x: jnp.sum(log_p(x, t)))(x_t)
        factor = scale * schedule.sigma(t) ** 2 / schedule.alpha(t)
        return _join(x0 + expand(factor, x0) * gradient.astype(x0.dtype), rest)

    return wrapped


def two_guidances(
    denoise_full: Denoise,
    denoise_image: Denoise,
    denoise_none: Denoise,
    scale: float | int | Array,
    image_scale: float | int,
) -> Denoise:
    """InstructPix2Pix's (arXiv:2211.09800, eq. 3): told of image and text, the image, neither,

    x_0 = x_0^none + s_I (x_0^image - x_0^none) + s_T (x_0^full - x_0^image).
    """
    of_text = classifier_free(denoise_full, denoise_image, scale)

    def denoise(x_t: Array, t: Array, *s: Array) -> Any:
        x0, rest = _split(of_text(x_t, t, *s))
        image, none = (_split(d(x_t, t, *s))[0] for d in (denoise_image, denoise_none))
        return _join(x0 + (image_scale - 1) * (image - none), rest)

    return denoise


def clip_x0(denoise: Denoise, low: float | int = -1.0, high: float | int = 1.0) -> Denoise:
    """x_0 clipped to [low, high], as DDPM samples (diffusion_utils_2.py, clip_denoised)."""
    return _map_x0(denoise, lambda x0: jnp.clip(x0, low, high))


def dynamic_threshold(denoise: Denoise, percentile: float | int = 0.995) -> Denoise:
    """Clip |x_0| to s and divide by s: s the percentile of |x_0| per example, at least 1.

    Imagen §2.3 (arXiv:2205.11487). Raises ValueError for a percentile outside (0, 1].
    """
    if not 0 < percentile <= 1:
        raise ValueError(f"percentile={percentile}, but it must lie in (0, 1]: Imagen's is 0.995")

    def threshold(x0: Float[Array, "batch *shape"]) -> Array:
        magnitude = jnp.abs(x0.reshape(x0.shape[0], -1))
        s = expand(jnp.maximum(jnp.quantile(magnitude, percentile, axis=1), 1.0), x0)
        return jnp.clip(x0, -s, s) / s

    return _map_x0(denoise, threshold)


def inpaint(denoise: Denoise, known: Float[Array, "batch *shape"], mask: Array) -> Denoise:
    """x_0 replaced by ``known`` where ``mask`` is 1; mask broadcasts to x_0 by NumPy's rules.

    With x_0 = known the reverse step there samples q(x_{t-1} | x_t, x_0 = known) exactly (DDPM
    eq. 7), so the known region follows its own forward process and ends at ``known``. Soft masks
    blend.
    """
    mask = jnp.broadcast_to(jnp.asarray(mask, known.dtype), known.shape)
    return _map_x0(denoise, lambda x0: mask * known + (1 - mask) * x0)
