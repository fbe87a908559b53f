"""What a picture is made from besides a prompt: an image, a mask, a small image, control pictures.

With n steps at times t_1 > .. > t_n, latents z of an image, and a mask m that is 1 where the
picture is to be made anew:

    (1)  image to image, strength s (SDEdit, https://arxiv.org/abs/2108.01073, section 3):
         start at step k = n - floor(s n) from alpha(t_k) z + sigma(t_k) eps
    (2)  inpainting: the estimate of x_0 is m x_0 + (1 - m) z at every step (`process/guidance.py`),
         and the image's own pixels are put back at the end; or, where the U-Net was trained for it
         (nine channels: x_t, m, latents of the image with m blanked), by concatenation
    (3)  super-resolution (LDM, https://arxiv.org/abs/2112.10752, section 4.4): the small image, as
         large as the latents, joins x_t's channels
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.data import images
from diffusion.process import guidance
from diffusion.process.gaussian import Denoise
from diffusion.process.samplers import Sampler
from diffusion.process.schedules import Schedule
from diffusion.training import codec

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
    """What a model takes besides prompts. concat: what joins x_t's channels, "", "inpaint" or
    "low_resolution"; sizes in places and in pixels, (height, width); so many control pictures."""

    concat: str
    latent_size: tuple[int, ...]
    image_size: tuple[int, ...]
    controls: int

    def read(
        self,
        image: str | None = None,
        mask: str | None = None,
        controls: Sequence[str] = (),
        control_scales: Sequence[float] = (),
    ) -> Columns:
        """Files to columns of one row each, for every picture of a run.

        Raises ValueError for files that cannot be read, of another size, or that the model cannot
        use.
        """
        if mask and not image:
            raise ValueError(f"mask={mask} needs the --image that it covers")
        if self.concat == "past":
            raise ValueError(
                "the model goes on from a window of past values, which no flag gives: use "
                "`python -m experiments.evaluate.forecast`"
            )
        if self.concat and not (image and (mask or self.concat != "inpaint")):
            needs = "--image and --mask" if self.concat == "inpaint" else "--image"
            trained = f"the model was trained with conditioning.concat={self.concat!r}"
            raise ValueError(f"{trained}: give {needs}")
        if len(controls) != self.controls:
            raise ValueError(
                f"{len(controls)} pictures for {self.controls} ControlNets: give one --control "
                "for each, in their order"
            )
        found: Columns = {}
        if image and self.concat == "low_resolution":
            found["small"] = read_image(image, self.latent_size, "image")
        elif image:
            found["image"] = read_image(image, self.image_size, "image")
        if mask:
            found["mask"] = read_image(mask, self.image_size, "mask", 1) > 127
        for i, path in enumerate(controls):
            found[f"hint_{i}"] = read_image(path, self.image_size, "control")
            scale = control_scales[i] if i < len(control_scales) else 1.0
            found[f"hint_scale_{i}"] = np.array([scale], np.float32)
        return found


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a batch's images become. told: arguments of the network; latent: z, where there is one
    to start from; hole: m of eq. 2, as large as z; image and mask: the pixels to put back."""

    told: dict[str, Any]
    latent: jax.Array | None = None
    hole: jax.Array | None = None
    image: Any = None
    mask: Any = None

    def start(self, schedule: Schedule, method: Sampler, noise: jax.Array) -> jax.Array:
        """The first x: noise, or eq. 1."""
        if self.latent is None:
            return method.prior_std * noise
        t = method.rows["t"][0]
        return float(schedule.alpha(t)) * self.latent + float(schedule.sigma(t)) * noise

    def kept(self, denoise: Denoise) -> Denoise:
        """Eq. 2 for a model that was not trained for it."""
        if self.latent is None or self.hole is None:
            return denoise
        return guidance.inpaint(denoise, self.latent, 1 - self.hole)

    def pasted(self, pixels: jax.Array) -> jax.Array:
        """The image's own pixels where the mask is 0."""
        return pixels if self.mask is None else jnp.where(self.mask, pixels, self.image)


def prepare(
    concat: str,
    batch: Mapping[str, Any],
    encode: Callable[[jax.Array], jax.Array],
    downsampling: int,
) -> Inputs:
    """Traced into the one program of a sampling run. `encode`: [-1, 1] to what is diffused."""
    image: Any = batch.get("image")
    mask: Any = batch.get("mask")
    told: dict[str, Any] = {}
    if concat == "low_resolution":
        told["concat"] = codec.signed(batch["small"])
    hole: Any = None if mask is None else _shrunk(mask.astype(jnp.float32), downsampling)
    if concat == "inpaint":
        masked = encode(codec.signed(image) * (1 - mask))
        told["concat"] = jnp.concatenate([hole, masked], axis=-1)
        return Inputs(told, image=image, mask=mask)
    latent = None if image is None else encode(codec.signed(image))
    return Inputs(told, latent, hole, image, mask)


def _shrunk(mask: jax.Array, factor: int) -> jax.Array:
    """Pixels to latents: a place is made anew where any of its pixels is."""
    batch, height, width, _ = mask.shape
    blocks = mask.reshape(batch, height // factor, factor, width // factor, factor, 1)
    return blocks.max(axis=(2, 4))
