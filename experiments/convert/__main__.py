"""Other projects' weights to a workdir, and a workdir's to theirs.

    python -m experiments.convert --from=diffusers --source=PIPELINE --workdir=DIR
    python -m experiments.convert --from=compvis --source=FILE --workdir=DIR [--tokenizer=DIR]
        [--config=configs/X.py:arg]
    python -m experiments.convert --from=openai|edm --source=FILE --workdir=DIR
    python -m experiments.convert --to=diffusers --workdir=DIR --out=PIPELINE [--weights=ema|raw]

PIPELINE is a Diffusers directory: model_index.json, unet/, scheduler/, and vae/ (or vqvae/),
text_encoder/ and tokenizer/ where it has them; or that of an AutoencoderKL, VQModel or
CLIPTextModel alone, whose workdir `latents.first_stage` or a run's `init_from` names. FILE is
CompVis's .ckpt, which is read without running it, or a single-file .safetensors: LDM, Stable
Diffusion 1.x or 2.x, or a first stage alone. It says neither what network it is nor which
tokenizer: the config is guessed from widths, or given, and --tokenizer names a folder with the
tokenizer's files. OpenAI's FILE is a U-Net of improved-diffusion or guided-diffusion: published
ones are known, others need a --config. EDM's FILE is a .pkl of DDPM++, NCSN++ or ADM, whose arrays
are read and whose source code is not run. A pipeline's workdir is one that `experiments.sample`,
and a run's `init_from`, take. A LoRA or ControlNet run is written as Diffusers' file or directory
for one, a first stage's as its directory. A target appears whole or not at all.
"""

import pathlib
import sys

import numpy as np
from absl import flags

from diffusion import files, weights
from diffusion.checkpoint import Checkpoints
from experiments.convert.edm import from_edm
from experiments.convert.openai import from_openai
from experiments.convert.reading import Parts, from_diffusers
from experiments.convert.single import from_compvis
from experiments.convert.writing import to_diffusers
from experiments.host import cli
from experiments.run import build, data, networks, tasks, workdir


def write_workdir(target: pathlib.Path, parts: Parts) -> None:
    """A run of 0 steps: config, checkpoint, frozen networks, tokenizer."""
    config = parts.config
    if parts.tokenizer is not None:
        data.null_tokens(config, parts.tokenizer)
    alone = {"autoencoder": ("autoencoder",), "classifier": ("classifier",)}
    own = alone.get(config.task) or build.trained(config)
    trained = {name: tree for name, tree in parts.params.items() if name in own}
    extra = {}
    if "autoencoder" in parts.params:
        channels = build.sample_shape(config)[-1]
        extra["latent_scale"] = np.full(channels, parts.scale, np.float32)
        extra["latent_shift"] = np.full(channels, parts.shift, np.float32)
    if config.task == "autoencoder" or "denoiser" in parts.params:
        tasks.task(config)
    with files.whole_folder(target) as scratch:
        workdir.claim(scratch, config, data.model_card(config))
        for name in parts.params.keys() - trained.keys():
            folder = networks.folder(scratch, name)
            weights.save_weights(folder, parts.params[name], config.model[name].to_dict())
        if parts.tokenizer is not None:
            parts.tokenizer.save(scratch / "tokenizer.json")
        state = {"params": trained, "ema": {}, "extra": extra}
        with Checkpoints(scratch / "checkpoints", async_save=False) as checkpoints:
            checkpoints.save(0, state, {}, {})


READ = {  # flags, by what --source is
    "diffusers": ("tokenizer", "null_label"),
    "compvis": ("config", "tokenizer"),
    "openai": ("config", "attention_order"),
    "edm": (),
}
SOURCES = list(READ)


def define(add: cli.Flags) -> None:
    add.add("enum", "from", None, "What --source is.", SOURCES)
    add.add("enum", "to", None, "What --out becomes.", ["diffusers"])
    add.add("string", "source", None, "A pipeline's directory, or a file.")
    add.add("string", "workdir", None, "The workdir to write, or with --to to read.")
    add.add("string", "out", None, "The directory to write.")
    add.add("string", "tokenizer", None, "A tokenizer's folder, where --source has none.")
    add.add("enum", "weights", "ema", "Averaged or raw parameters.", ["ema", "raw"])
    add.add("bool", "null_label", None, "Whether a U-Net's last class is none of the data's.")
    add.add("enum", "attention_order", None, "Rows of OpenAI's qkv.", ["legacy", "new"])
    add.config("What a single file is, where its widths do not say.")


def main(values: flags.FlagValues) -> None:
    if (values["from"].value is None) == (values.to is None):
        raise ValueError(f"give one of --from={'|'.join(SOURCES)} and --to=diffusers")
    target = pathlib.Path(cli.require(values, "workdir"))
    if values.to:
        out = pathlib.Path(cli.require(values, "out"))
        with files.whole_folder(out) as scratch:
            to_diffusers(target, scratch, values.weights)
        print(f"{out} is written for Diffusers")
        return
    source = pathlib.Path(cli.require(values, "source"))
    if not source.exists():
        raise ValueError(f"--source={source} does not exist: name what is to be converted")
    files.check_folder(target)
    for name in ("config", "tokenizer", "null_label", "attention_order"):
        if values[name].value is not None and name not in READ[values["from"].value]:
            raise ValueError(
                f"--{name} is not read with --from={values['from'].value}: leave it out"
            )
    tokenizer = pathlib.Path(values.tokenizer) if values.tokenizer else None
    if values["from"].value == "diffusers":
        with cli.flagged(values):
            parts = from_diffusers(source, tokenizer, values.null_label)
    elif values["from"].value == "openai":
        parts = from_openai(source, values.config, values.attention_order)
    elif values["from"].value == "edm":
        parts = from_edm(source)
    else:
        parts = from_compvis(source, values.config, tokenizer)
    write_workdir(target, parts)
    ready = f"{target} is ready: "
    if "denoiser" in parts.params:
        print(f"{ready}python -m experiments.sample --workdir={target}")
    elif "classifier" in parts.params:
        print(f"{ready}python -m experiments.sample --workdir=DIR --guidance_classifier={target}")
    else:
        print(f"{ready}it holds {', '.join(parts.params)} alone, for a config's init_from")


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
