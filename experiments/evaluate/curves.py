"""Curves of an evaluation: metrics against guidance scale, sampler steps or training step."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion import pictures
from diffusion.metrics.intervals import stated
from diffusion.pictures import Line, Panel
from experiments.evaluate import every_checkpoint
from experiments.evaluate.metrics import METRICS, measure
from experiments.evaluate.samples import Subject
from experiments.host import cluster
from experiments.run import generate

LABELS = {
    "guidance_scale": "guidance scale",
    "classifier_scale": "classifier scale",
    "steps": "sampler steps",
    "step": "training step",
    "evaluations": "network evaluations a picture",
}
COLUMNS = 4
SKIPPED = (
    "guidance_scale",
    "classifier_scale",
    "steps",
    "step",
    "evaluations",
    "samples",
    "num_held_out",
)


def sweep(
    subject: Subject, metrics: list[str], which: Sequence[str], values: Mapping[str, list]
) -> list[dict[str, Any]]:
    """The metrics at each value of each option, all else as it is."""
    return [
        _point(subject, metrics, curve, f"{curve}_{value:g}", which=name, **{curve: value})
        for curve, given in values.items()
        for value in given
        for name in which
    ]


def checkpoints(subject: Subject, metrics: list[str], which: Sequence[str]) -> list[dict[str, Any]]:
    """The metrics of every checkpoint that the run keeps."""
    return [
        _point(subject, metrics, "step", f"step_{step}", which=name, step=step)
        for step in every_checkpoint.steps(subject.run.directory)
        for name in which
    ]


def _point(
    subject: Subject, metrics: list[str], curve: str, keep: str, **changes: Any
) -> dict[str, Any]:
    part = subject.changed(keep, **changes)
    found = measure(part, [m for m in metrics if METRICS[m].of != "first stage"])
    found.pop("sheets", None)
    made_from = part.samples.made_from()
    where = {key: made_from["sample"][key] for key in ("sampler", "guidance_scale", "steps")}
    where["evaluations"] = generate.evaluations(part.run.model.pipeline)
    where |= {key: made_from[key] for key in ("step", "checkpoint")}
    where |= {curve: made_from["sample"][curve]} if curve != "step" else {}
    shown = {name: float(f"{value[0]:.4g}") for name, value in numbers(found).items()}
    if cluster.is_first():
        print(f"{curve} {where[curve]:g} {part.run.which}: {shown}", flush=True)
    return {"curve": curve, "weights": part.run.which, **where, **found}


def numbers(point: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Name to (value, low, high) of every metric of a point; low = high = value without interval.

    Of adherence it is the share in which all attributes are right.
    """
    found = {}
    for name, value in point.items():
        within, key = point, name
        if isinstance(value, Mapping):
            within, key = value, next((k for k in ("all", "mean") if k in value), "")
            value = value.get(key)
        if isinstance(value, float) and not name.endswith(("_std", "_at_infinity", *SKIPPED)):
            found[name] = value, *(stated(within, key) or (value, value))
    return found


def plot(path: pathlib.Path, points: Sequence[Mapping[str, Any]]) -> None:
    """Panels for each "curve", one a metric, with a line for each weights; none without numbers."""
    across = dict.fromkeys(point["curve"] for point in points)
    names = list(dict.fromkeys(name for point in points for name in numbers(point)))
    if not names:  # of a spectrum, say
        return
    columns = min(COLUMNS, len(names))
    panels: list[Panel | None] = []
    for curve in across:
        own = [point for point in points if point["curve"] == curve]
        panels += [_panel(own, curve, metric) for metric in names]
        panels += [None] * (-len(names) % columns)  # each of `across` begins a row
    pictures.figure(path, panels, columns, size=(3.6, 2.8))


def swept_steps(path: pathlib.Path) -> list[dict[str, Any]]:
    """What --sweep_steps measured in an evaluation's JSON, each point with its "run"."""
    if not path.is_file():
        raise ValueError(f"--beside={path} is no file: name the evaluation.json of another run")
    found = json.loads(path.read_text())
    points = found.get("sweep", []) if isinstance(found, dict) else []
    points = [point for point in points if point["curve"] == "steps" and "evaluations" in point]
    if not points:
        raise ValueError(
            f"--beside={path} holds no evaluations of a sweep: measure that run with --sweep_steps"
        )
    return [{"run": found["workdir"], **point} for point in points]


def beside(path: pathlib.Path, points: Sequence[Mapping[str, Any]]) -> None:
    """A panel a metric, against the network's evaluations; a line a run, sampler and guidance."""

    def name(point: Mapping[str, Any], several: bool) -> str:
        guided = point["guidance_scale"]
        said = [point["run"], point["sampler"], f"guided by {guided:g}" if guided != 1 else ""]
        return " ".join(filter(None, [*said, point["weights"] if several else ""]))

    several = len({point["weights"] for point in points}) > 1
    named = [{**point, "weights": name(point, several)} for point in points]
    metrics = list(dict.fromkeys(metric for point in points for metric in numbers(point)))
    panels = [_panel(named, "evaluations", metric) for metric in metrics]
    pictures.figure(path, panels, min(2, len(panels)), size=(5.4, 3.6))


def _panel(points: Sequence[Mapping[str, Any]], x: str, metric: str) -> Panel:
    lines = []
    for which in dict.fromkeys(point["weights"] for point in points):
        curve = sorted(
            (float(point[x]), *numbers(point)[metric])
            for point in points
            if point["weights"] == which and metric in numbers(point)
        )
        place, value, low, high = zip(*curve) if curve else ((), (), (), ())
        lines.append(Line(place, value, which, low, high))
    settings: dict[str, Any] = {"xlabel": LABELS[x], "ylabel": metric.replace("_", " ")}
    if x in ("steps", "evaluations"):
        ticks = sorted({float(point[x]) for point in points})
        settings |= {"xscale": "log", "xticks": ticks, "xticklabels": [f"{t:g}" for t in ticks]}
    return Panel(lines, settings)
