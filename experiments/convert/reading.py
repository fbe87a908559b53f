"""Other projects' weights to what a workdir is made of: the half of `convert` that reads.

A pipeline's directory of Diffusers, or one of its first stage's or text encoder's alone; a single
file of CompVis's is `single.py`'s.
"""

import dataclasses
import pathlib
from typing import Any

from ml_collections import ConfigDict

from configs import common, common_ldm
from diffusion import interop
from diffusion.data import tokenizer_files
from diffusion.data.tokenizers import Tokenizer
from diffusion.files import read_json
from diffusion.interop import autoencoder, files, scheduler
from diffusion.interop import text_encoder as text_encoders
from diffusion.interop.autoencoder import load_scaling
from diffusion.models.autoencoder import VQModel
from experiments.convert import encoders
from experiments.convert.encoders import REMEDY, fields
from experiments.run import build, given

WORDS = ("text_encoder", "tokenizer")
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "LDMPipeline",
    "LDMSuperResolutionPipeline",
    "DDPMPipeline",
    "DDIMPipeline",
    "DiTPipeline",
)
# What a pipeline of Diffusers sets of its scheduler, whatever the file says.
SETS: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {"clip_sample": False, "steps_offset": 1},
    "StableDiffusionImg2ImgPipeline": {"clip_sample": False, "steps_offset": 1},
    "StableDiffusionInpaintPipeline": {"steps_offset": 1, "skip_prk_steps": True},
}
DENOISERS = {"unet": interop.load_unet, "transformer": interop.load_transformer}


@dataclasses.dataclass
class Parts:
    """What a workdir is made of."""

    config: ConfigDict
    params: dict[str, Any]  # by network
    scale: float = 1.0
    shift: float = 0.0
    tokenizer: Tokenizer | None = None


def from_diffusers(
    source: pathlib.Path, tokenizer: pathlib.Path | None = None, null_label: bool | None = None
) -> Parts:
    """Reads a pipeline's directory, or a network's alone.

    `tokenizer`: a folder with its files, where a text encoder's own has none. `null_label`: whether
    the last class of a U-Net is none of the data's. ValueError naming the file for what is missing
    or unknown.
    """
    if not (source / "model_index.json").exists() and (source / "config.json").exists():
        if null_label is not None:
            raise ValueError(
                "null_label is of a whole pipeline, and this is a network alone: leave it"
            )
        return _alone(source, tokenizer)
    index, kind = _index(source)
    name = "transformer" if "transformer" in index else "unet"
    third = kind == "StableDiffusion3Pipeline"
    network, params = (interop.load_sd3 if third else DENOISERS[name])(source / name)
    described = scheduler.read_scheduler(source / "scheduler", **SETS.get(kind, {}))
    side = _side(files.read_config(source / name, ()).get("sample_size") or 64, source / name)
    parts = Parts(ConfigDict(), {"denoiser": params})
    first = next((name for name in ("vae", "vqvae") if index.get(name)), None)
    module = None
    if first:
        module, parts.params["autoencoder"] = interop.load_autoencoder(source / first)
        if kind != "LDMSuperResolutionPipeline":  # which decodes latents as they are
            parts.scale, parts.shift = _scaling(source / first, module)
    config = pipeline_config(network, module, described)
    config.model.denoiser.kind = "mmdit" if third else name
    if third:
        config.sample.steps = 28  # Diffusers' pipeline's own
    if module is not None:
        config.online.scale = parts.scale
    f = module.downsampling if module else 1
    config.data.image_size = side * f if isinstance(side, int) else tuple(n * f for n in side)
    if kind in encoders.SEVERAL:
        width = params["context"]["kernel"].shape[0] if third else None
        found = encoders.several(source, index, config, width)
        parts.params["text_encoder"], parts.tokenizer = found
    elif index.get("text_encoder"):
        encoder, parts.params["text_encoder"] = interop.load_text_encoder(source / "text_encoder")
        config.model.text_encoder = fields(encoder)
        config.conditioning.train_text_encoder = False
        parts.tokenizer = tokenizer_files.load(source / "tokenizer")
    _classes(config, name, null_label)
    parts.config = finish(config, params, source / name)
    return parts


def _classes(config: ConfigDict, name: str, null_label: bool | None) -> None:
    """Whether the last class says nothing: DiT's does; of a U-Net Diffusers' file does not tell,
    and its training scripts drop no class, so that all are the data's unless the user says."""
    classes = config.model.denoiser.num_classes if name == "unet" else None
    if classes is None:
        if null_label is not None:
            raise ValueError(f"null_label={null_label} is of a U-Net of classes: leave it out")
        return
    config.conditioning.null_label = bool(null_label)
    if null_label is None:
        print(
            f"note: all {classes} classes are taken for the data's, none for no class; give "
            "--null_label where the last one is that",
            flush=True,
        )


def _side(size: Any, source: pathlib.Path) -> int | tuple[int, int]:
    """A config's sample_size: one number, also where both are equal, or (height, width)."""
    pair = tuple(size) if isinstance(size, list) else (size, size)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ValueError(
            f"{source / 'config.json'}: sample_size={size!r} must be a number or two: mend it"
        )
    return pair[0] if pair[0] == pair[1] else pair


def _scaling(source: pathlib.Path, module: Any) -> tuple[float, float]:
    """Of the latents. Diffusers' default is Stable Diffusion's; LDM scales no VQ latents."""
    scale, shift = load_scaling(source)
    said = "scaling_factor" in read_json(source / "config.json", REMEDY)
    return (scale if said or not isinstance(module, VQModel) else 1.0), shift


def stage_kind(module: Any) -> str:
    return "vq" if isinstance(module, VQModel) else "kl"


def _alone(source: pathlib.Path, tokenizer: pathlib.Path | None) -> Parts:
    """One network's directory: a first stage, or a text encoder."""
    described = read_json(source / "config.json", REMEDY)
    named = described.get("_class_name") or next(iter(described.get("architectures") or ()), None)
    named = str(named).removeprefix("Flax")
    if named in autoencoder.CLASSES:
        module, params = interop.load_autoencoder(source)
        side = _side(described.get("sample_size") or 256, source)
        side = side if isinstance(side, int) else min(side)  # of the square crops
        return first_stage_parts(module, params, *_scaling(source, module), side)
    if named in text_encoders.CLASSES:
        module, params = interop.load_text_encoder(source)
        config = common.denoiser()
        config.model.dtype = "float32"
        config.model.text_encoder = fields(module)
        words = tokenizer_files.load(tokenizer or source)
        return Parts(config, {"text_encoder": params}, tokenizer=words)
    raise ValueError(
        f"{source} holds a {named} alone, and no model_index.json: name the pipeline's directory "
        "above it, or that of a first stage or a text encoder"
    )


def first_stage_parts(module: Any, params: Any, scale: float, shift: float, side: int) -> Parts:
    """The workdir of a first stage's run: what `latents.first_stage` and `init_from` name."""
    config = common.first_stage(stage_kind(module))
    config.model.dtype = "float32"
    config.model.autoencoder = {"name": stage_kind(module), **fields(module)}
    f = module.downsampling
    config.data.update({"image_size": side // f * f, "channels": module.image_channels})
    return Parts(config, {"autoencoder": params}, scale, shift)


def _index(source: pathlib.Path) -> tuple[dict[str, Any], str]:
    """model_index.json's components that are there, and the pipeline's class."""
    path = source / "model_index.json"
    index = read_json(path, REMEDY)
    named = str(index.get("_class_name")).removeprefix("Flax")
    if named not in PIPELINES:
        why = (
            "; it is Stable Diffusion XL's refiner"
            if index.get("requires_aesthetics_score")
            else ""
        )
        known = ", ".join(PIPELINES)
        raise ValueError(f"{path}: _class_name={named!r} is not one of {known}{why}")
    held = {k: v for k, v in index.items() if isinstance(v, list) and v and v[0] is not None}
    words = [kind + n for n in encoders.SEVERAL.get(named, ("",)) for kind in WORDS]
    read = (*DENOISERS, "scheduler", "vae", "vqvae", *words)
    for name in read:
        if name in held and not (source / name).is_dir():
            raise ValueError(f"{source / name} is missing, which {path.name} promises: fetch it")
    for names in (DENOISERS, ("scheduler",)):
        if not held.keys() & set(names):
            wanted = " or ".join(names)
            raise ValueError(f"{path} names no {wanted}: it is not a diffusion pipeline read here")
    for name in sorted(held.keys() - set(read)):
        print(f"note: {name} is left out", flush=True)
    return held, named


def pipeline_config(network: Any, first_stage: Any, described: scheduler.Scheduler) -> ConfigDict:
    """A config of sampling, and of training on a folder of images."""
    config = common_ldm.online_latents("kl_f8", 1.0) if first_stage else common.denoiser()
    config.model.dtype = "float32"
    config.model.denoiser = {"kind": "unet", **fields(network)}
    if first_stage is not None:
        config.model.autoencoder = {"name": stage_kind(first_stage), **fields(first_stage)}
    config.process.schedule = described.schedule
    config.process.prediction = described.prediction
    config.sample.sampler = described.sampler
    config.sample.options = described.options
    config.sample.steps = 50
    config.sample.guidance_scale = 1.0
    config.sample.clip = described.clip
    config.process.variance = described.variance
    config.sample.batch_size = 4
    return config


def finish(config: ConfigDict, params: Any, source: object) -> ConfigDict:
    """What the denoiser's channels say: what joins x_t, whether a variance is learned."""
    out = config.model.denoiser.out_channels
    if "conv_in" in params:
        found = params["conv_in"]["kernel"].shape[-2]
    else:
        found = params["patches"]["kernel"].shape[0] // config.model.denoiser.patch**2
    channels = build.sample_shape(config)[-1]
    kinds = {channels: "", 2 * channels + 1: "inpaint"}
    kinds |= {2 * channels: "edit"} if "text_encoder" in config.model else {}
    kinds[channels + config.data.channels] = "low_resolution"
    if config.conditioning.concat:  # a config of CompVis's says it
        kinds[channels + given.concat(config).shape[-1]] = config.conditioning.concat
    if found not in kinds or out not in (channels, 2 * channels):
        raise ValueError(
            f"{source} has {found} input and {out} output channels, but latents have {channels}: "
            f"{sorted(kinds)} and {channels} or {2 * channels} are known"
        )
    config.conditioning.concat = kinds[found]
    if out == 2 * channels:
        config.process.variance = "learned"
    elif config.process.variance == "learned":
        raise ValueError(
            f"{source} has {out} output channels, but variance_type='learned_range' of its "
            f"scheduler takes {2 * channels}"
        )
    if "text_encoder_2" in config.model:  # of Diffusers' pipelines, as the others are
        config.sample.guidance_scale = 7.0 if "text_encoder_3" in config.model else 5.0
    elif "text_encoder" in config.model:
        config.sample.guidance_scale = 7.5
    elif config.conditioning.null_label and build.null_label(config) is not None:
        config.sample.guidance_scale = 4.0  # of Diffusers' DiT, and of its authors' sample.py
    return config
