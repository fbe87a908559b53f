"""How a first stage came to be: every checkpoint of a run measured, with curves and pictures.

    python -m experiments.evaluate --every_checkpoint --workdir=DIR --out=DIR [--classifier=DIR]

Writes results.json (each checkpoint's numbers: `reconstructions.py`), curves.png (losses,
adaptive weight, logits, PSNR, sharpness, Frechet distance against the step, with the step at which
the discriminator began to count) and grid.png (images, and below each its reconstruction before
the discriminator counted and at the end); beside another name.json, name_curves.png and so on.
"""

import json
import pathlib
from typing import Any

import numpy as np

from diffusion import files, pictures, writers
from diffusion.manifest import finished
from diffusion.pictures import Panel, logged
from experiments.evaluate import metrics as measures
from experiments.evaluate import reconstructions, scores
from experiments.evaluate.samples import Subject
from experiments.host import cluster
from experiments.run import networks

SHOWN = 12  # images of the grid
PANELS = {
    "reconstruction": ("reconstruction",),
    "discriminator": ("logits_real", "logits_fake", "discriminator_loss"),
    "adaptive weight": ("adaptive_weight",),
    "PSNR (dB), held out": ("eval_psnr",),
    "sharpness, held out": ("eval_sharpness",),
    "Frechet distance": ("frechet_distance", "rfid"),
}


def counts_from(config: Any) -> int | None:
    """The step from which the autoencoder sees the discriminator; None: it never does."""
    loss = config.loss
    if not loss.adversarial:
        return None
    return loss.adversarial_start_steps + loss.adversarial_warmup_steps


def steps(directory: pathlib.Path) -> list[int]:
    """Those whose checkpoints a run keeps. ValueError for none."""
    found = sorted(finished((directory / "checkpoints").absolute()))
    if not found:
        raise ValueError(f"--workdir={directory} has no finished checkpoint: train it first")
    return found


def takes(subject: Subject, metrics: list[str]) -> bool:
    """Whether this module's numbers are what is asked for: a first stage's, or no name of one."""
    if subject.run is None or subject.run.image_config.task != "autoencoder":
        return False
    return set(metrics) <= {*measures.of("first stage")}


def report(subject: Subject, out: pathlib.Path) -> None:
    """Measures `samples.num` held-out images; writes `out` and both pictures."""
    directory = subject.run.directory
    stages = {step: networks.load_stage(directory, step) for step in steps(directory)}
    first, last = min(stages), max(stages)
    batches = list(reconstructions.test_images(stages[first], subject.samples.num))
    found = {step: scores.of_stage(subject, stage, batches) for step, stage in stages.items()}
    begins = counts_from(stages[first].config)
    results = {
        "workdir": directory.name,
        "counts_from_step": begins,
        "classifier": subject.judge.hash if subject.tools.classifier else None,
        "checkpoints": {str(step): values for step, values in found.items()},
        "hashes": {str(step): stage.hash for step, stage in stages.items()},
    }
    if not cluster.is_first():
        return
    files.write_json(out, results)
    name = "" if out.name == "results.json" else f"{out.stem}_"
    _curves(out.with_name(f"{name}curves.png"), directory, found, begins)
    before = max((step for step in stages if begins is None or step <= begins), default=first)
    shown = stages[before], stages[last]
    _grid(out.with_name(f"{name}grid.png"), batches[0][:SHOWN], *shown)
    print(json.dumps({k: v for k, v in found[last].items() if not isinstance(v, list)}, indent=1))


def _curves(path: pathlib.Path, directory: pathlib.Path, found: dict, begins: int | None) -> None:
    rows = writers.read(directory)
    rows += [{"step": step, **values} for step, values in found.items()]
    every = {title: [logged(rows, key) for key in keys] for title, keys in PANELS.items()}
    drawn = {title: [line for line in lines if line.x] for title, lines in every.items()}
    panels = [
        Panel(lines, {"title": title, "xlabel": "step"}, begins)
        for title, lines in drawn.items()
        if lines
    ]
    pictures.figure(path, panels, columns=3)


def _grid(path: pathlib.Path, images: np.ndarray, *stages: networks.Stage) -> None:
    rows = [images, *(reconstructions.reconstructor(stage)(images)[0] for stage in stages)]
    pictures.save_grid(path, np.concatenate(rows), columns=len(images), scale=3)
