"""Samples from a trained run: PNGs with how they were made inside, a grid, or an .npz.

A video's frames stand side by side, a series is plotted; the .npz has either as it is.

    python -m experiments.sample --workdir=DIR --num=64 --prompt="..." --seed=0 --out=DIR

The same seed gives the same noise, and so the same images, for any batch size and device count.
"""

import pathlib
import sys

import jax
import numpy as np
from absl import flags

from experiments import cli, cluster, generate, pictures


def define(add: cli.Flags) -> None:
    cluster.define(add)
    add.add("string", "workdir", None, "A run with task='denoiser'.")
    add.add("string", "out", None, "Folder for the images (default: DIR/samples).")
    add.add("integer", "num", 16, "How many images.")
    add.add("multi_string", "prompt", None, "A caption; may be given several times.")
    add.add("string", "prompts_file", None, "A text file of captions, one a line.")
    add.add("integer", "seed", 0, "Of the noise.")
    add.add("string", "sampler", None, "Default: the config's sample.sampler.")
    add.add("integer", "steps", None, "Sampler steps; default: the config's sample.steps.")
    add.add("float", "guidance_scale", None, "Default: the config's sample.guidance_scale.")
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
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        found = [line for line in found if line]
        if not found:
            raise ValueError(f"--prompts_file={path} holds no prompt: write one a line")
        return found
    return values.prompt


@cluster.joined
def main(values: flags.FlagValues) -> None:
    directory = pathlib.Path(cli.require(values, "workdir"))
    wanted = prompts(values)
    model = generate.load(directory, values.weights)
    options = {
        "sampler": values.sampler,
        "steps": values.steps,
        "guidance_scale": values.guidance_scale,
    }
    batches = generate.images(model, values.num, wanted, values.seed, values.batch_size, **options)
    pixels = np.concatenate(list(batches))
    out = pathlib.Path(values.out or directory / "samples")
    out.mkdir(parents=True, exist_ok=True)
    if values.npz:
        if cluster.is_first():
            np.savez(out / "samples.npz", images=pixels)
            print(f"{len(pixels)} images in {out / 'samples.npz'}")
        return
    used = {k: v if v is not None else model.config.sample[k] for k, v in options.items()}
    text = {
        "seed": str(values.seed),
        **{key: str(value) for key, value in used.items()},
        "weights": values.weights,
        "checkpoint": model.checkpoint_hash,
        "step": str(model.step),
    }
    pixels = pictures.as_images(pixels)
    for i in range(jax.process_index(), len(pixels), jax.process_count()):
        prompt = wanted[i % len(wanted)] if wanted else ""
        metadata = {"prompt": prompt, "index": str(i), **text}
        pictures.save_png(out / f"{i:05d}.png", pixels[i], metadata)
    if not cluster.is_first():
        return
    pictures.save_grid(out / "grid.png", pixels[:256], scale=max(1, 64 // min(pixels.shape[1:3])))
    print(f"{len(pixels)} images and grid.png in {out}")


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
