"""What a denoiser makes on the way: progressive generation, and pictures between two.

    python -m experiments.evaluate.progressive --workdir=DIR --num=6 --columns=9 --out=PNG
    python -m experiments.evaluate.progressive --workdir=DIR --image=A --image=B --out=PNG

The first is DDPM's figure 6 (https://arxiv.org/abs/2006.11239): a row a picture, from left to right
x_0 as it is estimated from x_t while the picture is sampled. The second is figures 8 and 9: both
images are noised to one t, what lies between the two noisy ones in even steps is denoised, and each
row has a t of its own, from little noise (--strengths, as `sample --strength` has it) to nothing
but noise; within a row all pictures share their noise. Latent models do so with their latents.
"""

import pathlib
import sys

import numpy as np
from absl import flags

from diffusion import pictures
from diffusion.sampling.pipeline import Pipeline
from experiments.host import cli
from experiments.run import generate


def define(add: cli.Flags) -> None:
    add.add("string", "workdir", None, "A run with task='denoiser' that is told nothing.")
    add.add("string", "out", None, "The picture that is written.")
    add.add("multi_string", "image", None, "Two pictures to go between; none: generation.")
    add.add("integer", "num", 6, "Rows of progressive generation.")
    add.add("integer", "columns", 9, "Pictures a row, 2 or more.")
    add.add("list", "strengths", ["0.25", "0.5", "0.75", "1"], "Rows between two pictures.")
    add.add("string", "sampler", None, "Default: the config's sample.sampler.")
    add.add("integer", "steps", None, "Sampler steps; default: the config's sample.steps.")
    add.add("integer", "seed", 0, "Of the noise, 0 or more.")
    add.add("enum", "weights", "ema", "Averaged or raw parameters.", ["ema", "raw"])


def generation(pipeline: Pipeline, num: int, columns: int, seed: int) -> np.ndarray:
    """uint8 (num x columns, ...): estimates of x_0 at even steps, and what was made."""
    run, numbers = pipeline.compiled(trajectory="estimates"), np.arange(num, dtype=np.int32)
    made, seen = run(pipeline.params, np.full(num, seed, np.uint32), numbers, {})
    steps = np.rint(np.linspace(0, len(seen) - 1, columns - 1)).astype(int)
    rows = np.concatenate([np.asarray(seen)[steps], np.asarray(made)[None]])
    return np.moveaxis(rows, 0, 1).reshape(-1, *rows.shape[2:])


def between(
    pipeline: Pipeline, images: list[np.ndarray], columns: int, strengths: list[float], seed: int
) -> np.ndarray:
    """uint8 (strengths x columns, ...): from one of two images, (1, ...) each, to the other."""
    mix = np.linspace(0, 1, columns, dtype=np.float32)
    given = {"mix": mix, "image": images[0], "other": images[1]}
    rows = []
    for strength in strengths:
        run = pipeline.compiled(strength=strength)
        rows += pipeline.images(given, columns, [seed], run=run)
    return np.concatenate(rows)


def main(values: flags.FlagValues) -> None:
    out, columns = pathlib.Path(cli.require(values, "out")), values.columns
    paths = values.image or []
    for flag, least in (("num", 1), ("columns", 2), ("seed", 0)):
        if values[flag].value < least:
            raise ValueError(f"--{flag}={values[flag].value} must be at least {least}")
    if len(paths) not in (0, 2):
        raise ValueError(f"--image={paths[0]}, but it takes two to lie between: give --image twice")
    strengths = cli.numbers(values, "strengths", float)
    with cli.flagged(values):
        pipeline = generate.load(cli.require(values, "workdir"), values.weights).pipeline
        pipeline = pipeline.changed(sampler=values.sampler, steps=values.steps)
        if told := sorted(pipeline.task.conditions.keys() - {"hint"}):
            raise ValueError(
                f"--workdir={values.workdir} holds a run that is told {told[0]}: name one that is "
                "told nothing"
            )
        images = [pipeline.slots.read(path)["image"] for path in paths]
        if images:
            made = between(pipeline, images, columns, strengths, values.seed)
        else:
            made = generation(pipeline, values.num, columns, values.seed)
    made = pictures.as_images(made)
    pictures.save_grid(out, made, columns, max(1, 64 // min(made.shape[1:3])))
    print(f"{len(made)} pictures in {out}")


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
