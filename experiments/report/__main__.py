"""One HTML file about a run, several runs or a sweep: curves, pictures, configs, numbers, cost.

    python -m experiments.report DIR [DIR...] --out=report.html [--metric=KEY [--highest]]

DIR is the workdir of a run, the folder of a sweep (`launch/sweep.py --dir`), or a folder of runs,
as the default job's. Runs are drawn over each other; a sweep's trials are ranked by the best value
of --metric (default: eval_loss), the lowest unless higher is better (diffusion/metrics/directions)
or --highest says so. The file holds everything, Plotly's charts included (5 MB): it opens from a
disk without a network. What files say is shown as text, whatever it contains, and the page's
content policy lets only its own scripts and styles act, by their hashes.
"""

import base64
import hashlib
import itertools
import json
import pathlib
import sys
from collections.abc import Sequence

import jinja2
from absl import flags
from plotly.offline import get_plotlyjs

from diffusion import files, wording
from experiments.host import cli
from experiments.report import charts as report_charts
from experiments.report import runs as report_runs
from experiments.report import tables
from experiments.report.runs import Run
from experiments.report.tables import Ranking

HERE = pathlib.Path(__file__).parent
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
    if highest and metric is None:
        raise ValueError("--highest is of a --metric: give --metric=...")
    found = report_runs.read([pathlib.Path(directory) for directory in directories])
    runs = [run for run in found if run.kind == "run"]
    ranked = metric or any(run.kind == "sweep" for run in found)
    by = tables.ranking(runs, metric, highest) if ranked else None
    files.write(out, page(found, by))
    return out


def page(found: Sequence[Run], by: Ranking | None = None) -> str:
    """The whole document."""
    runs = [run for run in found if run.kind == "run"]
    charts = report_charts.charts(runs)
    data = {"runs": [run.name for run in runs], "charts": {c.title: c.lines for c in charts}}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"text": tables.cell, "hash": _hash}
    return environment.get_template("page.html").render(
        found=found,
        runs=runs,
        folders=[run.name for run in found if run.kind != "run"] or data["runs"],
        overview=tables.overview(runs, by),
        charts=charts,
        lines=[(run, *line) for run, line in zip(runs, itertools.cycle(report_charts.LINES))],
        banded=any(len(line["points"][0]) > 2 for c in charts for line in c.lines),
        constants=report_charts.constants(runs),
        numbers=list(tables.numbers(found)),
        configs=[tables.configs(runs)],
        costs=[tables.cost(runs), *(table for run in found for table in tables.stages(run))],
        pixelated=PIXELATED,
        # Script elements hold no HTML: "<" may not stand in them where a file's text could be.
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        style=(HERE / "page.css").read_text(),
        scripts=[get_plotlyjs() if charts else "", (HERE / "page.js").read_text()],
    )


def _hash(text: str) -> str:
    """How a content policy names what may stand in a script or style element."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def define(add: cli.Flags) -> None:
    add.add("string", "out", "report.html", "The file to write.")
    add.add("string", "metric", None, "What trials are ranked by; default: eval_loss.")
    add.add(
        "bool", "highest", False, "The highest --metric is the best; known of PSNR and its like."
    )


def main(values: flags.FlagValues, folders: Sequence[str]) -> None:
    written = report(folders, values.out, values.metric, values.highest)
    print(f"{written}: {wording.size(written.stat().st_size)}")


if __name__ == "__main__":
    sys.exit(cli.run(define, main, takes_words=True))
