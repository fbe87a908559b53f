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

Everything here but reading files is traced into the one program of a sampling run.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import interop
from diffusion.data import sources
from diffusion.models import lora
from diffusion.models.controlnet import ControlNet
from diffusion.process import guidance
from diffusion.training import codec
from experiments.run import build, networks

# -- files ---------------------------------------------------------------------------------------


def read_image(path: str | pathlib.Path, size: Sequence[int], flag: str, mode: str = "RGB"):
    """uint8 (1, height, width, channels), of exactly that size or resized to it where larger.

    Raises ValueError naming flag and file for what is no image, or of another shape.
    """
    try:
        with sources.open_image(path) as opened:
            image = opened.convert(mode)
    except sources.NO_IMAGE as error:
        raise ValueError(f"{flag}={path} is no image that can be read: {error}") from error
    height, width = size
    if image.size != (width, height):
        raise ValueError(
            f"{flag}={path} has {image.height}x{image.width} pixels, but {height}x{width} are "
            f"needed: resize it{', or give --size' if flag == '--image' else ''}"
        )
    pixels = np.asarray(image)
    return (pixels if pixels.ndim == 3 else pixels[..., None])[None]


def columns(
    model: Any,
    image: str | None = None,
    mask: str | None = None,
    controls: Sequence[str] = (),
    control_scales: Sequence[float] = (),
) -> dict[str, np.ndarray]:
    """Arrays of one row each, for every example of a sampling run.

    Raises ValueError for files that cannot be read, of another size, or that the model cannot use.
    """
    task, concat = model.task, model.config.conditioning.concat
    pixels = image_size(model)
    if mask and not image:
        raise ValueError(f"--mask={mask} needs the --image that it covers")
    if concat and not (image and (mask or concat != "inpaint")):
        needs = "--image and --mask" if concat == "inpaint" else "--image"
        raise ValueError(f"the model was trained with conditioning.concat={concat!r}: give {needs}")
    if len(controls) != len(task.controlnets):
        raise ValueError(
            f"{len(controls)} pictures for {len(task.controlnets)} ControlNets: give one --control "
            "for each, in their order"
        )
    found: dict[str, np.ndarray] = {}
    if image and concat == "low_resolution":
        found["small"] = read_image(image, task.sample_shape[:2], "--image")
    elif image:
        found["image"] = read_image(image, pixels, "--image")
    if mask:
        found["mask"] = read_image(mask, pixels, "--mask", "L") > 127
    for i, path in enumerate(controls):
        found[f"hint_{i}"] = read_image(path, pixels, "--control")
        scale = control_scales[i] if i < len(control_scales) else 1.0
        found[f"hint_scale_{i}"] = np.array([scale], np.float32)
    return found


def image_size(model: Any) -> tuple[int, ...]:
    """(height, width) of the pictures, in pixels."""
    factor = 1 if model.first_stage is None else model.first_stage.downsampling
    return tuple(side * factor for side in model.task.sample_shape[:-1])


# -- models --------------------------------------------------------------------------------------


def resized(model: Any, size: Sequence[int]) -> Any:
    """The model for pictures of (height, width) pixels. ValueError where the networks refuse."""
    factor = 1 if model.first_stage is None else model.first_stage.downsampling
    levels = 2 ** (len(model.task.network.multipliers) - 1)
    if len(size) != 2 or any(side < 1 or side % (factor * levels) for side in size):
        raise ValueError(
            f"--size={','.join(map(str, size))} must be height,width in multiples of "
            f"{factor * levels}, since the networks halve them so often"
        )
    shape = (*(side // factor for side in size), model.task.sample_shape[-1])
    return dataclasses.replace(model, task=dataclasses.replace(model.task, sample_shape=shape))


def with_lora(model: Any, paths: Sequence[str], scale: float = 1.0) -> Any:
    """The model with `scale` times the updates of each file in Diffusers' format."""
    params = dict(model.params)
    for path in paths:
        theirs = {"unet" if k == "denoiser" else k: v for k, v in params.items()}
        for name, tree in interop.load_lora(path, theirs).items():
            name = "denoiser" if name == "unet" else name
            params[name] = lora.merge(params[name], tree, scale)
    return dataclasses.replace(model, params=params)


def with_controlnets(model: Any, directories: Sequence[str]) -> Any:
    """The model steered by each ControlNet: a Diffusers directory, or the workdir of a run."""
    params, nets = dict(model.params), []
    for i, directory in enumerate(directories):
        net, tree = _controlnet(pathlib.Path(directory), model)
        nets.append(net)
        params[f"controlnet_{i}" if i else "controlnet"] = tree
    if not nets:
        return model
    task = dataclasses.replace(model.task, controlnets=tuple(nets))
    return dataclasses.replace(model, task=task, params=params)


def _controlnet(directory: pathlib.Path, model: Any) -> tuple[ControlNet, Any]:
    if (directory / "checkpoints").is_dir():
        found = networks.load(directory, flag="--controlnet")
        nets = build.controlnets(found.config)
        if not nets:
            raise ValueError(f"--controlnet={directory} holds a run without a ControlNet")
        net, tree = nets[0], found.params["controlnet"]
    else:
        net, tree = interop.load_controlnet(directory)
    for key in ("channels", "multipliers", "blocks"):
        ours, theirs = (n.per_level(getattr(n, key)) for n in (model.task.network, net))
        if ours != theirs:
            raise ValueError(
                f"--controlnet={directory} has {key}={theirs}, but the U-Net has {ours}: it steers "
                "another U-Net"
            )
    return net, tree


# -- traced --------------------------------------------------------------------------------------


def to_latent(model: Any, params: Any, image: jax.Array) -> jax.Array:
    """What would be diffused of pixels in [-1, 1]."""
    return codec.encode(model.first_stage, params, model.extra, image)


def extend(model: Any, params: Any, batch: dict[str, jax.Array]) -> dict[str, Any]:
    """What joins the condition: channels to concatenate."""
    condition: dict[str, Any] = {}
    concat = model.config.conditioning.concat
    if concat == "inpaint":
        pixels = codec.signed(batch["image"])
        blanked = pixels * (1 - batch["mask"])
        mask = _shrink(batch["mask"].astype(jnp.float32), model)
        condition["concat"] = jnp.concatenate([mask, to_latent(model, params, blanked)], axis=-1)
    elif concat == "low_resolution":
        condition["concat"] = codec.signed(batch["small"])
    return condition


def start(
    model: Any, method: Any, params: Any, batch: dict[str, jax.Array], noise: jax.Array
) -> jax.Array:
    """The first x: noise, or eq. 1 where there is an image."""
    if "image" not in batch or model.config.conditioning.concat == "inpaint":
        return method.prior_std * noise
    schedule, t = build.schedule(model.config), method.rows["t"][0]
    z = to_latent(model, params, codec.signed(batch["image"]))
    return float(schedule.alpha(t)) * z + float(schedule.sigma(t)) * noise


def keep_known(model: Any, params: Any, batch: dict[str, jax.Array], denoise: Any) -> Any:
    """Eq. 2 for a model that was not trained for it."""
    if "mask" not in batch or model.config.conditioning.concat == "inpaint":
        return denoise
    z = to_latent(model, params, codec.signed(batch["image"]))
    return guidance.inpaint(denoise, z, 1 - _shrink(batch["mask"].astype(z.dtype), model))


def paste(batch: dict[str, jax.Array], pixels: jax.Array) -> jax.Array:
    """The image's own pixels where the mask is 0."""
    return jnp.where(batch["mask"], pixels, batch["image"]) if "mask" in batch else pixels


def _shrink(mask: jax.Array, model: Any) -> jax.Array:
    """Pixels to latents: a place is made anew where any of its pixels is."""
    factor = 1 if model.first_stage is None else model.first_stage.downsampling
    batch, height, width, _ = mask.shape
    blocks = mask.reshape(batch, height // factor, factor, width // factor, factor, 1)
    return blocks.max(axis=(2, 4))
