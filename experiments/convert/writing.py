"""A workdir as Diffusers and Transformers have it: the half of `convert` that writes."""

import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diffusion import files, interop
from diffusion.data import tokenizer_files
from diffusion.data.tokenizers import TokenizerPair
from diffusion.interop import scheduler
from diffusion.models.autoencoder import VQModel
from experiments.run import build, networks, workdir

AGAIN = "convert again"


def to_diffusers(directory: pathlib.Path, scratch: pathlib.Path, which: str) -> None:
    """Writes a run into an empty folder. ValueError for what Diffusers cannot hold."""
    config = workdir.read_config(directory)
    found = networks.load(directory, which, merged=False)
    if "lora" in found.params:
        if (kind := config.model.denoiser.kind) != "unet":
            raise ValueError(
                f"model.lora of model.denoiser.kind={kind!r} cannot be written for Diffusers: the "
                "files written here are of U-Nets; keep this run's own checkpoint"
            )
        scale = build.lora(config).scale
        interop.save_lora(scratch / interop.lora.FILE, found.params["lora"], scale)
    elif "words" in found.params:
        word, rows = config.model.words.word, found.params["words"]["embedding"]
        interop.save_embeddings(scratch / interop.embeddings.FILE, {word: rows})
    elif "controlnet" in found.params:
        interop.save_controlnet(scratch, build.controlnets(config)[0], found.params["controlnet"])
    elif config.task == "autoencoder":
        _write_first_stage(scratch, found)
    elif "denoiser" not in config.model:
        _write_text_encoder(scratch, scratch, found)
    else:
        _write_pipeline(scratch, found)


def _write_pipeline(scratch: pathlib.Path, found: networks.Networks) -> None:
    config, params = found.config, found.params
    latent = build.sample_shape(config)
    index: dict[str, Any] = {"_class_name": _pipeline(config), "_diffusers_version": "0.30.0"}
    name, network = config.model.denoiser.kind, build.denoiser_network(config)
    if name != "unet":
        name, save = (
            "transformer",
            interop.save_sd3 if name == "mmdit" else interop.save_transformer,
        )
        save(scratch / name, network, params["denoiser"])
    else:
        sizes = config.conditioning.size_dim
        interop.save_unet(scratch / name, network, params["denoiser"], latent[0], sizes)
    described = files.read_json(scratch / name / "config.json", AGAIN)
    index[name] = ["diffusers", described["_class_name"]]
    if found.first_stage is not None:
        name = "vqvae" if isinstance(found.first_stage, VQModel) else "vae"
        _write_first_stage(scratch / name, found, config.model.denoiser.kind == "mmdit")
        index[name] = ["diffusers", type(found.first_stage).__name__]
    if isinstance(found.tokenizer, TokenizerPair):
        index |= _write_text_pair(scratch, found, found.tokenizer)
    elif found.tokenizer is not None:
        _write_text_encoder(scratch / "text_encoder", scratch / "tokenizer", found)
        words = files.read_json(scratch / "tokenizer" / "tokenizer_config.json", AGAIN)
        index["text_encoder"] = ["transformers", "CLIPTextModel"]
        index["tokenizer"] = ["transformers", words["tokenizer_class"]]
        absent = ("safety_checker", "feature_extractor", "image_encoder")
        index |= {name: [None, None] for name in absent} | {"requires_safety_checker": False}
    written = scheduler.scheduler_config(_described(config))
    index["scheduler"] = ["diffusers", written["_class_name"]]
    files.write_json(scratch / "scheduler" / "scheduler_config.json", written, sort_keys=True)
    files.write_json(scratch / "model_index.json", index, sort_keys=True)


def _write_first_stage(target: pathlib.Path, found: networks.Networks, shifts: bool = True) -> None:
    """shifts: whether what reads it heeds its shift_factor."""
    scale, shift = (
        np.asarray(found.extra.get(name, default))
        for name, default in (("latent_scale", 1.0), ("latent_shift", 0.0))
    )
    if np.ptp(shift) or np.ptp(scale) or (np.any(shift) and not shifts):
        raise ValueError(
            "latents scaled per channel or shifted cannot be written for Diffusers, which has one "
            "scaling_factor, and a shift_factor in Stable Diffusion 3 alone: train with "
            "latents.scaling='fixed' or 'std'"
        )
    params, side = found.params["autoencoder"], found.config.data.image_size
    factors = float(scale.flat[0]), float(shift.flat[0])
    interop.save_autoencoder(target, found.first_stage, params, factors, side)


def _write_text_encoder(
    target: pathlib.Path, words: pathlib.Path, found: networks.Networks
) -> None:
    encoder = build.text_encoder(found.config)
    interop.save_text_encoder(target, encoder, found.params["text_encoder"])
    tokenizer_files.save(found.tokenizer, words, encoder.max_length)


def _write_text_pair(
    scratch: pathlib.Path, found: networks.Networks, words: TokenizerPair
) -> dict[str, Any]:
    """Stable Diffusion XL's or 3's; returns their lines of model_index.json."""
    pair: Any = build.text_encoder(found.config)
    names = [f"text_encoder{end}" for end in ("", "_2", "_3")]
    folders: Any = tuple(scratch / name for name in names)
    interop.save_text_pair(folders, pair, found.params["text_encoder"])
    projected = "CLIPTextModelWithProjection"
    classes = ["CLIPTextModel" if pair.third is None else projected, projected, "T5EncoderModel"]
    index: dict[str, Any] = {}
    for name, cls, part in zip(names, classes, words.parts):
        index[name], tokens = ["transformers", cls], name.replace("text_encoder", "tokenizer")
        tokenizer_files.save(part, scratch / tokens, pair.first.max_length)
        said = files.read_json(scratch / tokens / "tokenizer_config.json", AGAIN)
        index[tokens] = ["transformers", said["tokenizer_class"]]
    index |= {name: [None, None] for name in ("feature_extractor", "image_encoder")}
    if pair.third is None:
        return index | {"force_zeros_for_empty_prompt": found.config.conditioning.zero_null}
    none = {name: [None, None] for name in ("text_encoder_3", "tokenizer_3")}
    return none | index


def _pipeline(config: ConfigDict) -> str:
    kind, schedule = config.model.denoiser.kind, config.process.schedule.name
    third = (kind == "mmdit", schedule == "flow", "text_encoder_3" in config.model)
    if all(third) and not config.conditioning.concat:
        return "StableDiffusion3Pipeline"
    if any(third):
        raise ValueError(
            f"model.denoiser.kind={kind!r} with process.schedule.name={schedule!r} cannot be "
            "written for Diffusers: of MMDiT and of rectified flow only Stable Diffusion 3, with "
            "model.text_encoder_3, can"
        )
    if "text_encoder_2" in config.model:
        if config.conditioning.concat:
            raise ValueError(
                f"conditioning.concat={config.conditioning.concat!r} of Stable Diffusion XL cannot "
                "be written for Diffusers: only its base can"
            )
        return "StableDiffusionXLPipeline"
    if config.conditioning.concat:
        kinds = {"inpaint": "StableDiffusionInpaintPipeline"}
        kinds["edit"] = "StableDiffusionInstructPix2PixPipeline"
        return kinds.get(config.conditioning.concat, "LDMSuperResolutionPipeline")
    if config.model.denoiser.kind == "transformer":
        return "DiTPipeline"
    if "text_encoder" in config.model:
        return "StableDiffusionPipeline"
    return "LDMPipeline" if "autoencoder" in config.model else "DDPMPipeline"


def _described(config: ConfigDict) -> scheduler.Scheduler:
    section = config.sample.to_dict()
    sampler, options, variance = (
        section["sampler"],
        section.get("options", {}),
        config.process.variance,
    )
    if variance == "learned":
        # Diffusers' DiT takes the variance off first; of the other samplers DDPM alone reads it.
        wanted = "ddim" if config.model.denoiser.kind == "transformer" else "ddpm"
        if sampler != wanted:
            print(f"note: with a learned variance Diffusers samples by {wanted}, not {sampler}")
            sampler, options = wanted, {}
    return scheduler.Scheduler(
        config.process.schedule.to_dict(),
        config.process.prediction,
        sampler,
        options,
        section["clip"],
        variance,
    )
