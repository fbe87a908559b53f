r"""Numbers of a trained run, or of a set of images, with what they depend on, as evaluation.json.

    python -m experiments.evaluate --workdir=DIR --metrics=adherence,frechet_distance \
        --classifier=DIR
    python -m experiments.evaluate --workdir=DIR --metrics=fid,kid,precision_recall --num=50000 \
        [--inception_weights=FILE] [--reference=FILE.npz] [--keep=DIR]
    python -m experiments.evaluate --samples=FOLDER|FILE.npz --reference=FILE.npz --metrics=fid \
        --out=FILE.json
    ... --preset=ldm_table1_celebahq            a published row's settings (presets.py)
    ... --sweep_guidance=1,2,4 --sweep_steps=10,25,50      a curve for each, and sweep.png
    ... --guidance_classifier=DIR --sweep_classifier=0,1,2,4
    ... --sweep_steps=1,2 --beside=TEACHER/evaluation.json     and beside.png, of both
    ... --ema_length=0.05,0.1                   averages of such lengths (training/ema.py, eq. 5)
    ... --every_checkpoint                      a curve against the training step, and its picture
    python -m experiments.evaluate --every_checkpoint --workdir=DIR --out=DIR [--classifier=DIR]
        of a first stage: results.json, curves.png and grid.png (every_checkpoint.py)
    python -m experiments.evaluate --workdir=DIR --metrics=colour|outline --classifier=DIR
        of LoRA's or ControlNet's run: what the adapter changed, and a picture (adapters.py)

What each metric is stands in `metrics.py`, whose table --helpfull and the README repeat. `--num` is
how many samples are made, or, for bits_per_dim, how many examples of the evaluation split are read.
Averaged and raw weights are both measured unless --weights names one. With --keep, samples are kept
in parts as they are made, and the same command goes on where it was interrupted. --reference is
made of the run's training data where the file is missing (references.py).

evaluation.json:

    {
      <metric>: ...,              of the averaged weights, or of the one set that was measured
      "intervals": {<metric>: [low, high]},   95 %; beside the numbers that they are of
      "weights": {"ema": {<metric>: ..., "intervals": ...}, "raw": {...}},  "samples", "ema_0.1"
      "sweep": [{"curve": "guidance_scale"|"classifier_scale"|"steps", "guidance_scale": ...,
                 "steps": ..., "weights": "ema"|"raw", <metric>: ..., "intervals": ...}, ...],
      "checkpoints": [{"curve": "step", "step": ..., "weights": ..., <metric>: ...}, ...],
      "warnings": what a reader has to know: too few samples,
      "preset": {"name", "row", "config", "numbers": the published ones},
      "seed", "versions", "device", "step", "checkpoint", "sample", "samples", "features",
      "reference", "classifier", "clip": what the numbers depend on; hashes where there are files
    }
"""

import json
import pathlib
import sys
import time
from typing import Any

import jax
from absl import flags

from diffusion import files
from diffusion.metrics.frechet import sample_count_warning
from diffusion.models.inception import PREPROCESSINGS
from experiments.evaluate import curves, every_checkpoint, presets, sample_sets
from experiments.evaluate import metrics as measures
from experiments.evaluate.features import Tools
from experiments.evaluate.metrics import METRICS
from experiments.evaluate.references import Against, versions
from experiments.evaluate.samples import Run, Samples, Subject
from experiments.host import cli, cluster
from experiments.run import generate, workdir

BOTH = ("ema", "raw")
SWEEPS = {
    "guidance_scale": ("sweep_guidance", float),
    "classifier_scale": ("sweep_classifier", float),
    "steps": ("sweep_steps", int),
}
OF_SAMPLES = (*(flag for flag, _ in SWEEPS.values()), "checkpoint_step", "keep", "ema_length")


def evaluate(
    subject: Subject, metrics: list[str], which: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """The named metrics of a run, with seeds, sampler, hashes and versions beside them.

    which: the weights to measure; None: the subject's own. "sheets": pictures, where there are any.
    """
    started = time.perf_counter()
    subject = measures.prepare(subject, metrics)
    notes = warnings(subject, metrics)
    found, identity, sheets = {}, {}, {}
    for name in which or (subject.run.which,):
        part = subject if subject.samples.path else subject.changed(which=name)
        # A first stage has its own weights: it is measured once.
        wanted = [m for m in metrics if not found or METRICS[m].of != "first stage"]
        if wanted:
            found[name] = measures.measure(part, wanted)
            sheets = {**found[name].pop("sheets", {}), **sheets}
            identity = identity or part.identity()
    first = next(iter(found.values()))
    return {
        "workdir": None if subject.run is None else subject.run.directory.name,
        "seed": subject.samples.seed,
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
        **first,
        "weights": found,
        **identity,
        "warnings": notes,
        "seconds": round(time.perf_counter() - started, 1),
        **({"sheets": sheets} if sheets else {}),
    }


def define(add: cli.Flags) -> None:
    cluster.define(add)
    add.add("string", "workdir", None, "A run.")
    add.add("string", "samples", None, "Images in place of the run's: a folder or an .npz.")
    add.add("list", "metrics", None, f"Comma-separated. {measures.listed()}")
    add.add("string", "preset", None, f"One of {', '.join(presets.PRESETS)}.")
    add.add("enum", "weights", "both", "Averaged or raw parameters.", ["both", *BOTH])
    add.add("list", "ema_length", None, "Of averages made of the kept checkpoints' ema.profiles.")
    add.add("integer", "num", 1000, "Samples; of captions, those of pairs seen in training.")
    add.add("integer", "num_held_out", 250, "Samples of captions of held-out pairs.")
    add.add("integer", "seed", 0, "Of prompts and noise.")
    add.add("string", "sampler", None, "Default: the config's sample.sampler.")
    add.add("integer", "steps", None, "Sampler steps; default: the config's sample.steps.")
    add.add("float", "guidance_scale", None, "Default: the config's sample.guidance_scale.")
    generate.define_guided(add)
    add.add("list", "sweep_guidance", None, "Guidance scales to measure as well.")
    add.add("list", "sweep_classifier", None, "Values of --classifier_scale to measure as well.")
    add.add("list", "sweep_steps", None, "Numbers of sampler steps to measure as well.")
    add.add("list", "beside", None, "JSONs of other runs' --sweep_steps, to draw on one plot.")
    add.add("integer", "checkpoint_step", None, "Of the checkpoint; default: the newest.")
    add.add("bool", "every_checkpoint", False, "Measure each that the run keeps as well.")
    rounding = list(sample_sets.ROUNDINGS)
    add.add("enum", "rounding", "nearest", "To 8 bits: to nearest, or cut off.", rounding)
    add.add("string", "keep", None, "Keep samples in this folder; resumes from it.")
    add.add("enum", "features", None, "Feature network.", ["inception", "classifier", "clip"])
    add.add("string", "classifier", None, "The run of a classifier on the same data.")
    add.add("string", "inception_weights", None, "File; default: the published ones.")
    names = list(PREPROCESSINGS)
    add.add("enum", "inception_preprocessing", names[0], "FID's is torch-fidelity's.", names)
    add.add("string", "clip", None, "A Transformers directory of a CLIPModel.")
    add.add("string", "reference", None, "An .npz of statistics; made where it is missing.")
    add.add("string", "reference_split", "train", "Of the run's data, to make it of.")
    add.add("integer", "reference_num", 0, "The first so many images of it; 0: all.")
    add.add("integer", "feature_batch", 50, "Images at a time through Inception.")
    add.add("integer", "replicates", 100, "Of the bootstrap; 0: no intervals of distances.")
    add.add("string", "out", None, "A .json file or a folder; default: the run's.")


def subject_of(values: flags.FlagValues, preset: presets.Preset | None) -> Subject:
    def path(name: str) -> pathlib.Path | None:
        return pathlib.Path(values[name].value) if values[name].value else None

    tools = Tools(
        path("classifier"),
        values.features or ("inception" if preset else None),
        values.inception_weights,
        values.inception_preprocessing,
        values.clip,
        values.feature_batch,
    )
    split = preset.split if preset else values.reference_split
    against = Against(path("reference"), split, values.reference_num)
    run = None
    if directory := path("workdir"):
        options = {name: values[name].value for name in ("sampler", "steps", "guidance_scale")}
        given = {k: v for k, v in generate.guided(values).items() if v is not None}
        sample = (preset.sample if preset else {}) | given
        run = Run(directory, "ema", values.checkpoint_step, sample, options)
    samples = Samples(
        run,
        values.num if preset is None or values["num"].present else preset.num,
        values.num_held_out,
        values.seed,
        preset.rounding if preset else values.rounding,
        path("samples"),
        path("keep"),
    )
    if preset is not None:
        if run is None:
            raise ValueError(f"--workdir is missing: --preset={values.preset} is of a run")
        presets.check(values.preset, preset, run.image_config, run.directory)
        if "classifier_scale" in preset.sample and not values.guidance_classifier:
            raise ValueError(f"--preset={values.preset} is guided: give --guidance_classifier=DIR")
    return Subject(samples, tools, against, values.replicates, strict=True)


def weights_of(values: flags.FlagValues, subject: Subject, metrics: list[str]) -> tuple[str, ...]:
    """Which weights to measure; the one that there is, where the run averages none."""
    if values.samples:
        return ("samples",)
    config = workdir.read_config(subject.run.directory)
    lengths = cli.numbers(values, "ema_length", float)
    if lengths and values.weights != "both":
        raise ValueError(f"--weights={values.weights} with --ema_length: leave one of them out")
    both = BOTH if config.ema.decay else ("raw",)
    which = tuple(f"ema_{x:g}" for x in lengths) or {"both": both}.get(values.weights)
    stage = [name for name in metrics if METRICS[name].of == "first stage"]
    if stage and (lengths or values.weights == "raw"):
        raise ValueError(
            f"--{'ema_length' if lengths else 'weights=raw'} with --metrics={stage[0]}: a first "
            "stage is measured with its averaged weights; leave that flag out"
        )
    return which or (values.weights,)


def check(values: flags.FlagValues, subject: Subject, metrics: list[str]) -> None:
    """Refuses flags that contradict."""
    measures.check(metrics)
    if subject.run is None and not values.samples:
        raise ValueError("--workdir is missing: give --workdir=..., or --samples=...")
    given = [name for name in (*OF_SAMPLES, "every_checkpoint") if values[name].value]
    if values.samples and given:
        raise ValueError(f"--{given[0]} makes samples, but --samples={values.samples} names some")
    several = [name for name in given if name.startswith(("sweep", "every"))]
    if several and set(metrics) <= {*measures.of("first stage")}:
        raise ValueError(
            f"--{several[0]} is of samples, but --metrics={','.join(metrics)} of a first stage"
        )
    if values.samples and (other := sorted(set(metrics) - {*measures.of("images")})):
        raise ValueError(
            f"--metrics={other[0]} needs the run that makes the samples: leave --samples out"
        )
    if values.out is None and subject.run is None:
        raise ValueError("--out is missing: with --samples alone, name a file for the results")
    swept(values)
    if values.sweep_classifier and not values.guidance_classifier:
        raise ValueError(
            f"--sweep_classifier={','.join(values.sweep_classifier)} is of a classifier: "
            "give --guidance_classifier=DIR"
        )
    if values.beside and not values.sweep_steps:
        raise ValueError("--beside draws against network evaluations: give --sweep_steps as well")


def swept(values: flags.FlagValues) -> dict[str, list]:
    return {name: cli.numbers(values, *flag) for name, flag in SWEEPS.items()}


def warnings(subject: Subject, metrics: list[str]) -> list[str]:
    """What a reader of the numbers has to know; said, and written beside them."""
    if not measures.comparing(metrics, "pool", "spatial"):
        return []
    found = sample_count_warning(subject.samples.count, subject.network.dim)
    if found and cluster.is_first():
        print(f"note: {found}", flush=True)
    return [found] if found else []


def place(values: flags.FlagValues, subject: Subject, name: str) -> pathlib.Path:
    """The file of the results: --out, which may be a folder; else in the run's."""
    out = pathlib.Path(values.out) if values.out else subject.run.directory
    return out if out.suffix == ".json" else out / name


@cluster.joined
def main(values: flags.FlagValues) -> None:
    preset = presets.find(values.preset) if values.preset else None
    metrics = list(values.metrics or (preset.metrics if preset else ()))
    subject = subject_of(values, preset)
    if values.every_checkpoint and every_checkpoint.takes(subject, metrics):
        given = [name for name in OF_SAMPLES if values[name].value]
        if given := given or ["weights=raw"] * (values.weights == "raw"):
            raise ValueError(
                f"--{given[0]} is of samples, but --every_checkpoint of a first stage measures "
                "reconstructions with its averaged weights: leave it out"
            )
        return every_checkpoint.report(subject, place(values, subject, "results.json"))
    check(values, subject, metrics)
    others = [curves.swept_steps(pathlib.Path(path)) for path in values.beside or ()]
    out = place(values, subject, "evaluation.json")
    which = weights_of(values, subject, metrics)
    if not values.samples:
        subject = subject.changed(which=which[0])
    subject = measures.prepare(subject, metrics)
    results = evaluate(subject, metrics, which)
    points, sheets = {}, results.pop("sheets", {})
    if any((sweeps := swept(values)).values()):
        points["sweep"] = curves.sweep(subject, metrics, which, sweeps)
    if values.every_checkpoint:
        points["checkpoints"] = curves.checkpoints(subject, metrics, which)
    results |= points
    if preset is not None:
        results["preset"] = {"name": values.preset, **presets.beside(preset)}
    if not cluster.is_first():
        return
    files.write_json(out, results)
    for name, sheet in sheets.items():
        sheet(out.with_name(f"{out.stem}_{name}.png"))
    for name, curve in points.items():
        curves.plot(out.with_name(f"{out.stem}_{name}.png"), curve)
    if others:
        every = [point for found in (*others, curves.swept_steps(out)) for point in found]
        curves.beside(out.with_name(f"{out.stem}_beside.png"), every)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
