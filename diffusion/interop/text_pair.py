"""Stable Diffusion XL's two text encoders and Stable Diffusion 3's three, directories of their own.

`CLIPTextModel` (3: with a projection), `CLIPTextModelWithProjection`, and 3's T5, or none.
"""

import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from diffusion.interop import text_encoder
from diffusion.interop.files import read_config, to_tensors, write_directory
from diffusion.interop.t5 import load_t5, save_t5
from diffusion.interop.weight_files import read_weights
from diffusion.models.t5 import T5Encoder
from diffusion.models.text_encoder import TextPair, TextTransformer

PROJECTION = "text_projection.weight"
Directory = str | os.PathLike


def load_text_pair(
    first: Directory, second: Directory, end: int, third: Directory | int | None = None
) -> tuple[TextPair, dict[str, Any]]:
    """(module, float32 parameters) of Stable Diffusion XL's two directories; `end`: the end token's
    id. third: Stable Diffusion 3's T5, or the width of the zeros in its place.

    ValueError as `load_text_encoder`, and for another end token in a directory's config.
    """
    ours, own = text_encoder.load_text_encoder(first)
    theirs, other = text_encoder.load_text_encoder(second)
    params = {"first": own, "second": other, "project": _projection(second, theirs, end)}
    sizes = {"projection": params["project"]["kernel"].shape[1], "end": end}
    if third is None:
        return TextPair(ours, theirs, **sizes), params
    params["project_first"] = _projection(first, ours, end)
    sizes["first_projection"] = params["project_first"]["kernel"].shape[1]
    if isinstance(third, int):
        return TextPair(ours, theirs, **sizes, third=T5Encoder(width=third, layers=0)), params
    t5, params["third"] = load_t5(third)
    return TextPair(ours, theirs, **sizes, third=t5), params


def _projection(directory: Directory, module: TextTransformer, end: int) -> dict[str, Any]:
    """Of the end token, which Transformers finds by its id, or where that is 2 by the greatest."""
    config = read_config(directory, text_encoder.CLASSES)
    config = config.get("text_config") or config
    if (said := config.get("eos_token_id", end)) not in (end, 2, None):
        raise ValueError(
            f"{directory}: eos_token_id={said} is not the tokenizer's {end}, whose token is the "
            "pooled one: fetch both again"
        )
    projection = read_weights(directory, text_encoder.STEM).tensors.get(PROJECTION)
    if projection is None or projection.ndim != 2 or projection.shape[1] != module.width:
        found = None if projection is None else projection.shape
        raise ValueError(
            f"{directory} has a {PROJECTION} of {found}, where a text encoder whose caption is "
            f"pooled has one of (its dim, {module.width}): fetch it again"
        )
    return {"kernel": jnp.asarray(projection.T, jnp.float32)}


def save_text_pair(
    folders: tuple[Directory, Directory, Directory], module: TextPair, params: PyTree
) -> None:
    """Writes the two directories that a `StableDiffusionXLPipeline` loads, or the two or three of a
    `StableDiffusion3Pipeline`."""
    if module.third is None:
        text_encoder.save_text_encoder(folders[0], module.first, params["first"])
    else:
        _save_projected(folders[0], module.first, params["first"], params["project_first"], module)
        if module.third.layers:
            save_t5(folders[2], module.third, params["third"])
    _save_projected(folders[1], module.second, params["second"], params["project"], module)


def _save_projected(
    folder: Directory, encoder: TextTransformer, params: PyTree, project: PyTree, module: TextPair
) -> None:
    text_encoder.check(encoder)
    tensors = to_tensors(params, text_encoder.RULES)
    tensors = {text_encoder.PREFIX + name: value for name, value in tensors.items()}
    tensors[PROJECTION] = np.ascontiguousarray(np.asarray(project["kernel"]).T)
    config = text_encoder.config_of(encoder) | {
        "architectures": ["CLIPTextModelWithProjection"],
        "projection_dim": len(tensors[PROJECTION]),
        "eos_token_id": module.end,
    }
    write_directory(folder, config, tensors, text_encoder.STEM)
