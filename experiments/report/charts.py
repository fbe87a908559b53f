"""The charts of a report: which numbers are drawn, in which order, with the table of each."""

import bisect
import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.report import runs as report_runs
from experiments.report.runs import Run
from experiments.report.tables import Table

TABLE_ROWS = 25  # of the table behind a chart
FIRST = ("loss", "eval_loss")
QUALITY = ("adherence_all", "frechet", "accuracy", "psnr", "ssim", "mse")  # charts to show first
# Each at least 3 to 1 from the light and from the dark page; eight runs later another dash begins.
COLOURS = "#2f7fe0 #d9601a #2a9247 #a35be8 #e0405f #168ea0 #a37714 #78828f".split()
LINES = [(colour, dash) for dash in ("", "7px 4px", "2px 3px") for colour in COLOURS]


class Chart(NamedTuple):
    """Lines {"run": index, "points": [[step, value], or [step, mean, lowest, highest]]}."""

    title: str
    lines: list[dict[str, Any]]
    table: Table

    @property
    def positive(self) -> bool:
        """All that is drawn can stand on a logarithmic axis."""
        return all(min(point[1:]) > 0 for line in self.lines for point in line["points"])

    @property
    def wide(self) -> bool:
        """A range of positive numbers that reads better on a logarithmic axis."""
        values = [point[1] for line in self.lines for point in line["points"]]
        low, high = np.quantile(values, (0.05, 0.98))
        return self.positive and high > 20 * low


def constants(runs: Sequence[Run]) -> dict[str, float]:
    """Numbers that never changed, in any run."""
    found = collections.defaultdict(set)
    for run in runs:
        for key, points in run.series.items():
            found[key] |= {points[:, 1].min(), points[:, 1].max()}
    return {key: seen.pop() for key, seen in found.items() if len(seen) == 1}


def charts(runs: Sequence[Run]) -> list[Chart]:
    """One for each number that some run logged twice."""
    keys = {key for run in runs for key, points in run.series.items() if len(points) > 1}
    keys -= constants(runs).keys()
    count = sum(key in run.series for run in runs for key in keys)
    limit = max(min(report_runs.POINTS, report_runs.ALL_POINTS // max(count, 1)), 40)
    found: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for key in sorted(keys, key=_place):
        tasks = {run.config.get("task") for run in runs if key in run.series}
        # Losses of different tasks do not compare.
        apart = key.endswith("loss") and len(tasks) > 1
        for i, run in enumerate(runs):
            if key in run.series:
                title = f"{key} ({run.config.get('task')})" if apart else key
                points = report_runs.thin(run.series[key], limit)
                found[title].append({"run": i, "points": points})
    names = [run.name for run in runs]
    return [
        Chart(title, lines, _table(title, lines, names))
        for title, lines in found.items()
        if any(len(line["points"]) > 1 for line in lines)
    ]


def _place(key: str) -> tuple[int, bool, str]:
    """Losses, then what is known of quality, then what else was evaluated, then the rest."""
    if key in FIRST:
        return FIRST.index(key), True, key
    if not key.startswith("eval_"):
        return len(FIRST) + 1, True, key
    return len(FIRST), not any(word in key for word in QUALITY), key


def _table(key: str, lines: Sequence[dict[str, Any]], names: Sequence[str]) -> Table:
    """The numbers behind a chart, of steps spread evenly."""
    steps = sorted({int(point[0]) for line in lines for point in line["points"]})
    if len(steps) > TABLE_ROWS:
        steps = [steps[i] for i in np.linspace(0, len(steps) - 1, TABLE_ROWS).round().astype(int)]
    rows = [[step, *(_latest(line["points"], step) for line in lines)] for step in steps]
    header = ["step", *(names[line["run"]] for line in lines)]
    return Table(f"{key}: each run's last value up to the step", header, rows, f"Table of {key}")


def _latest(points: Sequence[Sequence[float]], step: int) -> float | None:
    """The last value up to `step`; None before the first one and after the last."""
    place = bisect.bisect_right(points, step, key=lambda point: point[0])
    return points[place - 1][1] if place and step <= points[-1][0] else None
