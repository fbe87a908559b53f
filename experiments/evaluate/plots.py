"""Curves of an evaluation: numbers against guidance scale, sampler steps or training step."""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion.pictures import pyplot

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
    found, intervals = {}, point.get("intervals", {})
    for name, value in point.items():
        if isinstance(value, Mapping) and isinstance(value.get("all"), float):
            low, high = value["interval"]["all"]
            found[name] = value["all"], low, high
        elif isinstance(value, Mapping) and isinstance(value.get("mean"), float):
            half = 1.96 * value.get("standard_error", 0.0)
            found[name] = value["mean"], value["mean"] - half, value["mean"] + half
        elif isinstance(value, float) and not name.endswith(("_std", "_at_infinity", *SKIPPED)):
            found[name] = value, *intervals.get(name, (value, value))
    return found


def plot(path: pathlib.Path, points: Sequence[Mapping[str, Any]], across: Sequence[str]) -> None:
    """Panels for each of `across`, one a metric, with a line for each weights.

    A point belongs to the panels of its "curve".
    """
    plt = pyplot()
    names = list(dict.fromkeys(name for point in points for name in numbers(point)))
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    size = (3.6 * columns, 2.8 * rows * len(across))
    figure, axes = plt.subplots(rows * len(across), columns, figsize=size, squeeze=False)
    for block, curve in enumerate(across):
        own = [point for point in points if point["curve"] == curve]
        panels = axes[block * rows : (block + 1) * rows].flat
        for panel, metric in itertools.zip_longest(panels, names):
            if metric is None:
                panel.axis("off")
            else:
                _panel(panel, own, curve, metric)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _panel(axis: Any, points: Sequence[Mapping[str, Any]], x: str, metric: str) -> None:
    lines = dict.fromkeys(point["weights"] for point in points)
    for which, line in zip(lines, itertools.cycle(("-", "--"))):
        curve = sorted(
            (float(point[x]), *numbers(point)[metric])
            for point in points
            if point["weights"] == which and metric in numbers(point)
        )
        place, value, low, high = zip(*curve) if curve else ((), (), (), ())
        below = [v - a for v, a in zip(value, low)]
        above = [b - v for v, b in zip(value, high)]
        style = {"marker": "o", "linestyle": line, "markersize": 3, "capsize": 2}
        axis.errorbar(place, value, (below, above), label=which, **style)
    axis.set(xlabel=LABELS[x], ylabel=metric.replace("_", " "))
    if x == "steps":
        axis.set_xscale("log")
        ticks = sorted({float(point[x]) for point in points})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
