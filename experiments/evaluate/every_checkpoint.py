"""How a first stage came to be: every checkpoint of a run measured, with curves and pictures.

    python -m experiments.evaluate.every_checkpoint --workdir=DIR --out=DIR [--classifier=DIR]

Writes results.json (each checkpoint's numbers: `reconstructions.py`), curves.png (losses,
adaptive weight, logits, PSNR, sharpness, Frechet distance against the step, with the step at which
the discriminator began to count) and grid.png (images, and below each its reconstruction before
the discriminator counted and at the end).
"""

import json
import pathlib
import sys
from typing import Any

import numpy as np
from absl import flags

from diffusion import files, pictures, writers
from diffusion.manifest import finished
from diffusion.pictures import Panel, logged
from experiments.evaluate import reconstructions
from experiments.evaluate.metrics import Judge
from experiments.host import cli
from experiments.run import networks

SHOWN = 12  # images of the grid
PANELS = {
    "reconstruction": ("reconstruction",),
    "discriminator": ("logits_real", "logits_fake", "discriminator_loss"),
    "adaptive weight": ("adaptive_weight",),
    "PSNR (dB), held out": ("eval_psnr",),
    "sharpness, held out": ("eval_sharpness",),
    "Frechet distance": ("frechet_distance",),
}


def counts_from(config: Any) -> int | None:
    """The step from which the autoencoder sees the discriminator; None: it never does."""
    loss = config.loss
    if not loss.adversarial:
        return None
    return loss.adversarial_start_steps + loss.adversarial_warmup_steps


def report(
    directory: pathlib.Path, out: pathlib.Path, classifier: pathlib.Path | None, num: int
) -> dict[str, Any]:
    """Measures and writes; returns what results.json holds."""
    judge = None if classifier is None else Judge(classifier)
    steps = sorted(finished(directory / "checkpoints"))
    if not steps:
        raise ValueError(f"--workdir={directory} has no finished checkpoint: train it first")
    stages = {step: networks.load_stage(directory, step) for step in steps}
    batches = list(reconstructions.test_images(stages[steps[0]], num))
    features = None if judge is None else lambda images: judge(images)[1]
    found = {
        step: reconstructions.measure(stage, batches, features) for step, stage in stages.items()
    }
    begins = counts_from(stages[steps[0]].config)
    results = {
        "workdir": directory.name,
        "counts_from_step": begins,
        "classifier": None if judge is None else judge.hash,
        "checkpoints": {str(step): values for step, values in found.items()},
        "hashes": {str(step): stage.hash for step, stage in stages.items()},
    }
    files.write_json(out / "results.json", results)
    _curves(out / "curves.png", directory, found, begins)
    before = max((step for step in steps if begins is None or step <= begins), default=steps[0])
    _grid(out / "grid.png", batches[0][:SHOWN], stages[before], stages[steps[-1]])
    return results


def _curves(path: pathlib.Path, directory: pathlib.Path, found: dict, begins: int | None) -> None:
    rows = writers.read(directory)
    rows += [{"step": step, **values} for step, values in found.items()]
    panels = [
        Panel([logged(rows, key) for key in keys], {"title": title, "xlabel": "step"}, begins)
        for title, keys in PANELS.items()
    ]
    pictures.figure(path, panels, columns=3)


def _grid(path: pathlib.Path, images: np.ndarray, *stages: networks.Stage) -> None:
    rows = [images, *(reconstructions.reconstructor(stage)(images)[0] for stage in stages)]
    pictures.save_grid(path, np.concatenate(rows), columns=len(images), scale=3)


def define(add: cli.Flags) -> None:
    add.add("string", "workdir", None, "The run of a first stage.")
    add.add("string", "out", None, "Where results.json and the pictures go.")
    add.add("string", "classifier", None, "A classifier's run on the same data, for features.")
    add.add("integer", "num", 2000, "Held-out images to reconstruct.")


def main(values: flags.FlagValues) -> None:
    directory, out = (pathlib.Path(cli.require(values, name)) for name in ("workdir", "out"))
    if values.num < 1:
        raise ValueError(f"--num={values.num} must be at least 1")
    classifier = pathlib.Path(values.classifier) if values.classifier else None
    results = report(directory, out, classifier, values.num)
    last = list(results["checkpoints"].values())[-1]
    print(json.dumps({k: v for k, v in last.items() if not isinstance(v, list)}, indent=1))


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
