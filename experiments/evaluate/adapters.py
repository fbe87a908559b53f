"""What an adapter did to the model that it adapts, the run's `init_from`: numbers and pictures.

    python -m experiments.evaluate --workdir=DIR --classifier=DIR --metrics=colour --num=500
    python -m experiments.evaluate --workdir=DIR --classifier=DIR --metrics=outline --num=500

colour     of a run of LoRA (configs/digits_lora.py): how often samples are what the prompt says,
           "before" and "after", for the new colour and for the "palette"
outline    of a run of a ControlNet (configs/digits_controlnet.py): how well the edges of samples
           agree with the outlines that they were given, digits of the test set, "before", without
           it, and "after", with it; "originals": the very digits

Both of captioned digits. Each gives a sheet of pictures as well.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from diffusion import pictures
from diffusion.data import loader, transforms
from diffusion.data.builders.captioned_digits import compose
from diffusion.metrics import adherence as adherence_metric
from diffusion.metrics import outlines
from diffusion.sampling.inputs import Columns
from experiments.evaluate.features import attributes
from experiments.evaluate.samples import Samples, Subject
from experiments.run import data

SHOWN = 8
KINDS = {"colour": "lora", "outline": "controlnet"}


def check(subject: Subject, name: str) -> None:
    """Refuses a run without the adapter that the metric is of, and a judge of other pictures."""
    if (kind := KINDS[name]) not in subject.run.image_config.model:
        raise ValueError(
            f"{subject.run} holds a run without an adapter of --metrics="
            f"{name}: name one of configs/digits_{kind}.py"
        )
    judge = subject.tools.judge
    if not data.known(judge.data).judged:
        raise ValueError(
            f"--classifier={subject.tools.classifier} was trained on {judge.data!r}: name a run of "
            "configs/digits_classifier.py"
        )


def _sides(subject: Subject) -> dict[str, Samples]:
    """Samples without the adapter and with it."""
    run, after = subject.run, subject.samples
    base = pathlib.Path(run.image_config.init_from)
    before = dataclasses.replace(run, directory=base, step=None)
    return {"before": dataclasses.replace(after, run=before), "after": after}


def _made(samples: Samples, texts: list[str], extra: Columns) -> np.ndarray:
    columns = samples.run.model.pipeline.columns(texts) | extra
    return np.concatenate(list(samples.drawn(columns, samples.num)))


def colour(subject: Subject) -> dict[str, Any]:
    samples, new = subject.samples, subject.run.image_config.data.colour
    colours = {**compose.COLOURS, **compose.NEW_COLOURS}
    prompts, wanted = compose.prompts(samples.num, samples.seed, held_out=False)
    names, place = list(compose.COLOURS), list(colours).index(new)
    renamed = [text.replace(names[i], new) for text, i in zip(prompts, wanted["colour"])]
    sets = {
        new: (renamed, {**wanted, "colour": np.full_like(wanted["colour"], place)}),
        "palette": (prompts, wanted),
    }
    results: dict[str, Any] = {"adapter": "lora", "num": samples.num}
    shown, captions = [], []
    for when, side in _sides(subject).items():
        for name, (texts, asked) in sets.items():
            pixels = _made(side, texts, {})
            found = attributes(pixels, subject.tools.judge, colours)
            results.setdefault(name, {})[when] = adherence_metric.adherence(found, asked)
            if (when, name) != ("before", "palette"):
                shown.append(pixels[:SHOWN])
                captions += [f"{when}: {text}" for text in texts[:SHOWN]]
    return {**results, "sheet": pictures.sheet(np.concatenate(shown), captions, SHOWN)}


def outline(subject: Subject) -> dict[str, Any]:
    samples = subject.samples
    source, steps = data.open_images(subject.run.image_config, "test")
    index = np.arange(samples.num) % len(source)
    batch = loader.fetch(source, index, np.full_like(index, samples.seed), index, steps)
    hint, texts = transforms.edges(batch["image"]), batch["caption"]
    wanted = hint[..., 0] > 0
    asked = dict(zip(compose.ATTRIBUTES, batch["attributes"].T))
    given = {"hint_0": hint, "hint_scale_0": np.ones(1, np.float32)}
    results: dict[str, Any] = {"adapter": "controlnet", "num": samples.num}
    results["originals"] = _agreement(batch["image"], wanted)
    shown = [hint[:SHOWN], batch["image"][:SHOWN]]
    captions = [row for row in ("condition", "original") for _ in texts[:SHOWN]]
    for when, side in _sides(subject).items():
        pixels = _made(side, texts, given if when == "after" else {})
        found = attributes(pixels, subject.tools.judge)
        results[when] = {
            "outline": _agreement(pixels, wanted),
            "adherence": adherence_metric.adherence(found, asked),
        }
        shown.append(pixels[:SHOWN])
        captions += [f"{when}: {text}" for text in texts[:SHOWN]]
    return {**results, "sheet": pictures.sheet(np.concatenate(shown), captions, SHOWN)}


def _agreement(pixels: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    scores = outlines.agreement(transforms.edges(pixels)[..., 0] > 0, wanted)
    return {name: round(float(value.mean()), 4) for name, value in scores.items()}
