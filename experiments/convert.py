"""Other projects' weights to a workdir, and a workdir's to theirs.

    python -m experiments.convert --from=diffusers --source=PIPELINE --workdir=DIR
    python -m experiments.convert --from=compvis --source=FILE --workdir=DIR [--tokenizer=DIR]
        [--config=configs/X.py:arg]
    python -m experiments.convert --to=diffusers --workdir=DIR --out=PIPELINE [--weights=ema|raw]

PIPELINE is a Diffusers directory: model_index.json, unet/, scheduler/, and vae/ (or vqvae/),
text_encoder/ and tokenizer/ where it has them. FILE is CompVis's .ckpt, which is read without
running it, or a single-file .safetensors: LDM, Stable Diffusion 1.x or 2.x. It says neither what
network it is nor which tokenizer: the config is guessed from widths, or given, and --tokenizer
names a folder with the tokenizer's files. The workdir is then one that `experiments.sample`, and a
run's `init_from`, take. A LoRA or ControlNet run is written as Diffusers' file or directory for
one. A target appears whole or not at all.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs import common
from diffusion import interop, weights
from diffusion.checkpoint import Checkpoints, restore_params
from diffusion.data import tokenizer_files
from diffusion.data.tokenizers import Tokenizer
from diffusion.interop import compvis, compvis_ldm, files, scheduler, single_file
from diffusion.interop.autoencoder import load_scaling
from diffusion.models.autoencoder import VQModel
from experiments import build, cli, pretrained, workdir

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "LDMPipeline",
    "LDMSuperResolutionPipeline",
    "DDPMPipeline",
    "DDIMPipeline",
)
# Which config a CompVis file of these widths is: (of the U-Net, of its context).
KNOWN = {
    (320, 768): "stable_diffusion:v1",
    (320, 1024): "stable_diffusion:v2",
    (320, 1280): "ldm_text",
    (192, 512): "ldm_imagenet256:f4",
    (256, 512): "ldm_imagenet256:f8",
    (224, None): "ldm_celebahq256",
    (192, None): "ldm_lsun256:churches",
}


@dataclasses.dataclass
class Parts:
    """What a workdir is made of."""

    config: ConfigDict
    params: dict[str, Any]  # by network
    scale: float = 1.0
    shift: float = 0.0
    tokenizer: Tokenizer | None = None


# -- in ------------------------------------------------------------------------------------------


def from_diffusers(source: pathlib.Path) -> Parts:
    """Reads a pipeline's directory. ValueError naming the file for what is missing or unknown."""
    index = _index(source)
    unet, params = interop.load_unet(source / "unet")
    described = scheduler.read_scheduler(source / "scheduler")
    side = files.read_config(source / "unet", ()).get("sample_size") or 64
    parts = Parts(ConfigDict(), {"unet": params})
    first = next((name for name in ("vae", "vqvae") if index.get(name)), None)
    module = None
    if first:
        module, parts.params["autoencoder"] = interop.load_autoencoder(source / first)
        parts.scale, parts.shift = load_scaling(source / first)
        if isinstance(module, VQModel) and "scaling_factor" not in _json(
            source / first / "config.json"
        ):
            parts.scale = 1.0
    config = _config(unet, module, described)
    if module is not None:
        config.online.scale = parts.scale
    config.data.image_size = side * (module.downsampling if module else 1)
    if index.get("text_encoder"):
        encoder, parts.params["text_encoder"] = interop.load_text_encoder(source / "text_encoder")
        config.model.text_encoder = _fields(encoder)
        config.conditioning.train_text_encoder = False
        parts.tokenizer = tokenizer_files.load(source / "tokenizer")
    parts.config = _finish(config, params, source / "unet")
    return parts


def _index(source: pathlib.Path) -> dict[str, Any]:
    """model_index.json, with the components that are there."""
    path = source / "model_index.json"
    index = _json(path)
    named = index.get("_class_name")
    if named not in PIPELINES:
        raise ValueError(f"{path}: _class_name={named!r} is not one of {', '.join(PIPELINES)}")
    held = {k: v for k, v in index.items() if isinstance(v, list) and v and v[0] is not None}
    read = ("unet", "scheduler", "vae", "vqvae", "text_encoder", "tokenizer")
    for name in read:
        if name in held and not (source / name).is_dir():
            raise ValueError(f"{source / name} is missing, which {path.name} promises: fetch it")
    for name in ("unet", "scheduler"):
        if name not in held:
            raise ValueError(f"{path} names no {name}: it is not a diffusion pipeline read here")
    for name in sorted(held.keys() - set(read)):
        print(f"note: {name} is left out", flush=True)
    return held


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: --source is no pipeline of Diffusers") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, no JSON object: fetch it again")
    return found


def _config(unet: Any, first_stage: Any, described: scheduler.Scheduler) -> ConfigDict:
    """A config of sampling, and of training on a folder of images."""
    config = common.online_latents("kl_f8", 1.0) if first_stage else common.denoiser()
    config.model.dtype = "float32"
    config.model.unet = _fields(unet)
    if first_stage is not None:
        kind = "vq" if isinstance(first_stage, VQModel) else "kl"
        config.model.autoencoder = {"name": kind, **_fields(first_stage)}
    config.process.schedule = described.schedule
    config.process.prediction = described.prediction
    config.sample.sampler = described.sampler
    config.sample.options = described.options
    config.sample.steps = 50
    config.sample.guidance_scale = 1.0
    config.sample.clip = described.clip and first_stage is None
    config.sample.batch_size = 4
    return config


def _finish(config: ConfigDict, unet: Any, source: object) -> ConfigDict:
    """What the U-Net's channels say: what joins x_t, whether a variance is learned."""
    found, out = unet["conv_in"]["kernel"].shape[-2], config.model.unet.out_channels
    channels = build.sample_shape(config)[-1]
    kinds = {channels: "", 2 * channels + 1: "inpaint"}
    kinds[channels + config.data.channels] = "low_resolution"
    if found not in kinds or out not in (channels, 2 * channels):
        raise ValueError(
            f"{source} has {found} input and {out} output channels, but latents have {channels}: "
            f"{sorted(kinds)} and {channels} or {2 * channels} are known"
        )
    config.conditioning.concat = kinds[found]
    config.process.variance = "learned" if out == 2 * channels else "fixed_large"
    if "text_encoder" in config.model:
        config.sample.guidance_scale = 7.5
    return config


def _fields(module: Any) -> dict[str, Any]:
    left_out = ("dtype", "remat", "parent", "name")
    names = [f.name for f in dataclasses.fields(module) if f.name not in left_out]
    return {name: getattr(module, name) for name in names}


def from_compvis(
    source: pathlib.Path, config: ConfigDict | None, tokenizer: pathlib.Path | None
) -> Parts:
    """Reads one file of CompVis's. ValueError naming it for what is missing or does not fit."""
    held = single_file.read_file(source)
    config = ConfigDict((config or _guess(held.tensors, source)).to_dict())
    params: dict[str, Any] = {"unet": compvis_ldm.read_unet(held, build.unet(config))}
    if "autoencoder" in config.model:
        module, params["autoencoder"] = compvis.load_compvis_autoencoder(source)
        config.model.autoencoder = {"name": config.model.autoencoder.name, **_fields(module)}
    if "class_embedder" in config.model:
        embedder = build.class_embedder(config)
        params["class_embedder"] = compvis_ldm.read_class_embedder(held, embedder)
    parts = Parts(config, params, compvis_ldm.scale_factor(held) or _scale(config))
    if "text_encoder" in config.model:
        encoder = build.text_encoder(config)
        params["text_encoder"] = compvis_ldm.read_text_encoder(held, encoder)
        if tokenizer is None:
            raise ValueError(
                f"{source} holds no tokenizer, which its text encoder needs: give --tokenizer=DIR "
                "with vocab.json and merges.txt (CLIP) or vocab.txt (BERT)"
            )
        parts.tokenizer = tokenizer_files.load(tokenizer)
    config.init_from = ""
    parts.config = _finish(config, params["unet"], source)
    return parts


def _guess(tensors: dict[str, Any], source: pathlib.Path) -> ConfigDict:
    first = tensors.get(f"{compvis_ldm.UNET}input_blocks.0.0.weight")
    widths = (None if first is None else first.shape[0], compvis_ldm.context_width(tensors))
    if widths not in KNOWN:
        raise ValueError(
            f"{source} has a U-Net of width {widths[0]} with a context of {widths[1]}, which no "
            "published model has: give its config, --config=configs/X.py"
        )
    name, _, argument = KNOWN[widths].partition(":")
    return importlib.import_module(f"configs.{name}").get_config(argument)


def _scale(config: ConfigDict) -> float:
    if "online" in config:
        return config.online.scale
    return config.latents.scale if "latents" in config else 1.0


# -- out -----------------------------------------------------------------------------------------


def to_diffusers(directory: pathlib.Path, out: pathlib.Path, which: str) -> None:
    """Writes a run as Diffusers has it. ValueError for what Diffusers cannot hold."""
    config = workdir.read_config(directory)
    saved = restore_params(directory / "checkpoints", ("params", "ema"))
    own = {**saved.items["params"], **(saved.items["ema"] if which == "ema" else {})}
    with whole(out) as scratch:
        if "lora" in own:
            interop.save_lora(scratch / interop.lora.FILE, own["lora"], build.lora(config).scale)
        elif "controlnet" in own:
            interop.save_controlnet(scratch, build.controlnets(config)[0], own["controlnet"])
        else:
            _write_pipeline(scratch, pretrained.load(directory, which))


def _write_pipeline(scratch: pathlib.Path, found: pretrained.Networks) -> None:
    config, params = found.config, found.params
    latent = build.sample_shape(config)
    index: dict[str, Any] = {"_class_name": _pipeline(config), "_diffusers_version": "0.30.0"}
    interop.save_unet(scratch / "unet", build.unet(config), params["unet"], latent[0])
    index["unet"] = ["diffusers", _json(scratch / "unet" / "config.json")["_class_name"]]
    if found.first_stage is not None:
        name = "vqvae" if isinstance(found.first_stage, VQModel) else "vae"
        if np.any(np.asarray(found.extra["latent_shift"])) or np.ptp(found.extra["latent_scale"]):
            raise ValueError(
                "latents scaled per channel or shifted cannot be written for Diffusers, which has "
                "one scaling_factor: train with latents.scaling='fixed' or 'std'"
            )
        scale = float(np.asarray(found.extra["latent_scale"])[0])
        side = config.data.image_size
        interop.save_autoencoder(
            scratch / name, found.first_stage, params["autoencoder"], scale, side
        )
        index[name] = ["diffusers", type(found.first_stage).__name__]
    if found.tokenizer is not None:
        encoder = build.text_encoder(config)
        interop.save_text_encoder(scratch / "text_encoder", encoder, params["text_encoder"])
        tokenizer_files.save(found.tokenizer, scratch / "tokenizer", encoder.max_length)
        kind = _json(scratch / "tokenizer" / "tokenizer_config.json")["tokenizer_class"]
        index["text_encoder"] = ["transformers", "CLIPTextModel"]
        index["tokenizer"] = ["transformers", kind]
        absent = ("safety_checker", "feature_extractor", "image_encoder")
        index |= {name: [None, None] for name in absent} | {"requires_safety_checker": False}
    written = scheduler.scheduler_config(_described(config))
    index["scheduler"] = ["diffusers", written["_class_name"]]
    (scratch / "scheduler").mkdir()
    for path, content in (
        ("scheduler/scheduler_config.json", written),
        ("model_index.json", index),
    ):
        (scratch / path).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _pipeline(config: ConfigDict) -> str:
    if config.conditioning.concat:
        kinds = {"inpaint": "StableDiffusionInpaintPipeline"}
        return kinds.get(config.conditioning.concat, "LDMSuperResolutionPipeline")
    if "text_encoder" in config.model:
        return "StableDiffusionPipeline"
    return "LDMPipeline" if "autoencoder" in config.model else "DDPMPipeline"


def _described(config: ConfigDict) -> scheduler.Scheduler:
    section = config.sample.to_dict()
    return scheduler.Scheduler(
        config.process.schedule.to_dict(),
        config.process.prediction,
        section["sampler"],
        section.get("options", {}),
        section["clip"],
    )


# -- targets -------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder that becomes `target` if the block ends well, and vanishes if it does not.

    ValueError where `target` is there already and not empty.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder: name a new one")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_workdir(target: pathlib.Path, parts: Parts) -> None:
    """A run of 0 steps: config, checkpoint, frozen networks, tokenizer."""
    config = parts.config
    if parts.tokenizer is not None:
        from experiments import runs

        runs.null_tokens(config, parts.tokenizer)
    trained = {name: tree for name, tree in parts.params.items() if name in build.trained(config)}
    extra = {}
    if "autoencoder" in parts.params:
        channels = build.sample_shape(config)[-1]
        extra["latent_scale"] = np.full(channels, parts.scale, np.float32)
        extra["latent_shift"] = np.full(channels, parts.shift, np.float32)
    build.task(config)
    with whole(target) as scratch:
        workdir.claim(scratch, config)
        for name in parts.params.keys() - trained.keys():
            folder = scratch / pretrained.FOLDERS[name]
            weights.save_weights(folder, parts.params[name], config.model[name].to_dict())
        if parts.tokenizer is not None:
            parts.tokenizer.save(scratch / "tokenizer.json")
        state = {"params": trained, "ema": {}, "extra": extra}
        with Checkpoints(scratch / "checkpoints", async_save=False) as checkpoints:
            checkpoints.save(0, state, {}, {})


def define(add: cli.Flags) -> None:
    add.add("enum", "from", None, "What --source is.", ["diffusers", "compvis"])
    add.add("enum", "to", None, "What --out becomes.", ["diffusers"])
    add.add("string", "source", None, "A pipeline's directory, or a file.")
    add.add("string", "workdir", None, "The workdir to write, or with --to to read.")
    add.add("string", "out", None, "The directory to write.")
    add.add("string", "tokenizer", None, "A folder with a tokenizer's files, for --from=compvis.")
    add.add("enum", "weights", "ema", "Averaged or raw parameters.", ["ema", "raw"])
    add.config("What a CompVis file is, where its widths do not say.")


def main(values: flags.FlagValues) -> None:
    if (values["from"].value is None) == (values.to is None):
        raise ValueError("give one of --from=diffusers|compvis and --to=diffusers")
    target = pathlib.Path(cli.require(values, "workdir"))
    if values.to:
        out = pathlib.Path(cli.require(values, "out"))
        to_diffusers(target, out, values.weights)
        print(f"{out} is written for Diffusers")
        return
    source = pathlib.Path(cli.require(values, "source"))
    if not source.exists():
        raise ValueError(f"--source={source} does not exist: name what is to be converted")
    if values["from"].value == "diffusers":
        parts = from_diffusers(source)
    else:
        tokenizer = pathlib.Path(values.tokenizer) if values.tokenizer else None
        parts = from_compvis(source, values.config, tokenizer)
    write_workdir(target, parts)
    print(f"{target} is ready: python -m experiments.sample --workdir={target}")


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
