"""The text encoders of Diffusers' pipelines that have several, Stable Diffusion XL and 3."""

import dataclasses
import pathlib
from typing import Any

from ml_collections import ConfigDict

from diffusion import interop
from diffusion.data import tokenizer_files
from diffusion.data.tokenizers import Tokenizer, TokenizerPair
from diffusion.files import read_json
from diffusion.interop import files

REMEDY = "fetch it, or name a pipeline's directory as --source"
SEVERAL = {  # what ends the names of their folders
    "StableDiffusionXLPipeline": ("", "_2"),
    "StableDiffusion3Pipeline": ("", "_2", "_3"),
}


def several(
    source: pathlib.Path, index: dict[str, Any], config: ConfigDict, width: int | None
) -> tuple[dict[str, Any], Tokenizer]:
    """(parameters, tokenizer), and what they are into `config`. width: of the context of Stable
    Diffusion 3, whose T5 may be missing; None: it is XL. ValueError naming what does not fit."""
    needed = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    if missing := [name for name in needed if not index.get(name)]:
        raise ValueError(
            f"{source} has no {missing[0]}, which Stable Diffusion 3 and XL's base have: XL's "
            "refiner, of one text encoder and told of aesthetics, is not read here"
        )
    words = [tokenizer_files.load(source / name) for name in needed[2:]]
    end, third = words[1].encode([""], 3)[0, 1].item(), width
    if width and index.get("text_encoder_3"):
        third = source / "text_encoder_3"
        words.append(tokenizer_files.load(source / "tokenizer_3"))
    module, params = interop.load_text_pair(source / needed[0], source / needed[1], end, third)
    length = module.first.max_length
    for name, word in zip(needed[2:], words):
        path = source / name / "tokenizer_config.json"
        said = (read_json(path, REMEDY) if path.exists() else {}).get("model_max_length", length)
        if not isinstance(said, (int, float)) or said < length or word.encode([""], 3)[0, 1] != end:
            raise ValueError(
                f"{path}: model_max_length={said} and the end token must be the text encoders' "
                f"{length} and {end}: fetch both again"
            )
    described = {**fields(module.second), "projection": module.projection, "end": module.end}
    config.model.update({"text_encoder": fields(module.first), "text_encoder_2": described})
    config.conditioning.train_text_encoder = False
    if module.third is not None:
        config.model.text_encoder.projection = module.first_projection
        described = {**fields(module.third), "max_length": module.third_length}
        config.model.text_encoder_3 = described
        if module.third.width != width:
            raise ValueError(
                f"{source}: text_encoder_3 has d_model={module.third.width}, but the transformer "
                f"joint_attention_dim={width}: fetch both again"
            )
        return params, TokenizerPair.join(*words, third_length=module.third_tokens)
    told = files.read_config(source / "unet", ())
    config.conditioning.size_dim = told["addition_time_embed_dim"]
    said = read_json(source / "model_index.json", REMEDY)
    config.conditioning.zero_null = bool(said.get("force_zeros_for_empty_prompt", True))
    return params, TokenizerPair.join(*words)


def fields(module: Any) -> dict[str, Any]:
    """What a module is, as a section of a config."""
    left_out = ("dtype", "remat", "parent", "name")
    names = [f.name for f in dataclasses.fields(module) if f.name not in left_out]
    return {name: getattr(module, name) for name in names}
