"""What an adapter did to the default job's model, in numbers and pictures.

    python -m experiments.evaluate.adapters --workdir=DIR --classifier=DIR [--num=500] [--out=DIR]

DIR is a run of configs/digits_lora.py or configs/digits_controlnet.py; what it adapts is its
`init_from`. Of LoRA: how often samples are what the prompt says, before and after, for the new
colour and for the palette. Of a ControlNet: how well the edges of samples agree with the outlines
that they were given, digits of the test set, with it and without. Writes evaluation.json and
samples.png to --out (default: the run's folder).
"""

import json
import pathlib
import sys
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from diffusion import files, pictures
from diffusion.data import loader, transforms
from diffusion.data.builders.captioned_digits import compose
from diffusion.metrics import adherence as adherence_metric
from diffusion.metrics import outlines
from experiments.evaluate import metrics
from experiments.host import cli
from experiments.run import data, generate, workdir

SHOWN = 8


def lora(
    directory: pathlib.Path, config: ConfigDict, judge: metrics.Judge, num: int, seed: int
) -> tuple[dict[str, Any], np.ndarray, list[str]]:
    """Adherence before and after; samples of both and their prompts."""
    colours = {**compose.COLOURS, **compose.NEW_COLOURS}
    prompts, wanted = compose.prompts(num, seed, held_out=False)
    new = list(colours).index(config.data.colour)
    names = list(compose.COLOURS)
    renamed = [
        text.replace(names[i], config.data.colour) for text, i in zip(prompts, wanted["colour"])
    ]
    sets = {
        config.data.colour: (renamed, {**wanted, "colour": np.full_like(wanted["colour"], new)}),
        "palette": (prompts, wanted),
    }
    results: dict[str, Any] = {}
    shown = []
    for when, where in (("before", config.init_from), ("after", directory)):
        pipeline = generate.load(where).pipeline
        for name, (texts, asked) in sets.items():
            pixels = np.concatenate(list(pipeline.images(pipeline.columns(texts), num, [seed])))
            found = metrics.attributes(pixels, judge, colours)
            scores = adherence_metric.adherence(found, asked)
            results.setdefault(name, {})[when] = scores
            shown.append(pixels[:SHOWN])
    order = [shown[0], shown[2], shown[3]]
    captions = [f"{when}: {t}" for when in ("before", "after") for t in renamed[:SHOWN]]
    return results, np.concatenate(order), captions + [f"after: {t}" for t in prompts[:SHOWN]]


def controlnet(
    directory: pathlib.Path, config: ConfigDict, judge: metrics.Judge, num: int, seed: int
) -> tuple[dict[str, Any], np.ndarray, list[str]]:
    """Agreement of outlines and adherence, before and after; conditions, samples and captions."""
    source, steps = data.open_images(config, "test")
    index = np.arange(num) % len(source)
    batch = loader.fetch(source, index, np.full_like(index, seed), index, steps)
    hint = transforms.edges(batch["image"])
    wanted = hint[..., 0] > 0
    asked = dict(zip(compose.ATTRIBUTES, batch["attributes"].T))
    given = {"hint_0": hint, "hint_scale_0": np.ones(1, np.float32)}
    results: dict[str, Any] = {"originals": _agreement(batch["image"], wanted)}
    shown = [hint[:SHOWN], batch["image"][:SHOWN]]
    for when, where, extra in (("before", config.init_from, {}), ("after", directory, given)):
        pipeline = generate.load(where).pipeline
        made = pipeline.images(pipeline.columns(batch["caption"]) | extra, num, [seed])
        pixels = np.concatenate(list(made))
        found = metrics.attributes(pixels, judge)
        results[when] = {
            "outline": _agreement(pixels, wanted),
            "adherence": adherence_metric.adherence(found, asked),
        }
        shown.append(pixels[:SHOWN])
    captions = [
        f"{row}: {text}" if row in ("before", "after") else row
        for row in ("condition", "original", "before", "after")
        for text in batch["caption"][:SHOWN]
    ]
    return results, np.concatenate(shown), captions


def _agreement(pixels: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    scores = outlines.agreement(transforms.edges(pixels)[..., 0] > 0, wanted)
    return {name: round(float(value.mean()), 4) for name, value in scores.items()}


def evaluate(
    directory: pathlib.Path, classifier: pathlib.Path, num: int, seed: int, out: pathlib.Path
):
    """Writes both files to `out`; returns the numbers."""
    config = ConfigDict(workdir.read_config(directory).to_dict())
    kinds = {"lora": lora, "controlnet": controlnet}
    kind = next((name for name in kinds if name in config.model), None)
    if kind is None:
        raise ValueError(
            f"--workdir={directory} holds a run without an adapter: name one of "
            "configs/digits_lora.py or configs/digits_controlnet.py"
        )
    results, pixels, captions = kinds[kind](directory, config, metrics.Judge(classifier), num, seed)
    found = {
        "adapter": kind,
        "num": num,
        "seed": seed,
        "sample": config.sample.to_dict(),
        **results,
    }
    pictures.captioned(out / "samples.png", pixels, captions, columns=SHOWN)
    files.write_json(out / "evaluation.json", found)
    return found


def define(add: cli.Flags) -> None:
    add.add("string", "workdir", None, "A run of an adapter.")
    add.add("string", "classifier", None, "The digit classifier's run.")
    add.add("integer", "num", 500, "Samples of each kind.")
    add.add("integer", "seed", 0, "Of prompts and noise.")
    add.add("string", "out", None, "Folder of the results.")


def main(values: flags.FlagValues) -> None:
    directory = pathlib.Path(cli.require(values, "workdir"))
    classifier = pathlib.Path(cli.require(values, "classifier"))
    if values.num < 1:
        raise ValueError(f"--num={values.num} must be at least 1")
    out = pathlib.Path(values.out or directory)
    print(json.dumps(evaluate(directory, classifier, values.num, values.seed, out), indent=2))


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
