"""Samples from a trained run: PNGs with how they were made inside, a grid, or an .npz.

A video's frames stand side by side, a series is plotted; the .npz has either as it is.

    python -m experiments.sample --workdir=DIR --num=64 --prompt="..." --seed=0 --out=DIR
    ... --negative_prompt="..."  --label=207  --seeds=1,2,3  --size=512,768  --tile=512
    ... --guidance_scale=5 --guidance_rescale=0.7 --guidance_interval=100,900
    ... --image=PNG --strength=0.6            from an image (or, to a model trained for it, upscale)
    ... --image=PNG --mask=PNG                make anew what is white in the mask
    ... --controlnet=DIR --control=PNG        steered by a picture; both may be given several times
    ... --lora=FILE                           with low-rank updates in Diffusers' format

The same seed gives the same noise, and so the same images, for any batch size and device count.
"""

import dataclasses
import pathlib
import sys

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from diffusion import files, pictures
from experiments.host import cli, cluster
from experiments.run import generate, pipelines

GUIDANCE = ("guidance_rescale", "guidance_interval")  # flags that change the config's


def define(add: cli.Flags) -> None:
    cluster.define(add)
    add.add("string", "workdir", None, "A run with task='denoiser'.")
    add.add("string", "out", None, "Folder for the images (default: DIR/samples).")
    add.add("integer", "num", 16, "How many images.")
    add.add("multi_string", "prompt", None, "A caption; may be given several times.")
    add.add("string", "prompts_file", None, "A text file of captions, one a line.")
    add.add("multi_string", "negative_prompt", None, "What is guided away from.")
    add.add("multi_integer", "label", None, "A class; may be given several times.")
    add.add("integer", "seed", 0, "Of the noise.")
    add.add("list", "seeds", None, "Several seeds: --num images of each.")
    add.add("string", "image", None, "To start from, to inpaint, or to upscale.")
    add.add("float", "strength", None, "How much of the image is made anew, in (0, 1].")
    add.add("string", "mask", None, "White where the image is to be made anew.")
    add.add("multi_string", "controlnet", None, "A ControlNet: Diffusers' directory, or a run's.")
    add.add("multi_string", "control", None, "The picture that each ControlNet reads.")
    add.add("list", "control_scale", None, "Weight of each ControlNet (default 1).")
    add.add("multi_string", "lora", None, "Low-rank updates, in Diffusers' format.")
    add.add("float", "lora_scale", 1.0, "Weight of the updates.")
    add.add("list", "size", None, "height,width in pixels; default: the config's.")
    add.add("integer", "tile", 0, "Decode in tiles of so many pixels; 0: whole.")
    add.add("string", "sampler", None, "Default: the config's sample.sampler.")
    add.add("integer", "steps", None, "Sampler steps; default: the config's sample.steps.")
    add.add("float", "guidance_scale", None, "Default: the config's sample.guidance_scale.")
    add.add("float", "guidance_rescale", None, "Default: the config's sample.guidance_rescale.")
    add.add("list", "guidance_interval", None, "low,high of t, where guidance acts.")
    add.add("integer", "batch_size", None, "Default: the config's sample.batch_size.")
    add.add("enum", "weights", "ema", "Averaged or raw parameters.", ["ema", "raw"])
    add.add("bool", "npz", False, "Write one samples.npz instead of PNGs.")


def prompts(values: flags.FlagValues) -> list[str] | None:
    """From the flags; None when no prompt was given."""
    if values.prompt and values.prompts_file:
        raise ValueError("--prompt and --prompts_file were both given: use one")
    if values.prompts_file:
        path = pathlib.Path(values.prompts_file)
        if not path.is_file():
            raise ValueError(f"--prompts_file={path} does not exist: name a text file")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts_file={path} is not UTF-8 text: {error}") from error
        found = [line.strip() for line in lines]
        found = [line for line in found if line]
        if not found:
            raise ValueError(f"--prompts_file={path} holds no prompt: write one a line")
        return found
    return values.prompt


def with_guidance(config: ConfigDict, values: flags.FlagValues) -> ConfigDict:
    """The config with those of its settings of guidance that the flags change."""
    config = ConfigDict(config.to_dict())
    if values.guidance_rescale is not None:
        config.sample.guidance_rescale = values.guidance_rescale
    if values.guidance_interval is not None:
        config.sample.guidance_interval = tuple(cli.numbers(values, "guidance_interval", float))
    return config.lock()


def open_model(values: flags.FlagValues) -> generate.Model:
    """The run with everything that the flags add to it."""
    model = generate.load(cli.require(values, "workdir"), values.weights)
    if values.size:
        model = pipelines.resized(model, cli.numbers(values, "size", int))
    model = dataclasses.replace(model, config=with_guidance(model.config, values))
    model = pipelines.with_lora(model, values.lora or (), values.lora_scale)
    return pipelines.with_controlnets(model, values.controlnet or ())


@cluster.joined
def main(values: flags.FlagValues) -> None:
    directory = pathlib.Path(cli.require(values, "workdir"))
    wanted, seeds = prompts(values), cli.numbers(values, "seeds", int) or [values.seed]
    if values.strength is not None and not values.image:
        raise ValueError(f"--strength={values.strength} needs the --image that it changes")
    out = pathlib.Path(values.out or directory / "samples")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out={out} is a file: name a folder")
    if cluster.is_first():
        files.clear(out)
    model = open_model(values)
    scales = cli.numbers(values, "control_scale", float)
    given = pipelines.columns(model, values.image, values.mask, values.control or (), scales)
    options = {
        "sampler": values.sampler,
        "steps": values.steps,
        "guidance_scale": values.guidance_scale,
    }
    batches = [
        batch
        for seed in seeds
        for batch in generate.images(
            model,
            values.num,
            wanted,
            seed,
            values.batch_size,
            values.negative_prompt,
            values.label,
            given,
            strength=1.0 if values.strength is None else values.strength,
            tile=values.tile,
            **options,
        )
    ]
    pixels = np.concatenate(batches)
    if values.npz:
        if cluster.is_first():
            files.write_arrays(out / "samples.npz", images=pixels)
            print(f"{len(pixels)} images in {out / 'samples.npz'}")
        return
    used = {k: v if v is not None else model.config.sample[k] for k, v in options.items()}
    text = {
        **{key: str(value) for key, value in used.items()},
        **{key: str(model.config.sample[key]) for key in GUIDANCE if values[key].present},
        "weights": values.weights,
        "checkpoint": model.checkpoint_hash,
        "step": str(model.step),
    }
    pixels = pictures.as_images(pixels)
    for i in range(jax.process_index(), len(pixels), jax.process_count()):
        turn, index = divmod(i, values.num)
        prompt = wanted[index % len(wanted)] if wanted else ""
        metadata = {"prompt": prompt, "index": str(index), "seed": str(seeds[turn]), **text}
        pictures.save_png(out / f"{i:05d}.png", pixels[i], metadata)
    if not cluster.is_first():
        return
    pictures.save_grid(out / "grid.png", pixels[:256], scale=max(1, 64 // min(pixels.shape[1:3])))
    print(f"{len(pixels)} images and grid.png in {out}")
    earlier = [p for p in out.glob("*.png") if p.stem.isdigit() and int(p.stem) >= len(pixels)]
    if earlier:
        print(f"note: {out} holds {len(earlier)} more images of an earlier call")


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
