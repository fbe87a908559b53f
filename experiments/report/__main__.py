"""One HTML file about a run, several runs or a sweep: curves, pictures, configs, numbers, cost.

    python -m experiments.report DIR [DIR...] --out=report.html [--metric=KEY [--highest]]

DIR is the workdir of a run, the folder of a sweep (`launch/sweep.py --dir`), or a folder of runs,
as the default job's. Runs are drawn over each other; a sweep's trials are ranked by the best value
of --metric (default: the lowest eval_loss). The file holds everything: it opens from a disk without
a network. What files say is shown as text, whatever it contains, and the only script that the
page's content policy lets run is its own.
"""

import base64
import bisect
import hashlib
import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from experiments.host import cli
from experiments.report import runs as report_runs
from experiments.report import tables
from experiments.report.runs import Picture, Run
from experiments.report.tables import Html, Ranking, join, tag
from experiments.run import workdir

TEMPLATE = pathlib.Path(__file__).with_name("page.html")
TABLE_ROWS = 25  # of the table behind a chart
FIRST = ("loss", "eval_loss")
QUALITY = ("adherence_all", "frechet", "accuracy", "psnr", "ssim", "mse")  # charts to show first
UNFOLDED = 6  # charts; the others are folded away
PIXELATED = 128  # a picture narrower than this is shown with its pixels as squares, and larger


def report(
    directories: Sequence[str | pathlib.Path],
    out: str | pathlib.Path,
    metric: str | None = None,
    highest: bool = False,
) -> pathlib.Path:
    """Writes the report of `directories` to `out`, and returns that.

    Raises ValueError for a folder that holds no run, a number that no run logged, and an `out` that
    cannot be written; nothing is written then.
    """
    out = pathlib.Path(out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ValueError(f"--out={out} must be a file in a folder that exists")
    if not directories:
        raise ValueError("no folder was given: python -m experiments.report DIR --out=report.html")
    found = report_runs.read([pathlib.Path(directory) for directory in directories])
    runs = [run for run in found if run.kind == "run"]
    swept = any(run.kind == "sweep" for run in found)
    if highest and metric is None:
        raise ValueError("--highest is of a --metric: give --metric=...")
    by = tables.ranking(runs, metric, highest) if swept or metric else None
    workdir.write_whole(out, page(found, by))
    return out


def page(found: Sequence[Run], by: Ranking | None = None) -> str:
    """The whole document."""
    runs = [run for run in found if run.kind == "run"]
    charts = _charts(runs)
    sections = {
        "Runs": _runs(found, runs, by),
        "Curves": _curves(runs, charts),
        "Pictures": join(_pictures(run) for run in sorted(found, key=lambda r: r.kind == "run")),
        "Numbers": tables.numbers(found),
        "Configs": tables.configs(runs),
        "Cost": join([tables.cost(runs), *map(tables.stages, found)]),
    }
    sections = {name: content for name, content in sections.items() if content}
    folders = [run.name for run in found if run.kind != "run"] or [run.name for run in runs]
    title = f"Report: {', '.join(folders[:3])}{', …' if len(folders) > 3 else ''}"
    count = f"{len(runs)} run{'s' if len(runs) != 1 else ''}"
    failed = sum(run.failed for run in runs)
    filled = {
        "title": tag("title", title)[len("<title>") : -len("</title>")],
        "header": join(
            [
                tag("h1", title),
                tag("p", count + (f", {failed} failed" if failed else ""), class_="quiet"),
            ]
        ),
        "contents": tag(
            "ul", *(tag("li", tag("a", name, href=f"#{name.lower()}")) for name in sections)
        ),
        "main": join(_section(name, content) for name, content in sections.items()),
        "footer": tag("p", "Written by experiments.report; it holds all that it shows."),
        "data": _json({"runs": [run.name for run in runs], "charts": charts}),
    }
    return _fill(TEMPLATE.read_text(), filled)


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Each {{name}} once, in one pass: what is filled in is not looked at again."""
    script = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)
    (only,) = script
    digest = base64.b64encode(hashlib.sha256(only.encode()).digest()).decode()
    values = {**values, "script_hash": f"sha256-{digest}"}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _json(value: Any) -> str:
    """JSON that cannot end the script element that holds it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _section(name: str, content: Html) -> Html:
    anchor = name.lower()
    heading = tag("h2", name, id=f"{anchor}-title")
    return tag("section", heading, content, id=anchor, aria_labelledby=f"{anchor}-title")


def _runs(found: Sequence[Run], runs: Sequence[Run], by: Ranking | None) -> Html:
    notes = [
        tag("li", tag("strong", run.name), ": ", "; ".join(run.notes)) for run in found if run.notes
    ]
    said = (tag("h3", "Notes"), tag("ul", *notes)) if notes else ()
    return join([tables.overview(runs, by), *said])


# -- curves --------------------------------------------------------------------------------------


def _charts(runs: Sequence[Run]) -> dict[str, list[dict[str, Any]]]:
    """{title: [{"run": index, "points": [...]}]} of each number that some run logged twice."""
    keys = {key for run in runs for key, s in run.series.items() if len(s.steps) > 1}
    keys -= _constants(runs).keys()  # one line says those
    limit = report_runs.limit_of(sum(key in run.series for run in runs for key in keys))
    charts: dict[str, list[dict[str, Any]]] = {}
    for key in sorted(keys, key=_place):
        having = [(i, run) for i, run in enumerate(runs) if key in run.series]
        tasks = {run.config.get("task") for _, run in having}
        for i, run in having:
            # Losses of different tasks do not compare.
            apart = key.endswith("loss") and len(tasks) > 1
            title = f"{key} ({run.config.get('task')})" if apart else key
            points = report_runs.thin(run.series[key], limit)
            charts.setdefault(title, []).append({"run": i, "points": points})
    return {
        title: lines
        for title, lines in charts.items()
        if any(len(line["points"]) > 1 for line in lines)
    }


def _place(key: str) -> tuple[int, bool, str]:
    """Losses, then what is known of quality, then what else was evaluated, then the rest."""
    if key in FIRST:
        return FIRST.index(key), True, key
    if not key.startswith("eval_"):
        return len(FIRST) + 1, True, key
    return len(FIRST), not any(word in key for word in QUALITY), key


def _constants(runs: Sequence[Run]) -> dict[str, float]:
    values: dict[str, set[float]] = {}
    for run in runs:
        for key, series in run.series.items():
            values.setdefault(key, set()).update((series.values.min(), series.values.max()))
    return {key: seen.pop() for key, seen in values.items() if len(seen) == 1}


def _curves(runs: Sequence[Run], charts: Mapping[str, list]) -> Html:
    if not charts:
        return tag("p", "No run logged a number twice yet.")
    names = [run.name for run in runs]
    frames = [_chart(title, lines, names) for title, lines in charts.items()]
    parts = [
        tag("div", id="controls", class_="controls"),
        tag("noscript", tag("p", "The charts need JavaScript; the tables hold the same numbers.")),
        tag("div", *frames[:UNFOLDED], class_="charts"),
    ]
    if more := frames[UNFOLDED:]:
        inner = tag("div", *more, class_="charts")
        parts.append(tag("details", tag("summary", f"{len(more)} more charts"), inner))
    if any(len(line["points"][0]) > 2 for lines in charts.values() for line in lines):
        said = (
            "Long series: a point is the mean of a stretch of logged values, and the band behind "
        )
        parts.append(tag("p", f"{said}it spans their lowest and highest.", class_="quiet"))
    constant = [f"{key} = {tables.number(v)}" for key, v in _constants(runs).items()]
    if constant:
        text = f"Logged with one value only: {', '.join(sorted(constant))}."
        parts.append(tag("p", text, class_="quiet"))
    return join(parts)


def _chart(key: str, lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Html:
    """The frame that the script draws into, and the numbers themselves."""
    steps = sorted({int(point[0]) for line in lines for point in line["points"]})
    if len(steps) > TABLE_ROWS:
        last = len(steps) - 1
        steps = [steps[round(i * last / (TABLE_ROWS - 1))] for i in range(TABLE_ROWS)]
    rows = [
        [f"{step:,}", *(tables.number(_latest(line["points"], step)) for line in lines)]
        for step in steps
    ]
    header = ("step", *(names[line["run"]] for line in lines))
    held = tables.table(f"{key}: each run's last value up to the step", header, rows)
    return tag(
        "figure",
        tag("figcaption", tag("h3", key), class_="head"),
        tag("details", tag("summary", f"Table of {key}"), held),
        class_="chart",
        data_key=key,
    )


def _latest(points: Sequence[Sequence[float]], step: int) -> float | None:
    """The last value up to `step`; None before the first one and after the last."""
    place = bisect.bisect_right(points, step, key=lambda point: point[0])
    return points[place - 1][1] if place and step <= points[-1][0] else None


# -- pictures ------------------------------------------------------------------------------------


def _pictures(run: Run) -> Html:
    """Single pictures, and for each preview a strip of its steps that scrolls by itself."""
    single = [picture for picture in run.pictures if picture.step is None]
    parts = [tag("div", *(_figure(run, p) for p in single), class_="pictures")] if single else []
    for name in dict.fromkeys(p.name for p in run.pictures if p.step is not None):
        steps = [p for p in run.pictures if p.step is not None and p.name == name]
        label = f"{name} of {run.name}, by step"
        figures = (_figure(run, picture) for picture in steps)
        strip = {"class_": "strip", "role": "region", "tabindex": "0", "aria_label": label}
        parts.append(tag("div", *figures, **strip))
    return join([tag("h3", run.name), *parts]) if parts else Html("")


def _figure(run: Run, picture: Picture) -> Html:
    what = picture.name.replace("_", " ")
    caption = what if picture.step is None else f"{what}, step {picture.step:,}"
    small = picture.width < PIXELATED
    image = tag(
        "img",
        src=picture.uri,
        alt=f"{caption}, of {run.name}",
        loading="lazy",
        width=picture.width * (2 if small else 1),
        height=picture.height * (2 if small else 1),
        class_="pixels" if small else None,
    )
    return tag("figure", image, tag("figcaption", caption))


# -- the command ---------------------------------------------------------------------------------


def define(add: cli.Flags) -> None:
    add.add("string", "out", "report.html", "The file to write.")
    add.add("string", "metric", None, "What trials are ranked by; default: eval_loss.")
    add.add("bool", "highest", False, "The highest --metric is the best, not the lowest.")


def main(values: flags.FlagValues, folders: Sequence[str]) -> None:
    written = report(folders, values.out, values.metric, values.highest)
    print(f"{written}: {written.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(cli.run(define, main, takes_words=True))
