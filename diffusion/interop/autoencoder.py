"""First stages in Diffusers' format: `AutoencoderKL` and `VQModel` directories.

Diffusers' `models/autoencoders/{autoencoder_kl,vq_model,vae}.py` hold LDM's networks under other
names:

    config                                      here
    block_out_channels (128, 256, 512, 512)     channels 128, multipliers (1, 2, 4, 4)
    layers_per_block                            blocks
    Attn{Down,Up}{En,De}coderBlock2D            attention, per level
    latent_channels, vq_embed_dim               z_channels, embed_channels
    num_vq_embeddings                           num_codes

`scaling_factor` and `shift_factor` say how a diffusion model scales the latents; a first stage here
does not scale, so they are read apart (`load_scaling`) and written on request.
"""

import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from diffusion.interop.files import (
    OLD_ATTENTION_NAMES,
    Rules,
    naming,
    read_config,
    refuse_unknown,
    require,
    to_params,
    to_tensors,
    whole_numbers,
    write_directory,
)
from diffusion.interop.weight_files import read_weights
from diffusion.models.autoencoder import AutoencoderKL, VQModel

STEM = "diffusion_pytorch_model"
CLASSES = ("AutoencoderKL", "VQModel")

RULES: Rules = (
    (r"/(down|up)_(\d+)_res_(\d+)/", r"/\1_blocks/\2/resnets/\3/"),
    (r"/(down|up)_(\d+)_attn_(\d+)/", r"/\1_blocks/\2/attentions/\3/"),
    (r"/(down|up)_(\d+)_sample/", r"/\1_blocks/\2/\1samplers/0/"),
    (r"/mid_res_(\d+)/", r"/mid_block/resnets/\1/"),
    (r"/mid_attn/", r"/mid_block/attentions/0/"),
    (r"/attention/", r"/"),
    (r"/to_out/", r"/to_out/0/"),
    (r"/norm_out/", r"/conv_norm_out/"),
    (r"/codebook/", r"/quantize/embedding/"),
)

BLOCK_TYPES = {
    "down": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}

# The first value of each is Diffusers' default.
SUPPORTED = {
    "act_fn": ("silu", "swish"),
    "norm_type": ("group",),
    "latents_mean": (None,),
    "latents_std": (None,),
    "lookup_from_codebook": (False,),
}
# Read below, or (force_upcast) of no effect on float32.
OTHERS = {
    *("in_channels", "out_channels", "block_out_channels", "layers_per_block", "latent_channels"),
    *("down_block_types", "up_block_types", "mid_block_add_attention", "norm_num_groups"),
    *("use_quant_conv", "use_post_quant_conv", "num_vq_embeddings", "vq_embed_dim"),
    *("scaling_factor", "shift_factor", "sample_size", "force_upcast"),
}


SIZES = ("in_channels", "layers_per_block", "latent_channels", "norm_num_groups")


def load_autoencoder(
    directory: str | os.PathLike, dtype: Any = None
) -> tuple[AutoencoderKL | VQModel, dict[str, Any]]:
    """(module, float32 parameters) of a Diffusers `AutoencoderKL` or `VQModel` directory.

    `dtype`: what the module computes in. ValueError naming the file for anything missing, broken,
    of another shape, or of an architecture that is not LDM's.
    """
    module, shapes = described(directory, dtype)
    weights = read_weights(directory, STEM).renamed(OLD_ATTENTION_NAMES)
    return module, to_params(weights, shapes, RULES)


def described(
    directory: str | os.PathLike, dtype: Any = None
) -> tuple[AutoencoderKL | VQModel, Any]:
    """(module, the shapes of its parameters), by the directory's config."""
    config = read_config(directory, CLASSES)
    with naming(Path(directory) / "config.json"):
        module = _module(config, directory, dtype)
        size = module.downsampling
        image = jnp.zeros((1, size, size, module.image_channels))
        return module, jax.eval_shape(module.init, jax.random.key(0), image)["params"]


def load_scaling(directory: str | os.PathLike) -> tuple[float, float]:
    """(scale, shift): a diffusion model of this first stage sees (z - shift) * scale."""
    config = {"scaling_factor": 0.18215, **read_config(directory, CLASSES)}
    scale, shift = config["scaling_factor"], config.get("shift_factor") or 0.0
    for key, value, least in (("scaling_factor", scale, 0.0), ("shift_factor", shift, -math.inf)):
        if type(value) not in (int, float) or not least < value < math.inf:
            raise ValueError(
                f"{directory}/config.json: {key}={value!r} is no number: fetch it again"
            )
    return scale, shift


def save_autoencoder(
    directory: str | os.PathLike,
    module: AutoencoderKL | VQModel,
    params: PyTree,
    scaling: tuple[float, float] = (1.0, 0.0),
    sample_size: int = 256,
) -> None:
    """Writes a directory that Diffusers loads, whole or not at all.

    `scaling`: as `load_scaling` reads. `sample_size`: pixels a side of the training images, from
    which Diffusers takes its tile size. ValueError for what Diffusers cannot hold.
    """
    tensors = to_tensors(params, RULES)
    _check(module, tensors)
    factors = {"scaling_factor": scaling[0], **({"shift_factor": scaling[1]} if scaling[1] else {})}
    config = _config(module) | factors | {"sample_size": sample_size}
    write_directory(directory, config, tensors, STEM)


def _module(config: dict[str, Any], source: object, dtype: Any) -> AutoencoderKL | VQModel:
    quantised = config.get("_class_name") == "VQModel"
    widths = config.get("block_out_channels", (64,))
    image_channels = config.get("in_channels", 3)
    quant_conv = config.get("use_quant_conv", True)
    pairs = {"out_channels": (image_channels,), "use_post_quant_conv": (quant_conv,)}
    require({"out_channels": 3} | config, SUPPORTED | pairs, source)
    refuse_unknown(config, SUPPORTED.keys() | OTHERS, source)
    whole_numbers(config, SIZES, source)
    size = config.get("sample_size", 32)
    for side in size if isinstance(size, list) and size else [size] * (not quantised):
        whole_numbers({"sample_size": side}, ("sample_size",), source)
    if any(width % widths[0] for width in widths):
        raise ValueError(
            f"{source}: block_out_channels={list(widths)} must be multiples of the first"
        )
    fields = {
        "image_channels": image_channels,
        "channels": widths[0],
        "multipliers": tuple(width // widths[0] for width in widths),
        "blocks": config.get("layers_per_block", 1),
        "attention": _attention(config, len(widths), source),
        "mid_attention": config.get("mid_block_add_attention", True),
        "z_channels": config.get("latent_channels", 3 if quantised else 4),
        "groups": config.get("norm_num_groups", 32),
        "dtype": dtype,
    }
    if not quantised:
        return AutoencoderKL(use_quant_conv=quant_conv, **fields)
    codes, width = config.get("num_vq_embeddings", 256), config.get("vq_embed_dim")
    return VQModel(num_codes=codes, embed_channels=width, **fields)


def _attention(config: dict[str, Any], levels: int, source: object) -> tuple[bool, ...]:
    """Which levels attend. ValueError for other blocks, or where encoder and decoder differ."""
    found = {}
    for way, types in BLOCK_TYPES.items():
        key = f"{way}_block_types"
        names = config.get(key, types[:1])
        if len(names) != levels or set(names) - set(types):
            raise ValueError(
                f"{source}: {key}={list(names)} is not supported: {levels} of "
                f"{' and '.join(types)} are"
            )
        found[way] = tuple(name == types[1] for name in names)
    if found["down"] != found["up"][::-1]:
        raise ValueError(
            f"{source}: down_block_types and up_block_types attend at different levels, which is "
            "not supported: only the same levels in encoder and decoder are"
        )
    return found["down"]


def _config(module: AutoencoderKL | VQModel) -> dict[str, Any]:
    attention = module.attention or (False,) * len(module.multipliers)
    config = {
        "_class_name": type(module).__name__,
        "act_fn": "silu",
        "in_channels": module.image_channels,
        "out_channels": module.image_channels,
        "block_out_channels": [module.channels * m for m in module.multipliers],
        "down_block_types": [BLOCK_TYPES["down"][attend] for attend in attention],
        "up_block_types": [BLOCK_TYPES["up"][attend] for attend in reversed(attention)],
        "layers_per_block": module.blocks,
        "latent_channels": module.z_channels,
        "mid_block_add_attention": module.mid_attention,
        "norm_num_groups": module.groups,
    }
    if isinstance(module, VQModel):
        return config | {
            "num_vq_embeddings": module.num_codes,
            "vq_embed_dim": module.embed_channels,
        }
    return config | {
        "use_quant_conv": module.use_quant_conv,
        "use_post_quant_conv": module.use_quant_conv,
    }


def _check(module: AutoencoderKL | VQModel, tensors: dict[str, Any]) -> None:
    """ValueError where Diffusers has no key for what the module is."""
    quantised = isinstance(module, VQModel)
    kernel = tensors["encoder.conv_in.weight"]
    refused = {
        "patch": (module.patch, module.patch != 1),
        "spatial axes": (kernel.ndim - 2, kernel.ndim != 4),
        "embed_channels": (
            module.embed_channels,
            not quantised and module.latent_channels != module.z_channels,
        ),
        "use_quant_conv": (module.use_quant_conv, quantised and not module.use_quant_conv),
    }
    for key, (value, bad) in refused.items():
        if bad:
            raise ValueError(
                f"{key}={value} cannot be written for Diffusers, whose {type(module).__name__} has "
                "LDM's network on images alone: keep this first stage in its own checkpoint"
            )
