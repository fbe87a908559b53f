"""What a picture is made from besides a prompt: an image, a mask, a small image, control pictures.

With n steps at times t_1 > .. > t_n, latents z of an image, and a mask m that is 1 where the
picture is to be made anew:

    (1)  image to image, strength s (SDEdit, https://arxiv.org/abs/2108.01073, section 3):
         start at step k = n - floor(s n) from alpha(t_k) z + sigma(t_k) eps
         two images, at a place m between (DDPM, https://arxiv.org/abs/2006.11239, section 4.4):
         from (1 - m) x + m x', each of them (1) with noise of its own
    (2)  inpainting: the estimate of x_0 is m x_0 + (1 - m) z at every step (`process/guidance.py`),
         and the image's own pixels are put back at the end

Where the denoiser was trained for it, m and the latents of what is left of the image, a small image
or a map of labels join x_t's channels instead (`training/conditions.py: Concat`).
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.data import annotations, images, layouts
from diffusion.process import guidance
from diffusion.process.gaussian import Denoise
from diffusion.process.samplers import Sampler
from diffusion.process.schedules import Schedule
from diffusion.training import codec
from diffusion.training.conditions import Concat
from diffusion.training.sized_text import SizedText

Columns = dict[str, np.ndarray]


def read_image(path: str | pathlib.Path, size: Sequence[int], name: str, channels: int = 3):
    """uint8 (1, height, width, channels), of exactly that size.

    Raises ValueError with `name` and file for what is no image, or of another size.
    """
    try:
        image = images.open_image(path, channels)
    except images.NO_IMAGE as error:
        raise ValueError(f"{name}={path} is no image that can be read: {error}") from error
    height, width = size
    if image.size != (width, height):
        raise ValueError(
            f"{name}={path} has {image.height}x{image.width} pixels, but {height}x{width} are "
            f"needed: resize it{', or give --size' if name == 'image' else ''}"
        )
    pixels = np.asarray(image)
    return (pixels if pixels.ndim == 3 else pixels[..., None])[None]


@dataclasses.dataclass(frozen=True)
class Slots:
    """What a model takes besides prompts. concat: what joins x_t's channels; sizes in places and in
    pixels, (height, width); so many control pictures; channels of an image. layout: (length,
    vocabulary, labels) of boxes as tokens, or None."""

    concat: Any
    latent_size: tuple[int, ...]
    image_size: tuple[int, ...]
    controls: int
    channels: int = 3
    layout: tuple[int, int, int] | None = None

    def read(
        self,
        image: str | None = None,
        mask: str | None = None,
        segments: str | None = None,
        boxes: Sequence[str] = (),
        controls: Sequence[str] = (),
        control_scales: Sequence[float] = (),
    ) -> Columns:
        """Files to columns of one row each, for every picture of a run.

        Raises ValueError for files that cannot be read, of another size, or that the model cannot
        use.
        """
        if mask and not image:
            raise ValueError(f"mask={mask} needs the --image that it covers")
        kind = "" if self.concat is None else self.concat.kind
        if kind == "past":
            raise ValueError(
                "the model goes on from a window of past values, which no flag gives: use "
                "`python -m experiments.evaluate.forecast`"
            )
        self._check(kind, image, mask, segments)
        if len(controls) != self.controls:
            raise ValueError(
                f"{len(controls)} pictures for {self.controls} ControlNets: give one --control "
                "for each, in their order"
            )
        found: Columns = {}
        if self.layout is not None:
            found["tokens"] = self._boxes(boxes, *self.layout)
        elif boxes:
            raise ValueError(f"box={boxes[0]}, but the model reads no boxes: leave it out")
        if self.concat is not None and segments:
            found["segments"] = self._segments(segments, self.concat.rescaler.classes)
        if self.concat is not None and image and kind == "low_resolution":
            small = [side // self.concat.factor for side in self.latent_size]
            found["small"] = read_image(image, small, "image", self.concat.shape[-1])
        elif image:
            found["image"] = read_image(image, self.image_size, "image", self.channels)
        if mask:
            found["mask"] = read_image(mask, self.image_size, "mask", 1) > 127
        for i, path in enumerate(controls):
            found[f"hint_{i}"] = read_image(path, self.image_size, "control")
            scale = control_scales[i] if i < len(control_scales) else 1.0
            found[f"hint_scale_{i}"] = np.array([scale], np.float32)
        return found

    def _check(self, kind: str, image: str | None, mask: str | None, segments: str | None) -> None:
        """That what the model was trained with is given, and nothing that it does not read."""
        needs = {"low_resolution": ("image",), "semantic": ("segments",), "edit": ("image",)}
        needed = needs.get(kind, ("image", "mask") if kind else ())
        given = {"image": image, "mask": mask, "segments": segments}
        if missing := [name for name in needed if not given[name]]:
            raise ValueError(
                f"the model was trained with conditioning.concat={kind!r}: give --{missing[0]}"
            )
        if segments and kind != "semantic":
            raise ValueError(
                f"segments={segments}, but the model reads no map of labels: leave it out"
            )
        if mask and kind in needs:
            raise ValueError(f"mask={mask}, but the model was trained without: leave it out")

    def _boxes(self, boxes: Sequence[str], length: int, words: int, labels: int) -> np.ndarray:
        """int32 (1, length)."""
        most = layouts.objects(length)
        if not 0 < len(boxes) <= most:
            raise ValueError(
                f"the model reads 1 to {most} boxes, but {len(boxes)} are given: give --box=label,"
                "left,top,width,height for each"
            )
        return layouts.tokens(layouts.parse(boxes, labels)[None], length, words)

    def _segments(self, path: str, classes: int) -> np.ndarray:
        """uint8 (1, height, width)."""
        found = annotations.read_segments(path)[None]
        if found.shape[1:] != self.image_size:
            height, width = self.image_size
            raise ValueError(
                f"segments={path} has {found.shape[1]}x{found.shape[2]} labels, but "
                f"{height}x{width} are needed: resize it, to the nearest"
            )
        if found.max() >= classes:
            raise ValueError(
                f"segments={path} has the label {found.max()}, but the model knows 0..{classes - 1}"
                ": map the others to one of these"
            )
        return found


def sizes(text: Any, given: Mapping[str, Sequence[int]]) -> Columns:
    """What Stable Diffusion XL is told: "original_size", "crop" and "target_size", two numbers each
    or none, down and across. ValueError for another model."""
    given = {name: pair for name, pair in given.items() if pair}
    for name, pair in given.items():
        if not isinstance(text, SizedText):
            raise ValueError(f"{name}={list(pair)}, but the model is told of no size: leave it out")
        if len(pair) != 2 or min(pair) < 0:
            raise ValueError(f"{name}={list(pair)} must be two numbers of pixels: down, across")
    if not given:
        return {}
    own = {"original_size": text.size, "crop": (0, 0), "target_size": text.size, **given}
    return {"sizes": np.array([[side for pair in own.values() for side in pair]], np.float32)}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a batch's images become. latent: z, where there is one to start from; other and mix: z'
    and m of eq. 1; hole: m of eq. 2, as large as z; image and mask: the pixels to put back."""

    latent: jax.Array | None = None
    other: jax.Array | None = None
    mix: Any = None
    hole: jax.Array | None = None
    image: Any = None
    mask: Any = None

    def start(
        self, schedule: Schedule, method: Sampler, noise: jax.Array, more: jax.Array
    ) -> jax.Array:
        """The first x: noise, or eq. 1; `more` is the other image's noise."""
        if self.latent is None:
            return method.prior_std * noise
        t = method.rows["t"][0]
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        x = alpha * self.latent + sigma * noise
        if self.other is None:
            return x
        mix = self.mix.reshape(-1, *[1] * (x.ndim - 1))
        return (1 - mix) * x + mix * (alpha * self.other + sigma * more)

    def kept(self, denoise: Denoise) -> Denoise:
        """Eq. 2 for a model that was not trained for it."""
        if self.latent is None or self.hole is None:
            return denoise
        return guidance.inpaint(denoise, self.latent, 1 - self.hole)

    def pasted(self, pixels: jax.Array) -> jax.Array:
        """The image's own pixels where the mask is 0: of uint8, or of floats in [0, 1]."""
        if self.mask is None or self.image is None:
            return pixels
        own = self.image if pixels.dtype == jnp.uint8 else self.image / 255
        return jnp.where(self.mask > 0, pixels, own)


def prepare(
    concat: Concat | None,
    batch: Mapping[str, Any],
    encode: Callable[[jax.Array], jax.Array],
    downsampling: int,
) -> Inputs:
    """Traced into the one program of a sampling run. `encode`: [-1, 1] to what is diffused."""
    image: Any = batch.get("image")
    mask: Any = batch.get("mask")
    if concat is not None:  # it is told of them
        return Inputs(image=image, mask=mask)
    hole: Any = None if mask is None else _shrunk(mask.astype(jnp.float32), downsampling)
    latent = None if image is None else encode(codec.signed(image))
    other: Any = encode(codec.signed(batch["other"])) if "other" in batch else None
    return Inputs(latent, other, batch.get("mix"), hole, image, mask)


def _shrunk(mask: jax.Array, factor: int) -> jax.Array:
    """Pixels to latents: a place is made anew where any of its pixels is."""
    batch, height, width, _ = mask.shape
    blocks = mask.reshape(batch, height // factor, factor, width // factor, factor, 1)
    return blocks.max(axis=(2, 4))
