"""U-Nets of Diffusers, both ways.

`UNet2DModel` (DDPM, ADM, LDM without context); `UNet2DConditionModel` (LDM, Stable Diffusion).
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.interop import files
from diffusion.interop.unet_config import CONDITIONAL, PLAIN, read_unet_config, unet_config
from diffusion.interop.weight_files import read_weights
from diffusion.models.unet import UNet

STEM = "diffusion_pytorch_model"

RULES: files.Rules = (
    (r"^/time_(\d)/", r"/time_embedding/linear_\1/"),
    (r"^/guidance_proj/", "/time_embedding/cond_proj/"),
    (r"^/vector_(\d)/", r"/add_embedding/linear_\1/"),
    (r"^/norm_out/", "/conv_norm_out/"),
    (r"^/(down|up)_(\d+)_res_(\d+)/", r"/\1_blocks/\2/resnets/\3/"),
    (r"^/(down|up)_(\d+)_attn_(\d+)/", r"/\1_blocks/\2/attentions/\3/"),
    (r"^/(down|up)_(\d+)_sample/", r"/\1_blocks/\2/\1samplers/0/"),
    (r"^/mid_res_(\d)/", r"/mid_block/resnets/\1/"),
    (r"^/mid_attn/", "/mid_block/attentions/0/"),
    (r"/blocks_(\d+)/", r"/transformer_blocks/\1/"),
    (r"/ff/proj_in/", "/ff/net/0/proj/"),
    (r"/ff/proj_out/", "/ff/net/2/"),
    (r"/attention/", "/"),
    (r"/to_out/", "/to_out/0/"),
)


def load_unet(directory: str | os.PathLike) -> tuple[UNet, dict[str, Any]]:
    """The U-Net of a Diffusers directory: `(module, params)`, parameters in float32.

    ValueError naming the file and the key for a config that the module cannot express, and for
    weights that are missing, truncated, of another shape or left over.
    """
    module, shapes = described(directory)
    weights = read_weights(directory, STEM).renamed(files.OLD_ATTENTION_NAMES)
    return module, files.to_params(weights, shapes, RULES)


def described(directory: str | os.PathLike) -> tuple[UNet, Any]:
    """(module, the shapes of its parameters), by the directory's config."""
    source = Path(directory) / "config.json"
    config = files.read_config(directory, {PLAIN, CONDITIONAL})
    with files.naming(source):
        width = _vector_width(config, source)
        plain = {**config, "addition_embed_type": None} if width else config
        module, in_channels, context_width = read_unet_config(plain, source)
        module = module.clone(vector=width is not None)
        return module, unet_shapes(module, in_channels, context_width, width)


def _vector_width(config: Mapping[str, Any], source: Path) -> int | None:
    """Of Stable Diffusion XL's pooled caption and sinusoids of six sizes; None: it has no such."""
    if config.get("addition_embed_type") != "text_time":
        return None
    # Sinusoids are made beside the network (`training/conditions.py`), these ones.
    sinusoids = {"flip_sin_to_cos": (True,), "freq_shift": (0,)}
    files.require(config, sinusoids, source)
    width, each = (
        config.get(key)
        for key in ("projection_class_embeddings_input_dim", "addition_time_embed_dim")
    )
    if not isinstance(width, int) or not isinstance(each, int) or not 0 < 6 * each < width:
        raise ValueError(
            f"{source}: projection_class_embeddings_input_dim={width} must be addition_time_embed_"
            f"dim={each} six times and the width of a pooled caption: mend it"
        )
    return width


def save_unet(
    directory: str | os.PathLike,
    module: UNet,
    params: Mapping[str, Any],
    sample_size: int | None = None,
    size_dim: int = 256,
) -> None:
    """Writes a directory that Diffusers loads, as UNet2DConditionModel where there is a context.

    `sample_size`: the side of the square the network was trained on, which Diffusers' pipelines
    take as their default. `size_dim`: sinusoids of a size, where there is a vector. ValueError
    where it has no such network; then nothing is written.
    """
    if type(module) is not UNet:
        raise ValueError(
            f"a {type(module).__name__} has no class in Diffusers: of U-Nets only those of kind "
            "'unet' are written"
        )
    config = {**unet_config(module.clone(vector=False), params), "sample_size": sample_size}
    if module.vector:
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": size_dim}
        config["projection_class_embeddings_input_dim"] = params["vector_1"]["kernel"].shape[0]
    files.write_directory(directory, config, files.to_tensors(params, RULES), STEM)


def unet_shapes(
    module: UNet, in_channels: int, context_width: int | None, vector_width: int | None = None
) -> Any:
    """The tree of parameter shapes for two spatial axes, without computing anything."""
    size = 2 ** (module.levels - 1)
    inputs: dict[str, Any] = {
        "x": jnp.zeros((1, size, size, in_channels)),
        "t": jnp.zeros(1),
        "context": None if context_width is None else jnp.zeros((1, 1, context_width)),
        "labels": None if module.num_classes is None else jnp.zeros(1, int),
        "vector": None if vector_width is None else jnp.zeros((1, vector_width)),
    }
    return jax.eval_shape(lambda: module.init(jax.random.key(0), **inputs))["params"]
