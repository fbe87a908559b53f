"""A GAN beside a diffusion model: the same latents, the same minutes, several seeds.

    python -m experiments.gan --config=configs/digits_gan.py --out=experiments/results/gan \
        --classifier=runs/quickstart/classifier [--minutes=1] [--seeds=5]

Both make the default job's 8x8x4 latents, without captions, and its first stage decodes both:

    diffusion   configs/digits_gan.py: the default job's U-Net, epsilon prediction, 25 steps of
                DPM-Solver++; its learning rate falls to zero over the minutes
    GAN         DCGAN's plan with R3GAN's loss (`model.py`), in batches twice as large

Samples are those of averaged weights. Minutes are the processor's, of training alone. A run that is
in results.json is not made again. Of each, `--num` samples: precision, recall, density, coverage
and Frechet distance on the classifier's features, to as many training pictures; and how many of the
54 pairs of digit and colour, and of all combinations with place, size and background, that training
shows, occur. The row "data" is as many other training pictures, as the first stage returns them.
"""

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags

from diffusion import files, pictures
from experiments.gan.measure import setting
from experiments.gan.model import Gan
from experiments.host import cli

MODELS = ("diffusion", "gan")


def missing(results: dict[str, Any], seeds: int) -> Iterator[tuple[str, int]]:
    for seed in range(seeds):
        for name in MODELS:
            if str(seed) not in results.get(name, {}):
                yield name, seed


def table(results: dict[str, Any]) -> str:
    """Means over seeds, and the least and greatest."""
    columns = (
        "precision recall density coverage frechet_distance pairs combinations rarest_digit "
        "rarest_colour"
    ).split()
    lines = ["| | " + " | ".join(c.replace("_", " ") for c in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name in ("data", *MODELS):
        runs = list(results.get(name, {}).values())
        cells = []
        for column in columns if runs else ():
            values = [run[column] for run in runs]
            spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.4g}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def define(add: cli.Flags) -> None:
    add.config()
    add.add("string", "classifier", None, "The run of configs/digits_classifier.py.")
    add.add("float", "minutes", 1.0, "Processor time of each training.")
    add.add("integer", "seeds", 5, "Runs of each.")
    add.add("integer", "num", 2000, "Samples of each run.")
    add.add("integer", "width", 48, "Of the GAN's first layers.")
    add.add("float", "gamma", 1.0, "Equation 1's.")
    add.add("float", "learning_rate", 5e-4, "Of the GAN's Adam.")
    add.add("string", "out", "runs/gan", "The folder of results.json and samples.")


def main(values: flags.FlagValues) -> None:
    out, config = pathlib.Path(values.out), cli.require(values, "config")
    gan = Gan(values.width, values.gamma, values.learning_rate)
    shared, real = setting(config, cli.require(values, "classifier"), values.num)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    names = ("minutes", "num", "width", "gamma", "learning_rate")
    how = {**{name: values[name].value for name in names}, "classifier": shared.judge.hash}
    if results.setdefault("setting", how) != how:
        raise ValueError(f"--out={out} holds results of {results['setting']}: name another folder")
    results["data"] = {"0": shared.measured(real)}
    pictures.save_grid(out / "data.png", real[:64])
    for name, seed in missing(results, values.seeds):
        pixels, how = shared.samples(name, gan, 60 * values.minutes, seed)
        results.setdefault(name, {})[str(seed)] = {**shared.measured(pixels), **how}
        files.write_json(path, results)
        pictures.save_grid(out / f"{name}_{seed}.png", pixels[:64])
        print(f"{name}, seed {seed}: {results[name][str(seed)]}", flush=True)
    print(table(results))


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
