"""ControlNets in Diffusers' format: directories of `ControlNetModel`, both ways."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.interop import files
from diffusion.interop.unet import RULES as UNET_RULES
from diffusion.interop.unet import STEM
from diffusion.interop.unet_config import BLOCKS, CONDITIONAL, NAMES, read_unet_config, unet_config
from diffusion.interop.weight_files import read_weights
from diffusion.models.controlnet import ControlNet
from diffusion.models.unet import UNet

CLASS = "ControlNetModel"

RULES: files.Rules = (
    (r"^/zero_(\d+)/", r"/controlnet_down_blocks/\1/"),
    (r"^/zero_mid/", "/controlnet_mid_block/"),
    (r"^/hint_(in|out)/", r"/controlnet_cond_embedding/conv_\1/"),
    (r"^/hint_(\d+)/", r"/controlnet_cond_embedding/blocks/\1/"),
    *UNET_RULES,
)

# The first value of each is Diffusers' default.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "conditioning_channels": (3,),
    "controlnet_conditioning_channel_order": ("rgb",),
    "addition_embed_type": (None,),
    "global_pool_conditions": (False,),
}
# What a ControlNetModel does not say, though a U-Net does.
ABSENT = ("out_channels", "up_block_types", "center_input_sample", "dropout", "time_embedding_type")


def load_controlnet(directory: str | os.PathLike) -> tuple[ControlNet, dict[str, Any]]:
    """(module, float32 parameters) of a `ControlNetModel` directory.

    ValueError naming the file and the key for what the module cannot express, and for weights that
    are missing, truncated, of another shape or left over.
    """
    source = Path(directory) / "config.json"
    config = files.read_config(directory, {CLASS})
    files.require(config, SUPPORTED, source)
    down = config.get("down_block_types") or ()
    ups = {name: NAMES[BLOCKS[name][0], BLOCKS[name][1] or "conv"][1] for name in BLOCKS}
    mirrored = {"up_block_types": [ups.get(name, name) for name in reversed(down)]}
    widths = tuple(config.pop("conditioning_embedding_out_channels", None) or (16, 32, 96, 256))
    rest = {key: value for key, value in config.items() if key not in SUPPORTED}
    same = {**rest, "_class_name": CONDITIONAL, **(mirrored if down else {})}
    unet, in_channels, width = read_unet_config(same, source)
    module = beside(unet, widths)
    shapes = controlnet_shapes(module, in_channels, width)
    weights = read_weights(directory, STEM).renamed(files.OLD_ATTENTION_NAMES)
    return module, files.to_params(weights, shapes, RULES)


def beside(unet: UNet, hint_widths: tuple[int, ...]) -> ControlNet:
    """The ControlNet with the fields of `unet`."""
    names = [f.name for f in dataclasses.fields(UNet) if f.name not in ("parent", "name")]
    return ControlNet(**{name: getattr(unet, name) for name in names}, hint_widths=hint_widths)


def save_controlnet(
    directory: str | os.PathLike, module: ControlNet, params: Mapping[str, Any]
) -> None:
    """Writes a directory that Diffusers loads as `ControlNetModel`, whole or not at all.

    ValueError for what Diffusers cannot hold; then nothing is written.
    """
    config = unet_config(module, params)
    if config["_class_name"] != CONDITIONAL:
        raise ValueError(
            "a ControlNet without cross-attention cannot be written for Diffusers: keep it in its "
            "own checkpoint"
        )
    config = {key: value for key, value in config.items() if key not in ABSENT}
    config |= {"_class_name": CLASS, "conditioning_embedding_out_channels": [*module.hint_widths]}
    files.write_directory(directory, config, files.to_tensors(params, RULES), STEM)


def controlnet_shapes(module: ControlNet, in_channels: int, context_width: int | None) -> Any:
    """The tree of parameter shapes for two spatial axes, without computing anything."""
    size = 2 ** (module.levels - 1)
    hint = size * 2 ** (len(module.hint_widths) - 1)
    inputs: dict[str, Any] = {
        "x": jnp.zeros((1, size, size, in_channels)),
        "t": jnp.zeros(1),
        "hint": jnp.zeros((1, hint, hint, 3)),
        "context": None if context_width is None else jnp.zeros((1, 1, context_width)),
        "labels": None if module.num_classes is None else jnp.zeros(1, int),
    }
    return jax.eval_shape(lambda: module.init(jax.random.key(0), **inputs))["params"]
