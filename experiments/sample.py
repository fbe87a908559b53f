"""Samples from a trained run: PNGs with how they were made inside, a grid, or an .npz.

A video's frames stand side by side, a series is plotted.

    python -m experiments.sample --workdir=DIR --num=64 --prompt="..." --seed=0 --out=DIR
    ... --negative_prompt="..." --label=207 --seeds=1,2,3 --size=512,768 --tile=512
    ... --guidance_scale=5 --guidance_rescale=0.7 --guidance_interval=100,900
    ... --image=PNG --strength=0.6            from an image (or upscaled, or edited, by such models)
    ... --image=PNG --mask=PNG                make anew what is white in the mask
    ... --segments=PNG  --box=3,0.1,0.1,0.4,0.4   of a map of labels; of boxes, sides in [0, 1]
    ... --autoguidance=DIR (or DIR/checkpoints/STEP), --guidance_classifier=DIR   guided by others
    ... --controlnet=DIR --control=PNG        steered by a picture; both may be given several times
    ... --lora=FILE --embedding=FILE          with low-rank updates; with learned words

The same seed gives the same images for any batch size and device count; `--seed=random` draws one
and says which. Run again after an interruption, it goes on with the images that are missing.
"""

import dataclasses
import functools
import json
import pathlib
import secrets
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import flags
from PIL import Image

from diffusion import files, interop, pictures
from diffusion.sampling import added
from diffusion.wording import Progress
from experiments.host import cli, cluster
from experiments.run import generate, kept

SETTINGS = ("sampler", "steps", "guidance_scale", "guidance_rescale", "guidance_interval")
# What else the pictures depend on, flag by flag; files go in by what they hold.
ASKED = ("negative_prompt", "label", "strength", "control_scale", "lora_scale", "size", "tile")
SIZES = ("original_size", "crop", "target_size")  # what SDXL is told, down,across
ASKED += ("box", *SIZES)
FILES = ("image", "mask", "segments", "control", "controlnet", "lora", "embedding")
SHOWN = 256  # pictures in grid.png
Make = Callable[..., Iterator[np.ndarray]]  # (start=i) -> batches of pictures from number i on


def define(add: cli.Flags) -> None:
    cluster.define(add)
    add.add("string", "workdir", None, "A run with task='denoiser'.")
    add.add("string", "out", None, "Folder for the images (default: DIR/samples).")
    add.add("integer", "num", 16, "How many images.")
    add.add("multi_string", "prompt", None, "A caption; may be given several times.")
    add.add("string", "prompts_file", None, "A text file of captions, one a line.")
    add.add("multi_string", "negative_prompt", None, "What is guided away from.")
    add.add("multi_integer", "label", None, "A class; may be given several times.")
    add.add("string", "seed", "0", "Of the noise, 0 or more; random: drawn, and said.")
    add.add("list", "seeds", None, "Several seeds: --num images of each.")
    add.add("string", "image", None, "To start from, to inpaint, or to upscale.")
    add.add("float", "strength", None, "How much of the image is made anew, in (0, 1].")
    add.add("string", "mask", None, "White where the image is to be made anew.")
    add.add("string", "segments", None, "A map of labels, one a pixel: grey or palette PNG.")
    add.add("multi_string", "box", None, "label,left,top,width,height, the sides in [0, 1].")
    add.add("multi_string", "controlnet", None, "A ControlNet: Diffusers' directory, or a run's.")
    add.add("multi_string", "control", None, "The picture that each ControlNet reads.")
    add.add("list", "control_scale", None, "Weight of each ControlNet (default 1).")
    add.add("multi_string", "lora", None, "Low-rank updates, in Diffusers' format.")
    add.add("float", "lora_scale", 1.0, "Weight of the updates.")
    add.add("list", "embedding", None, "Learned words: Diffusers' or AUTOMATIC1111's files.")
    add.add("list", "size", None, "height,width in pixels; default: the config's.")
    for name in SIZES:
        add.add("list", name, None, "down,across, which SDXL is told (default: --size; 0,0).")
    add.add("integer", "tile", 0, "Decode in tiles of so many pixels; 0: whole.")
    add.add("string", "sampler", None, "Default: the config's sample.sampler.")
    add.add("integer", "steps", None, "Sampler steps; default: the config's sample.steps.")
    add.add("float", "guidance_scale", None, "Default: the config's sample.guidance_scale.")
    add.add("float", "guidance_rescale", None, "Default: the config's sample.guidance_rescale.")
    add.add("list", "guidance_interval", None, "low,high of t, where guidance acts.")
    generate.define_guided(add)
    add.add("float", "image_guidance_scale", None, "Of an editor; default: the config's.")
    add.add("integer", "batch_size", None, "Default: the config's sample.batch_size.")
    add.add("enum", "weights", "ema", "Averaged or raw parameters.", ["ema", "raw"])
    add.add("float", "ema_length", None, "Average of this length, of the run's ema.profiles.")
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
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ValueError(f"--prompts_file={path} holds no prompt: write one a line")
        return found
    return values.prompt


def seeds(values: flags.FlagValues) -> list[int]:
    """From the flags; one that is drawn is the same on every process."""
    if values.seed == "random" and not values.seeds:
        drawn = -kept.least(-secrets.randbelow(2**31))
        if cluster.is_first():
            print(f"--seed={drawn}", flush=True)
        return [drawn]
    try:
        found = cli.numbers(values, "seeds", int) or [int(values.seed)]
    except ValueError as error:
        if values.seeds:
            raise
        raise ValueError(f"--seed={values.seed} must be a whole number, or random") from error
    if wrong := [seed for seed in found if not 0 <= seed < 2**32]:
        flag = "seeds" if values.seeds else "seed"
        raise ValueError(f"--{flag}={wrong[0]} must lie in 0..2^32 - 1, or be --seed=random")
    return found


def which_weights(values: flags.FlagValues) -> str:
    """As `networks.load` names them."""
    if values.ema_length is None:
        return values.weights
    if values["weights"].present:
        raise ValueError(f"--weights={values.weights} with --ema_length: leave one of them out")
    return f"ema_{values.ema_length:g}"


def open_model(values: flags.FlagValues) -> generate.Model:
    """The run with everything that the flags add to it."""
    guided = generate.guided(values)
    model = generate.load(cli.require(values, "workdir"), which_weights(values), sample=guided)
    pipeline = model.pipeline
    if values.size:
        pipeline = pipeline.resized(cli.numbers(values, "size", int))
    given: dict[str, Any] = {name: values[name].value for name in SETTINGS}
    if values.guidance_interval is not None:
        given["guidance_interval"] = tuple(cli.numbers(values, "guidance_interval", float))
    pipeline = pipeline.changed(**given, image_guidance_scale=values.image_guidance_scale)
    for path in values.lora or ():
        pipeline = added.with_lora(pipeline, path, values.lora_scale)
    for path in values.embedding or ():
        words = interop.load_embeddings(path)
        try:
            pipeline = added.with_embeddings(pipeline, words)
        except ValueError as error:
            raise ValueError(f"--embedding={path}: {error}") from error
        if cluster.is_first():
            told = ", ".join(f"{word} ({len(v)} vectors)" for word, v in words.items())
            print(f"learned words of {path}: {told}", flush=True)
    for directory in values.controlnet or ():
        pipeline = generate.with_controlnet(pipeline, directory)
    if values.batch_size is not None:
        if values.batch_size < 1:
            raise ValueError(f"batch_size={values.batch_size} must be at least 1")
        pipeline = dataclasses.replace(pipeline, batch_size=values.batch_size)
    return dataclasses.replace(model, pipeline=pipeline)


def described(values: flags.FlagValues, model: generate.Model) -> dict[str, str]:
    """What every picture says of how it was made; "request" is of whatever has no line."""
    how = model.pipeline.how
    asked = {name: values[name].value for name in ASKED}
    asked |= {k: v for k, v in vars(how).items() if k not in (*SETTINGS, "schedule")}
    for name in FILES:
        given = values[name].value or []
        given = [given] if isinstance(given, str) else given
        asked[name] = [_content(pathlib.Path(path)) for path in given]
    return {
        **{name: str(getattr(how, name)) for name in SETTINGS},
        "weights": which_weights(values),
        "checkpoint": model.checkpoint_hash,
        "step": str(model.step),
        "request": _digest(asked),
    }


def _digest(asked: Any) -> str:
    return files.digest(json.loads(json.dumps(asked, default=str)))[:16]


def _content(path: pathlib.Path) -> list[str]:
    """Of a file or a folder; of a run's, its config and which checkpoints there are."""
    held = sorted(path.glob("*")) if path.is_dir() else [path]
    runs = sorted(p.name for p in path.glob("checkpoints/*"))
    return runs + [files.hash_file(file) for file in held if file.is_file()]


@cluster.joined
def main(values: flags.FlagValues) -> None:
    directory = pathlib.Path(cli.require(values, "workdir"))
    if values.strength is not None and not values.image:
        raise ValueError(f"--strength={values.strength} needs the --image that it changes")
    out = pathlib.Path(values.out or directory / "samples")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out={out} is a file: name a folder")
    if values.num < 1:
        raise ValueError(f"--num={values.num} must be at least 1")
    wanted, drawn = prompts(values), seeds(values)
    with cli.flagged(values):
        told = {name: cli.numbers(values, name, int) for name in SIZES}
        model = open_model(values)
        pipeline, scales = model.pipeline, cli.numbers(values, "control_scale", float)
        columns = pipeline.columns(wanted, values.negative_prompt, values.label, told)
        given = (values.image, values.mask, values.segments, values.box or (), values.control or ())
        columns |= pipeline.slots.read(*given, scales)
        strength = 1.0 if values.strength is None else values.strength
        run = pipeline.compiled(strength=strength, tile=values.tile)
    make = functools.partial(pipeline.images, columns, values.num, drawn, run=run)
    total, text = values.num * len(drawn), described(values, model)
    size = pipeline.at_a_time(total)

    def of(i: int) -> dict[str, str]:
        turn, index = divmod(i, values.num)
        prompt = wanted[index % len(wanted)] if wanted else ""
        return {"prompt": prompt, "index": str(index), "seed": str(drawn[turn]), **text}

    cluster.together(lambda: cluster.is_first() and files.clear(out))
    if values.npz:
        write_npz(out, make, total, size, {**text, "prompts": _digest(wanted), "seeds": drawn})
    else:
        write_pngs(out, make, total, size, of)


def write_pngs(
    out: pathlib.Path, make: Make, total: int, size: int, of: Callable[[int], dict[str, str]]
) -> None:
    """Each picture with `of(i)` inside, by which those of an interrupted call are known again."""
    done = kept.least(_finished(out, total, of))
    if done:
        print(f"{done} of {total} images are there, made from the same", flush=True)
    start = done if done == total else done - done % size
    shown = [_pixels(out / f"{i:05d}.png") for i in range(min(start, SHOWN))]
    batches = make(start=start) if start < total else iter(())
    progress = Progress("images", total, silent=not cluster.is_first())
    for batch in progress.over(batches, start):
        for i, pixels in enumerate(pictures.as_images(batch), start):
            if i % jax.process_count() == jax.process_index():
                pictures.save_png(out / f"{i:05d}.png", pixels, of(i))
            if i < SHOWN:
                shown.append(pixels)
        start += len(batch)
    if not cluster.is_first():
        return
    side = min(shown[0].shape[:2])
    pictures.save_grid(out / "grid.png", np.stack(shown), scale=max(1, 64 // side))
    print(f"{total} images and grid.png in {out}")
    if earlier := [p for p in out.glob("*.png") if p.stem.isdigit() and int(p.stem) >= total]:
        print(f"note: {out} holds {len(earlier)} more images of an earlier call")


def _finished(out: pathlib.Path, total: int, of: Callable[[int], dict[str, str]]) -> int:
    """How many of the first pictures are there."""
    for i in range(total):
        try:
            with Image.open(out / f"{i:05d}.png") as picture:
                found = picture.info
        except (OSError, SyntaxError):
            return i
        if any(found.get(key) != value for key, value in of(i).items()):
            return i
    return total


def _pixels(path: pathlib.Path) -> np.ndarray:
    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def write_npz(out: pathlib.Path, make: Make, total: int, size: int, made_from: dict) -> None:
    """samples.npz, put together of parts once they are all there."""
    parts, path = out / ".samples.npz.parts", out / "samples.npz"
    batches = kept.kept(parts, lambda start: make(start=start), total, size, made_from, "--out")
    progress = Progress("images", total, silent=not cluster.is_first())
    shape, dtype = (), None
    for batch in progress.over(batches):
        shape, dtype = (total, *batch.shape[1:]), batch.dtype
    if not cluster.is_first():
        return
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
    with files.whole(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open(zipfile.ZipInfo("images.npy"), "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
            for i in range(-(-total // size)):
                file.write(np.ascontiguousarray(kept.shard(parts / f"{i:05d}.npy")).tobytes())
    shutil.rmtree(parts)
    print(f"{total} images in {path}")


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
