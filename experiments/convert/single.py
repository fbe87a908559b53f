"""A single file of CompVis's to what a workdir is made of: LDM's and Stable Diffusion's `.ckpt`."""

import importlib
import pathlib
import re
from typing import Any

from ml_collections import ConfigDict

from diffusion.data import tokenizer_files
from diffusion.data.tokenizers import TokenizerPair
from diffusion.interop import compvis, compvis_ldm, single_file
from diffusion.models.text_encoder import TextPair
from experiments.convert.reading import Parts, fields, finish, first_stage_parts, stage_kind
from experiments.run import build, given

# Which config a CompVis file of these widths is: (of the U-Net, of its context).
KNOWN = {
    (320, 768): "stable_diffusion:v1",
    (320, 1024): "stable_diffusion:v2",
    (320, 1280): "ldm_text:laion",
    (320, 2048): "stable_diffusion:xl",
    (192, 512): "ldm_imagenet256:f4",
    (256, 512): "ldm_imagenet256:f8",
    (224, None): "ldm_celebahq256",
    (192, None): "ldm_lsun256:churches",
    (160, None): "ldm_super_resolution:openimages",
    (256, None): "ldm_inpainting:places",
    (128, None): "ldm_semantic:landscapes",
    (128, 512): "ldm_layout:openimages",
    (192, 640): "ldm_text:cc",
}


def from_compvis(
    source: pathlib.Path, config: ConfigDict | None, tokenizer: pathlib.Path | None
) -> Parts:
    """Reads one file of CompVis's. ValueError naming it for what is missing or does not fit."""
    held = single_file.read_file(source)
    bare = not any(name.startswith(compvis_ldm.UNET) for name in held.tensors)
    if config.task == "autoencoder" if config else bare:
        return first_stage_parts(*_compvis_first_stage(source, config), 1.0, 0.0, 256)
    config = ConfigDict((config or _guess(held.tensors, source)).to_dict())
    params: dict[str, Any] = {
        "denoiser": compvis_ldm.read_unet(held, build.denoiser_network(config))
    }
    if "autoencoder" in config.model:
        module, params["autoencoder"] = _compvis_first_stage(source, config)
        config.model.autoencoder = {"name": stage_kind(module), **fields(module)}
    if "class_embedder" in config.model:
        embedder = build.class_embedder(config)
        params["class_embedder"] = compvis_ldm.read_class_embedder(held, embedder)
    if "rescaler" in config.model:
        module = given.concat(config).rescaler
        params["rescaler"] = compvis_ldm.read_rescaler(held, module)
    parts = Parts(config, params, compvis_ldm.scale_factor(held) or _scale(config))
    if "text_encoder" in config.model:
        encoder: Any = build.text_encoder(config)
        two = isinstance(encoder, TextPair)
        read: Any = compvis_ldm.read_text_pair if two else compvis_ldm.read_text_encoder
        params["text_encoder"] = read(held, encoder)
        if tokenizer is None and build.reads_captions(config):
            raise ValueError(
                f"{source} holds no tokenizer, which its text encoder needs: give --tokenizer=DIR "
                "with vocab.json and merges.txt (CLIP) or vocab.txt (BERT)"
            )
        if build.reads_captions(config):
            parts.tokenizer = tokenizer_files.load(tokenizer)
            if two:  # the second one's differs in its padding alone
                other = tokenizer_files.load(tokenizer, pad_token="!")
                parts.tokenizer = TokenizerPair.join(parts.tokenizer, other)
    config.init_from = ""
    parts.config = finish(config, params["denoiser"], source)
    return parts


def _compvis_first_stage(source: pathlib.Path, config: ConfigDict | None) -> tuple[Any, Any]:
    """Module and parameters; the groups of its norms, which no tensor tells, are the config's."""
    groups = build.autoencoder(config.model.autoencoder).groups if config else 32
    return compvis.load_compvis_autoencoder(source, groups=groups)


def _guess(tensors: dict[str, Any], source: pathlib.Path) -> ConfigDict:
    first = tensors.get(f"{compvis_ldm.UNET}input_blocks.0.0.weight")
    widths = (None if first is None else first.shape[0], compvis_ldm.context_width(tensors))
    if widths == (384, 1280):
        raise ValueError(
            f"{source} is Stable Diffusion XL's refiner, which is not read: give its base"
        )
    if widths not in KNOWN:
        raise ValueError(
            f"{source} has a U-Net of width {widths[0]} with a context of {widths[1]}, which no "
            "published model has: give its config, --config=configs/X.py"
        )
    name, _, argument = KNOWN[widths].partition(":")
    config = importlib.import_module(f"configs.{name}").get_config(argument)
    _header(config, tensors, source, f"{name}.py:{argument}".rstrip(":"))
    return config


PREDICTIONS = {"epsilon": "eps", "v": "v"}


def _header(config: ConfigDict, tensors: dict[str, Any], source: pathlib.Path, named: str) -> None:
    """What a file's header and marks say of prediction and size, which no width tells."""
    odd = [n for n in tensors if n.startswith(("edm_mean", "edm_std", "edm_vpred"))]
    if odd:
        raise ValueError(
            f"{source} is marked {odd[0]}: its noise is EDM's, which is not read from one file"
        )
    header = single_file.read_header(source)
    said = header.get("modelspec.prediction_type", "v" if "v_pred" in tensors else None)
    size = re.fullmatch(r"(\d+)(x\1)?", header.get("modelspec.resolution", ""))
    if "ztsnr" in tensors or said not in (None, *PREDICTIONS):
        mark = "ztsnr" if "ztsnr" in tensors else f"modelspec.prediction_type={said}"
        raise ValueError(f"{source} is marked {mark}: give its config, --config=configs/{named}")
    if said is None and named.endswith(":v2"):
        raise ValueError(
            f"{source} does not say whether it predicts noise (2-base) or velocity (768-v): give "
            f"--config=configs/{named} with --config.process.prediction=eps and "
            "--config.data.image_size=512, or =v and =768"
        )
    if said is not None:
        config.process.prediction = PREDICTIONS[said]
    if size is not None:
        config.data.image_size = int(size[1])
    elif named.endswith(":v2") and said == "epsilon":
        config.data.image_size = 512


def _scale(config: ConfigDict) -> float:
    if "online" in config:
        return config.online.scale
    return config.latents.scale if "latents" in config else 1.0
