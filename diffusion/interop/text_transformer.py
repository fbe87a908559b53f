"""Stable Diffusion 3's MMDiT of Diffusers, both ways; `pixart.py` and `latte.py` share much of it.

MMDiT's norms at the ends have scale and shift in the other order than everywhere else: they are
swapped.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.interop import files
from diffusion.interop.weight_files import read_weights
from diffusion.models.mmdit import MMDiT
from diffusion.models.positions import sincos_positions

STEM = "diffusion_pytorch_model"
PATCHES, POSITIONS = "pos_embed.proj.weight", "pos_embed.pos_embed"
SHARED: files.Rules = (
    (r"^/patches/", "/pos_embed/proj/"),
    (r"^/out/", "/proj_out/"),
    (r"^/blocks_(\d+)/", r"/transformer_blocks/\1/"),
    (r"/(ff\w*)/proj_in/", r"/\1/net/0/proj/"),
    (r"/(ff\w*)/proj_out/", r"/\1/net/2/"),
    (r"/to_out/", "/to_out/0/"),
)


def read(
    directory: str | os.PathLike, module: Any, in_channels: int, rules: files.Rules, told: Any
) -> dict[str, Any]:
    """Parameters; patches are one dense layer where PyTorch has a convolution."""
    weights = read_weights(directory, STEM)
    tensors = dict(weights.tensors)
    if tensors.get(PATCHES, np.zeros(())).ndim == 4:
        tensors[PATCHES] = np.moveaxis(tensors[PATCHES], 1, -1).reshape(len(tensors[PATCHES]), -1)
    if isinstance(module, MMDiT):
        for name in filter(_swapped(module).match, tensors):
            tensors[name] = np.concatenate(np.split(tensors[name], 2)[::-1])
        stored = tensors.pop(POSITIONS, _grid(module))
        if stored.shape != _grid(module).shape or np.abs(stored - _grid(module)).max() > 1e-5:
            raise ValueError(
                f"{directory}: {POSITIONS} is not that of {module.grid} patches a side"
            )
    space = module.size if isinstance(module.size, tuple) else (module.size,) * 2
    x = jnp.zeros((1, *space, in_channels))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, jnp.zeros(1), **told))
    found = files.Weights(tensors, {k: weights.files[k] for k in tensors}, weights.directory)
    found = found.renamed([(r"scale_shift_table$", "table")])
    return files.to_params(found, shapes["params"], rules)


def write(
    directory: str | os.PathLike,
    module: Any,
    params: Mapping[str, Any],
    config: dict[str, Any],
    rules: files.Rules,
) -> None:
    tensors = files.to_tensors(params, rules)
    tensors = {re.sub(r"\btable$", "scale_shift_table", name): a for name, a in tensors.items()}
    patch = np.max(module.patch)
    kernel = tensors[PATCHES].reshape(module.width, patch, patch, -1)
    tensors[PATCHES] = np.ascontiguousarray(np.moveaxis(kernel, -1, 1))
    if isinstance(module, MMDiT):
        for name in filter(_swapped(module).match, tensors):
            tensors[name] = np.concatenate(np.split(tensors[name], 2)[::-1])
        tensors[POSITIONS] = _grid(module)
    files.write_directory(directory, config, tensors, STEM)


def channels(module: Any, params: Mapping[str, Any]) -> int:
    return params["patches"]["kernel"].shape[0] // int(np.max(module.patch)) ** 2


def same(module: Any, wanted: Mapping[str, Any], cls: str) -> None:
    for key, value in wanted.items():
        if (found := getattr(module, key)) != value:
            raise ValueError(
                f"model.denoiser.{key}={found!r} cannot be written for Diffusers, whose {cls} has "
                f"{value!r}"
            )


SD3 = "SD3Transformer2DModel"
SD3_RULES: files.Rules = (
    (r"^/time_(\d)/", r"/time_text_embed/timestep_embedder/linear_\1/"),
    (r"^/pooled_(\d)/", r"/time_text_embed/text_embedder/linear_\1/"),
    (r"^/context/", "/context_embedder/"),
    (r"^/out_modulation/", "/norm_out/linear/"),
    (r"/modulation/", "/norm1/linear/"),
    (r"/context_modulation/", "/norm1_context/linear/"),
    *SHARED,
)
SD3_NUMBERS: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 96,
    "dual_attention_layers": (),
    "qk_norm": None,
}


def _swapped(module: MMDiT) -> re.Pattern[str]:
    last = rf"transformer_blocks\.{module.depth - 1}\.norm1_context"
    return re.compile(rf"^(norm_out|{last})\.linear\.(weight|bias)$")


def _grid(module: MMDiT) -> np.ndarray:
    places = np.arange(module.grid) * (module.size // module.patch / module.grid)
    return sincos_positions([places] * 2, module.width)[None].astype(np.float32)


def load_sd3(directory: str | os.PathLike) -> tuple[MMDiT, dict[str, Any]]:
    """`(module, params)` of a Diffusers directory (3 and 3.5), parameters in float32.

    ValueError naming the file and the key for what the module cannot express.
    """
    config, path = files.read_config(directory, {SD3}), Path(directory) / "config.json"
    files.refuse_unknown(config, SD3_NUMBERS, path)
    files.require(config, {"qk_norm": (None, "rms_norm")}, path)
    given = {**SD3_NUMBERS, **config}
    heads, dual = given["num_attention_heads"], list(given["dual_attention_layers"])
    width = heads * given["attention_head_dim"]
    if given["caption_projection_dim"] != width or dual != list(range(len(dual))):
        raise ValueError(
            f"{path}: caption_projection_dim={given['caption_projection_dim']} must be the width "
            f"{width}, and dual_attention_layers={dual} the first ones"
        )
    module = MMDiT(
        out_channels=given["out_channels"] or given["in_channels"],
        patch=given["patch_size"],
        width=width,
        depth=given["num_layers"],
        heads=heads,
        size=given["sample_size"],
        grid=given["pos_embed_max_size"],
        qk_norm=given["qk_norm"] is not None,
        dual=len(dual),
    )
    told = {
        "context": jnp.zeros((1, 1, given["joint_attention_dim"])),
        "pooled": jnp.zeros((1, given["pooled_projection_dim"])),
    }
    return module, read(directory, module, given["in_channels"], SD3_RULES, told)


def save_sd3(directory: str | os.PathLike, module: MMDiT, params: Mapping[str, Any]) -> None:
    """Writes a directory that Diffusers loads. ValueError where it has no such network."""
    wanted = {"mult": 4, "activation": "gelu_tanh", "epsilon": 1e-6, "pool": "given"}
    same(module, wanted, SD3)
    config = {
        "_class_name": SD3,
        "attention_head_dim": module.width // module.heads,
        "caption_projection_dim": module.width,
        "dual_attention_layers": list(range(module.dual)),
        "in_channels": channels(module, params),
        "joint_attention_dim": params["context"]["kernel"].shape[0],
        "num_attention_heads": module.heads,
        "num_layers": module.depth,
        "out_channels": module.out_channels,
        "patch_size": module.patch,
        "pooled_projection_dim": params["pooled_1"]["kernel"].shape[0],
        "pos_embed_max_size": module.grid,
        "qk_norm": "rms_norm" if module.qk_norm else None,
        "sample_size": module.size,
    }
    write(directory, module, params, config, SD3_RULES)
