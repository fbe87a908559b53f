"""CLIP in Transformers' format: directories of `CLIPModel`, or of the image tower alone.

load_image_encoder(dir)   CLIPModel or CLIPVisionModelWithProjection: (module, parameters)
load_clip(dir)            CLIPModel: both towers, their projections and the end token
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.files import read_json
from diffusion.interop.files import Rules, read_config, require, to_params, whole_numbers
from diffusion.interop.text_encoder import STEM, load_text_encoder, multiple
from diffusion.interop.weight_files import read_weights
from diffusion.models.clip import MEAN, STD, ImageTransformer
from diffusion.models.text_encoder import TextTransformer

CLASSES = ("CLIPModel", "CLIPVisionModelWithProjection")
NOT_IMAGE = r"^(text_model|text_projection|logit_scale)\b|position_ids$"
OLD_END = 2  # written for it in old files, where the largest token is meant

RULES: Rules = (
    (r"^/$", r"/vision_model/embeddings/"),  # the class token is a leaf of the whole
    (r"^/(patch|position)_embedding/", r"/vision_model/embeddings/\1_embedding/"),
    (r"^/norm_pre/", r"/vision_model/pre_layrnorm/"),
    (r"^/norm_post/", r"/vision_model/post_layernorm/"),
    (r"^/projection/", r"/visual_projection/"),
    (r"^/layers_(\d+)/", r"/vision_model/encoder/layers/\1/"),
    (r"/norm(\d)/", r"/layer_norm\1/"),
    (r"/attention/to_out/", r"/self_attn/out_proj/"),
    (r"/attention/to_(\w)/", r"/self_attn/\1_proj/"),
    (r"/ff/proj_in/", r"/mlp/fc1/"),
    (r"/ff/proj_out/", r"/mlp/fc2/"),
)


@dataclass(frozen=True)
class Clip:
    """Both towers. `params`: "image", "text", and "text_projection" (width, dim).

    end: the end token, None where the largest token is it. mean, std: of the preprocessing.
    """

    image: ImageTransformer
    text: TextTransformer
    params: dict[str, Any]
    end: int | None
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


def load_clip(directory: str | os.PathLike) -> Clip:
    """A `CLIPModel` directory. ValueError naming the file for anything missing or another's."""
    config = read_config(directory, ("CLIPModel",))
    image, image_params = load_image_encoder(directory)
    text, text_params = load_text_encoder(directory)
    weights = read_weights(directory, STEM)
    if "text_projection.weight" not in weights.tensors:
        raise ValueError(f"{directory} has no tensor text_projection.weight: give a CLIPModel's")
    projection = jnp.asarray(weights.tensors["text_projection.weight"].T, jnp.float32)
    end = (config.get("text_config") or {}).get("eos_token_id", 49407)
    params = {"image": image_params, "text": text_params, "text_projection": projection}
    mean, std = _moments(Path(directory) / "preprocessor_config.json")
    return Clip(image, text, params, None if end == OLD_END else end, mean, std)


def load_image_encoder(
    directory: str | os.PathLike, dtype: Any = None
) -> tuple[ImageTransformer, dict[str, Any]]:
    """(module, float32 parameters). ValueError naming the file for anything missing, broken, of
    another shape, or of an architecture that is not CLIP's."""
    config = read_config(directory, CLASSES)
    vision = config.get("vision_config") or config
    projection = config.get("projection_dim", 512)
    module = _module({**vision, "projection_dim": projection}, directory, dtype)
    image = jnp.zeros((1, module.image_size, module.image_size, vision.get("num_channels", 3)))
    shapes = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
    weights = read_weights(directory, STEM).without(NOT_IMAGE)
    return module, to_params(weights, shapes, RULES)


SIZES = (
    *("hidden_size", "intermediate_size", "image_size", "patch_size", "projection_dim"),
    *("num_hidden_layers", "num_attention_heads"),
)


def _module(config: dict[str, Any], source: object, dtype: Any) -> ImageTransformer:
    """Defaults are those of `CLIPVisionConfig`, which older files leave out."""
    width, inner = config.get("hidden_size", 768), config.get("intermediate_size", 3072)
    require(config, {"hidden_act": ("quick_gelu", "gelu"), "num_channels": (3,)}, source)
    whole_numbers(config, SIZES, source)
    return ImageTransformer(
        image_size=config.get("image_size", 224),
        patch=config.get("patch_size", 32),
        width=width,
        layers=config.get("num_hidden_layers", 12),
        heads=config.get("num_attention_heads", 12),
        mult=multiple(inner, width),
        projection=config["projection_dim"],
        activation=config.get("hidden_act", "quick_gelu"),
        epsilon=config.get("layer_norm_eps", 1e-5),
        dtype=dtype,
    )


def _moments(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the image processor; OpenAI's where there is no file."""
    found = read_json(path, "fetch it again") if path.is_file() else {}
    return tuple(found.get("image_mean", MEAN)), tuple(found.get("image_std", STD))
