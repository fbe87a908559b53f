"""ControlNets: directories of Diffusers' `ControlNetModel`, both ways, and its authors' one file.

The authors' (lllyasviel/ControlNet, cldm/cldm.py) names the U-Net's half as CompVis does, under
control_model. or bare; what it is follows from the tensors, but for the heads, which are those of
Stable Diffusion: 8 with a context of 768 (1.x), of width 64 with one of 1024 (2.x).
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.interop import compvis_ldm, files
from diffusion.interop.single_file import read_file
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
    """(module, float32 parameters) of a `ControlNetModel` directory, or of the authors' one file.

    ValueError naming the file and the key for what the module cannot express, and for weights that
    are missing, truncated, of another shape or left over.
    """
    if Path(directory).is_file():
        return _load_file(Path(directory))
    source = Path(directory) / "config.json"
    config = files.read_config(directory, {CLASS})
    files.require(config, SUPPORTED, source)
    down = config.get("down_block_types") or ()
    ups = {name: NAMES[BLOCKS[name][0], BLOCKS[name][1] or "conv"][1] for name in BLOCKS}
    mirrored = {"up_block_types": [ups.get(name, name) for name in reversed(down)]}
    widths = tuple(config.pop("conditioning_embedding_out_channels", None) or (16, 32, 96, 256))
    rest = {key: value for key, value in config.items() if key not in SUPPORTED}
    same = {**rest, "_class_name": CONDITIONAL, **(mirrored if down else {})}
    with files.naming(source):
        unet, in_channels, width = read_unet_config(same, source)
        module = beside(unet, widths)
        shapes = controlnet_shapes(module, in_channels, width)
    weights = read_weights(directory, STEM).renamed(files.OLD_ATTENTION_NAMES)
    return module, files.to_params(weights, shapes, RULES)


PREFIX = "control_model."
HEADS = {768: {"heads": 8}, 1024: {"heads": None, "head_dim": 64}}  # of Stable Diffusion 1.x, 2.x


def _load_file(path: Path) -> tuple[ControlNet, dict[str, Any]]:
    held = read_file(path)
    marked = any(name.startswith(PREFIX) for name in held.tensors)
    held = compvis_ldm.under(held, PREFIX if marked else "")
    if "input_hint_block.0.weight" not in held.tensors:
        known = "controlnet_cond_embedding.conv_in.weight" in held.tensors
        remedy = "name the folder with its config.json" if known else "give a ControlNet's file"
        raise ValueError(f"{path} has no {PREFIX}input_hint_block.0.weight: {remedy}")
    module = _infer(held.tensors, path)
    shapes = controlnet_shapes(module, *_inputs(held.tensors))
    return module, files.to_params(held, shapes, file_rules(module))


def _inputs(tensors: Mapping[str, Any]) -> tuple[int, int | None]:
    """Channels of x_t, width of the context."""
    return tensors["input_blocks.0.0.weight"].shape[1], compvis_ldm.context_width(tensors)


def _infer(tensors: Mapping[str, Any], path: Path) -> ControlNet:
    channels, context = tensors["input_blocks.0.0.weight"].shape[0], _inputs(tensors)[1]
    if context not in HEADS:
        raise ValueError(
            f"{path} looks at a context of {context}, but only Stable Diffusion 1.x (768) and 2.x "
            "(1024) are known: convert it to Diffusers' directory, whose config.json says its heads"
        )
    levels: list[list[tuple[int, bool]]] = [[]]
    n = 1
    while any(name.startswith(f"input_blocks.{n}.0.") for name in tensors):
        if f"input_blocks.{n}.0.op.weight" in tensors:
            levels.append([])
        else:
            width = tensors[f"input_blocks.{n}.0.out_layers.3.weight"].shape[0]
            levels[-1].append((width, f"input_blocks.{n}.1.norm.weight" in tensors))
        n += 1
    depths = {int(m[1]) for k in tensors if (m := re.search(r"transformer_blocks\.(\d+)\.", k))}
    hints = sorted(n for k in tensors if (n := _hint_place(k)) is not None)
    widths = [tensors[f"input_hint_block.{n}.weight"].shape[0] for n in hints]
    unet = UNet(
        channels=channels,
        multipliers=tuple(level[0][0] // channels for level in levels),
        blocks=len(levels[0]),
        attention=tuple(level[0][1] for level in levels),
        transformer_depth=1 + max(depths),
        linear_projection=tensors["middle_block.1.proj_in.weight"].ndim == 2,
        epsilon=1e-5,
        downsample_padding=1,
        flip_sin_to_cos=True,
        freq_shift=0,
        **HEADS[context],
    )
    return beside(unet, tuple(widths[:1] + widths[2:-1:2]))


def _hint_place(name: str) -> int | None:
    match = re.fullmatch(r"input_hint_block\.(\d+)\.weight", name)
    return int(match[1]) if match else None


def file_rules(module: ControlNet) -> files.Rules:
    """`files.torch_name`'s rules of the authors' file."""
    convolutions = 2 * (len(module.hint_widths) - 1)
    hints = {f"hint_{i}": 2 * (i + 1) for i in range(convolutions)}
    hints |= {"hint_in": 0, "hint_out": 2 * (convolutions + 1)}
    return (
        (r"^/zero_(\d+)/", r"/zero_convs/\1/0/"),
        (r"^/zero_mid/", "/middle_block_out/0/"),
        *((rf"^/{ours}/", f"/input_hint_block/{n}/") for ours, n in hints.items()),
        *compvis_ldm.unet_rules(module),
    )


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
