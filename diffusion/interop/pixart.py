"""PixArt of Diffusers, both ways: alpha at 512, sigma.

It is `models/transformer.py` with adaLN-single and cross-attention; alpha at 1024, told of
resolution and aspect ratio, is refused.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from diffusion.interop import files
from diffusion.interop import text_transformer as shared
from diffusion.models.transformer import Transformer

OUT_EPSILON = 1e-6  # of Diffusers' last norm, whatever norm_eps says
PIXART = "PixArtTransformer2DModel"
PIXART_RULES: files.Rules = (
    (r"^/time_(\d)/", r"/adaln_single/emb/timestep_embedder/linear_\1/"),
    (r"^/modulation/", "/adaln_single/linear/"),
    (r"^/context_(\d)/", r"/caption_projection/linear_\1/"),
    *shared.SHARED,
)
PIXART_ONLY: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "attention_type": ("default", None),
    "dropout": (0.0,),
    "norm_elementwise_affine": (False,),
    "norm_type": ("ada_norm_single",),
    "upcast_attention": (False, True),  # scores are float32 here
}
PIXART_NUMBERS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "sample_size": 128,
    "patch_size": 2,
    "norm_eps": 1e-6,
    "interpolation_scale": None,
    "use_additional_conditions": None,
    "caption_channels": None,
    **dict.fromkeys(("norm_num_groups", "num_embeds_ada_norm")),  # nothing is made of them
}
PIXART_IS = {
    "modulation": "single",
    "cross": True,
    "positions": "sincos",
    "norm": "layer",
    "mult": 4,
    "activation": "gelu_tanh",
    **dict.fromkeys(("pool_context", "qk_norm", "factorised"), False),
    **dict.fromkeys(("registers", "label_tokens", "freq_shift"), 0),
    **dict.fromkeys(("num_classes", "mlp_epsilon", "bottleneck")),
}


def load_pixart(directory: str | os.PathLike) -> tuple[Transformer, dict[str, Any]]:
    """`(module, params)` of a Diffusers directory, parameters in float32; other sizes than its own
    are interpolated, as Diffusers does. ValueError naming the key for what is not expressed here.
    """
    config, path = files.read_config(directory, {PIXART}), Path(directory) / "config.json"
    files.refuse_unknown(config, {*PIXART_ONLY, *PIXART_NUMBERS}, path)
    files.require(config, PIXART_ONLY, path)
    given = {**PIXART_NUMBERS, **config}
    heads, size = given["num_attention_heads"], given["sample_size"]
    width = heads * given["attention_head_dim"]
    told = given["use_additional_conditions"]
    if told or (told is None and size == 128):
        raise ValueError(
            f"{path}: use_additional_conditions={told} with sample_size={size} tells the network "
            "of resolution and aspect ratio, which is not read here: use PixArt-sigma, or alpha at "
            "512"
        )
    if given["caption_channels"] is None or given["cross_attention_dim"] != width:
        raise ValueError(
            f"{path}: caption_channels={given['caption_channels']}, cross_attention_dim="
            f"{given['cross_attention_dim']}: captions must be projected to the width {width}"
        )
    module = Transformer(
        out_channels=given["out_channels"] or given["in_channels"],
        patch=given["patch_size"],
        width=width,
        depth=given["num_layers"],
        heads=heads,
        size=size,
        interpolate=True,
        position_scale=given["interpolation_scale"] or max(size // 64, 1),
        modulation="single",
        cross=True,
        epsilon=given["norm_eps"],
        out_epsilon=OUT_EPSILON,
    )
    words = {"context": jnp.zeros((1, 1, given["caption_channels"]))}
    return module, shared.read(directory, module, given["in_channels"], PIXART_RULES, words)


def sizes(module: Transformer, params: Mapping[str, Any]) -> dict[str, Any]:
    """What PixArt's and Latte's config files say alike. ValueError for another last epsilon."""
    if (found := module.out_epsilon or module.epsilon) != OUT_EPSILON:
        raise ValueError(
            f"out_epsilon={found} cannot be written for Diffusers, "
            f"whose last norm has {OUT_EPSILON}"
        )
    return {
        "attention_head_dim": module.width // module.heads,
        "caption_channels": params["context_1"]["kernel"].shape[0],
        "cross_attention_dim": module.width,
        "in_channels": shared.channels(module, params),
        "norm_eps": module.epsilon,
        "num_attention_heads": module.heads,
        "num_layers": module.depth,
        "out_channels": module.out_channels,
    }


def save_pixart(
    directory: str | os.PathLike, module: Transformer, params: Mapping[str, Any]
) -> None:
    """Writes a directory that Diffusers loads. ValueError where it has no such network."""
    shared.same(module, PIXART_IS, PIXART)
    if not isinstance(module.patch, int) or not isinstance(module.size, int):
        raise ValueError(
            f"patch={module.patch} and size={module.size} cannot be written for Diffusers: its "
            f"{PIXART} has one number for both axes"
        )
    config = {
        "_class_name": PIXART,
        **sizes(module, params),
        "interpolation_scale": module.position_scale,
        "patch_size": module.patch,
        "sample_size": module.size,
        "use_additional_conditions": False,
    }
    shared.write(directory, module, params, config, PIXART_RULES)
