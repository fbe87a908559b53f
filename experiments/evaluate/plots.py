"""Curves of an evaluation: numbers against guidance scale, sampler steps or training step."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion import pictures
from diffusion.metrics.intervals import stated
from diffusion.pictures import Line, Panel

LABELS = {
    "guidance_scale": "guidance scale",
    "steps": "sampler steps",
    "step": "training step",
}
COLUMNS = 4
SKIPPED = ("guidance_scale", "steps", "step", "samples", "num_held_out")


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


def plot(path: pathlib.Path, points: Sequence[Mapping[str, Any]], across: Sequence[str]) -> None:
    """Panels for each of `across`, one a metric, with a line for each weights.

    A point belongs to the panels of its "curve".
    """
    names = list(dict.fromkeys(name for point in points for name in numbers(point)))
    columns = min(COLUMNS, len(names))
    panels: list[Panel | None] = []
    for curve in across:
        own = [point for point in points if point["curve"] == curve]
        panels += [_panel(own, curve, metric) for metric in names]
        panels += [None] * (-len(names) % columns)  # each of `across` begins a row
    pictures.figure(path, panels, columns, size=(3.6, 2.8))


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
    if x == "steps":
        ticks = sorted({float(point[x]) for point in points})
        settings |= {"xscale": "log", "xticks": ticks, "xticklabels": [f"{t:g}" for t in ticks]}
    return Panel(lines, settings)
