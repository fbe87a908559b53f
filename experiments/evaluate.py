"""Numbers of a trained run, with what they depend on, as evaluation.json.

    python -m experiments.evaluate --workdir=DIR --metrics=adherence,frechet_distance \
        --classifier=DIR [--weights=ema|raw]
    python -m experiments.evaluate --workdir=DIR --metrics=bits_per_dim --num=256

What each metric is stands in `experiments/measures.py`. `--num` is how many samples are made, or,
for bits_per_dim, how many examples of the evaluation split are read.
"""

import importlib.metadata
import json
import pathlib
import sys
import time
from typing import Any

import jax
from absl import flags

from experiments import cli, cluster, workdir
from experiments.measures import METRICS, Subject


def versions() -> dict[str, str]:
    names = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def evaluate(subject: Subject, metrics: list[str]) -> dict[str, Any]:
    """The named metrics of a run, with seeds, sampler, hashes and versions beside them."""
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown or not metrics:
        raise ValueError(f"--metrics={','.join(metrics)} must name some of {', '.join(METRICS)}")
    started = time.perf_counter()
    results: dict[str, Any] = {
        "workdir": subject.directory.name,
        "seed": subject.seed,
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
    }
    for name in metrics:
        results |= METRICS[name](subject)
    results |= subject.identity()
    results["seconds"] = round(time.perf_counter() - started, 1)
    return results


def define(add: cli.Flags) -> None:
    cluster.define(add)
    add.add("string", "workdir", None, "A run.")
    add.add("list", "metrics", None, f"{', '.join(METRICS)}: comma-separated.")
    add.add("string", "classifier", None, "The run of a classifier on the same data.")
    add.add("integer", "num", 1000, "Samples; of captions, those of pairs seen in training.")
    add.add("integer", "num_held_out", 250, "Samples of captions of held-out pairs.")
    add.add("integer", "seed", 0, "Of prompts and noise.")
    add.add("string", "sampler", None, "Default: the config's sample.sampler.")
    add.add("integer", "steps", None, "Sampler steps; default: the config's sample.steps.")
    add.add("float", "guidance_scale", None, "Default: the config's sample.guidance_scale.")
    add.add("enum", "weights", "ema", "Averaged or raw parameters.", ["ema", "raw"])
    add.add("string", "out", None, "Default: DIR/evaluation.json.")


@cluster.joined
def main(values: flags.FlagValues) -> None:
    directory = pathlib.Path(cli.require(values, "workdir"))
    subject = Subject(
        directory,
        pathlib.Path(values.classifier) if values.classifier else None,
        values.num,
        values.num_held_out,
        values.seed,
        values.weights,
        sampler=values.sampler,
        steps=values.steps,
        guidance_scale=values.guidance_scale,
    )
    results = evaluate(subject, values.metrics or [])
    if not cluster.is_first():
        return
    out = pathlib.Path(values.out or directory / "evaluation.json")
    workdir.write_whole(out, json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
