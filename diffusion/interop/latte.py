"""Latte of Diffusers (`LatteTransformer3DModel`), both ways: PixArt's blocks, and between them
others along time, which read no caption."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from diffusion.interop import files, pixart
from diffusion.interop import text_transformer as shared
from diffusion.models.transformer import Transformer

LATTE = "LatteTransformer3DModel"
ONLY: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "dropout": (0.0,),
    "norm_elementwise_affine": (False,),
    "norm_type": ("ada_norm_single",),
}
NUMBERS = {
    "num_attention_heads": 16,
    "attention_head_dim": 88,
    "in_channels": None,
    "out_channels": None,
    "num_layers": 1,
    "cross_attention_dim": None,
    "sample_size": 64,
    "patch_size": None,
    "num_embeds_ada_norm": None,  # nothing is made of it
    "norm_eps": 1e-5,
    "caption_channels": None,
    "video_length": 16,
}
RULES: files.Rules = (
    (r"^/time_blocks_(\d+)/", r"/temporal_transformer_blocks/\1/"),
    *pixart.PIXART_RULES,
)


def load_latte(directory: str | os.PathLike) -> tuple[Transformer, dict[str, Any]]:
    """`(module, params)` of a Diffusers directory, parameters in float32; a video is (batch,
    frames, height, width, channels). ValueError naming the key for what is not expressed here."""
    config, path = files.read_config(directory, {LATTE}), Path(directory) / "config.json"
    files.refuse_unknown(config, {*ONLY, *NUMBERS}, path)
    files.require(config, ONLY, path)
    given = {**NUMBERS, **config}
    heads, size, patch = (given[k] for k in ("num_attention_heads", "sample_size", "patch_size"))
    width = heads * given["attention_head_dim"]
    if given["caption_channels"] is None or given["cross_attention_dim"] != width:
        raise ValueError(
            f"{path}: caption_channels={given['caption_channels']}, cross_attention_dim="
            f"{given['cross_attention_dim']}: captions must be projected to the width {width}"
        )
    module = Transformer(
        out_channels=given["out_channels"] or given["in_channels"],
        patch=(1, patch, patch),
        width=width,
        depth=given["num_layers"],
        heads=heads,
        size=(given["video_length"], size, size),
        position_scale=max(size // 64, 1),
        modulation="single",
        cross=True,
        epsilon=given["norm_eps"],
        out_epsilon=pixart.OUT_EPSILON,
        factorised=True,
    )
    words = {"context": jnp.zeros((1, 1, given["caption_channels"]))}
    return module, shared.read(directory, module, given["in_channels"], RULES, words)


def save_latte(
    directory: str | os.PathLike, module: Transformer, params: Mapping[str, Any]
) -> None:
    """Writes a directory that Diffusers loads. ValueError where it has no such network."""
    shared.same(module, {**pixart.PIXART_IS, "factorised": True}, LATTE)
    size: Any = module.size
    patch: Any = module.patch
    square = isinstance(size, tuple) and isinstance(patch, tuple) and size[1] == size[-1]
    if not square or patch != (1, patch[-1], patch[-1]):
        raise ValueError(
            f"patch={patch} and size={size} cannot be written for Diffusers: its {LATTE} has "
            "patches of one frame, and squares"
        )
    if module.position_scale != max(size[1] // 64, 1):
        raise ValueError(
            f"position_scale={module.position_scale} cannot be written for Diffusers: of size "
            f"{size[1]} its {LATTE} has {max(size[1] // 64, 1)}"
        )
    config = {
        "_class_name": LATTE,
        **{key: value[0] for key, value in ONLY.items()},
        **pixart.sizes(module, params),
        "patch_size": patch[-1],
        "sample_size": size[1],
        "video_length": size[0],
    }
    shared.write(directory, module, params, config, RULES)
