"""The tables of a report: runs ranked, configs that differ, numbers with intervals, cost."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion import wording
from diffusion.metrics.directions import higher_is_better
from diffusion.metrics.intervals import is_number, stated
from experiments.report.runs import Run, spent_secs

ABSENT = "–"
# Of an evaluation: how it was made, not what was found.
MADE_WITH = ("device", "weights", "step", "samples", "num", "seed", "sample", "checkpoint")
NO_NUMBERS = ("versions", "sample", "seconds", "sweep")
OF_INTERVALS = ("interval", "intervals", "standard_error", "low", "high")
CURVES = {"sweep": "guidance and steps", "checkpoints": "checkpoints"}  # of an evaluation
SET_BY = ("guidance_scale", "steps", "step", "weights")
OPEN_ROWS = 20  # a longer table of configs is folded away


class Table(NamedTuple):
    """Cells as `cell` shows them, a row's header first. `summary`: folded away under that."""

    caption: str
    header: Sequence[Any]
    rows: Sequence[Sequence[Any]]
    summary: str = ""


def cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {cell(v)}" for k, v in value.items()) or ABSENT
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ABSENT if value is None else str(value)
    return wording.number(value)


# -- runs: state, rank, configs, cost --------------------------------------------------------------


class Ranking(NamedTuple):
    """By which number runs are ranked: its best value of the whole run."""

    metric: str
    highest: bool = False

    def best(self, run: Run) -> float | None:
        found = run.series.get(self.metric)
        extreme = np.max if self.highest else np.min
        return None if found is None else float(extreme(found[:, 1]))

    def place(self, run: Run) -> tuple[bool, float]:
        """Best first; failed runs and those without the number last."""
        best = self.best(run)
        return run.failed or best is None, (-1 if self.highest else 1) * (best or 0)


def ranking(runs: Sequence[Run], metric: str | None, highest: bool) -> Ranking | None:
    """By `metric`, else by the held-out loss, else the loss; lowest first, unless higher is better.

    Raises ValueError when no run logged `metric`.
    """
    known = sorted({name for run in runs for name in run.series})
    if metric is not None and metric not in known:
        some = ", ".join(known[:12]) or "nothing"
        raise ValueError(f"--metric={metric} was logged by none of the runs: they logged {some}")
    chosen = metric or next((name for name in ("eval_loss", "loss") if name in known), None)
    return Ranking(chosen, highest or higher_is_better(chosen)) if chosen else None


def overview(runs: Sequence[Run], by: Ranking | None) -> Table:
    """A line a run; ranked where `by` says how."""
    header, rows = ["run", "state", "last step", "last loss"], []
    for place, run in enumerate(sorted(runs, key=by.place) if by else runs, 1):
        loss = run.series.get("loss")
        state = f"✗ {run.state}" if run.failed else run.state or None
        rows.append([run.name, state, run.last_step, None if loss is None else float(loss[-1, 1])])
        if by is not None:
            best = by.best(run)
            rows[-1][1:1] = [None if run.failed or best is None else place, best]
    if by is None:
        return Table("How far each run is", header, rows)
    header[1:1] = ["rank", f"{'highest' if by.highest else 'lowest'} {by.metric}"]
    return Table("Best first", header, rows)


def configs(runs: Sequence[Run]) -> Table | str:
    """What differs; for a single run its whole config, folded away."""
    runs = [run for run in runs if run.config]
    if not runs:
        return "No config was found."
    rows = []
    for key in sorted({key for run in runs for key in run.config}):
        values = [run.config.get(key) for run in runs]
        if len(runs) == 1 or len(set(map(json.dumps, values))) > 1:
            rows.append([key, *map(_exact, values)])
    if not rows:
        return f"The configs of the {len(runs)} runs are the same."
    if len(runs) == 1:
        caption, summary = f"Config of {runs[0].name}", f"All {len(rows)} keys"
        return Table(caption, ["key", "value"], rows, summary)
    caption = f"{len(rows)} keys in which the {len(runs)} runs differ"
    names = [run.name for run in runs]
    summary = caption if len(rows) > OPEN_ROWS else ""
    if len(rows) < len(runs):  # the longer side goes down
        header, *rows = zip(*[["run", *names], *rows])
        return Table(caption, header, rows, summary)
    return Table(caption, ["key", *names], rows, summary)


def _exact(value: Any) -> str | None:
    """As JSON, but a string without its quotes unless it is empty."""
    return value if value is None or (value and isinstance(value, str)) else json.dumps(value)


def cost(runs: Sequence[Run]) -> Table:
    """Steps, examples, time in the training loop, speed and machine of each run."""
    rows = []
    for run in runs:
        steps, batch = run.last_step, run.config.get("train.batch_size")
        secs = spent_secs(run)
        examples = steps * batch if steps is not None and isinstance(batch, int) else None
        rate = round(examples / secs, 1) if secs and examples else None
        device = run.machine.get("device") or run.documents.get("evaluation.json", {}).get("device")
        count = run.machine.get("devices")
        time = None if secs is None else wording.duration(secs)
        device = f"{count} × {device}" if count and device else device
        machine = (device, run.machine.get("processes"))
        rows.append((run.name, steps, examples, time, rate, *machine))
    header = ["run", "steps", "examples", "training", "examples/s", "device", "processes"]
    return Table("Cost of training", header, rows)


def stages(run: Run) -> Iterator[Table]:
    """Seconds of each stage, where a results.json says them."""
    secs = run.documents.get("results.json", {}).get("seconds")
    if isinstance(secs, Mapping):
        known = [(name, value) for name, value in secs.items() if is_number(value)]
        rows = [(name, wording.duration(value)) for name, value in known]
        yield Table(f"Time of {run.name} by stage", ["stage", "time"], rows)


# -- numbers with intervals ----------------------------------------------------------------------


def estimates(found: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Numbers by dotted name as "value [low, high]", where an interval is `stated`."""
    made: dict[str, str] = {}
    for name, value in found.items():
        path = f"{prefix}{name}"
        if name in (*NO_NUMBERS, *OF_INTERVALS):
            continue
        if isinstance(value, Mapping):
            made |= estimates(value, f"{path}.")
        elif type(value) in (int, float) and name not in MADE_WITH:
            ends = stated(found, name)
            text = f"{cell(value)} [{cell(ends[0])}, {cell(ends[1])}]" if ends else cell(value)
            made[path.removesuffix(".value").removesuffix(".mean")] = text
    return made


def evaluations(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Each evaluation by run and weights: {"ldm (ema)": {...}}."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        for file, document in run.documents.items():
            which = document.get("weights")
            if isinstance(which, Mapping):
                for name, values in which.items():
                    if isinstance(values, Mapping):
                        found[f"{run.name} ({name})"] = {**document, **values, "weights": name}
            else:
                title = f"{run.name} ({which})" if which else run.name
                found[title if title not in found else f"{title}: {file}"] = document
    return found


def numbers(runs: Sequence[Run]) -> Iterator[Table | str]:
    """Every evaluation.json and results.json: a row a number, a column an evaluation."""
    columns = evaluations(runs)
    if not columns:
        yield "No evaluation was found: experiments.evaluate writes one."
        return
    rows = _rows([estimates(document) for document in columns.values()])
    for key in MADE_WITH:
        cells = [column.get(key) for column in columns.values()]
        if any(value not in (None, {}) for value in cells):
            rows.append([key, *cells])
    caption = "Evaluations; [low, high] is the interval that the evaluation states (95%)"
    yield Table(caption, ["number", *columns], rows)
    for run in runs:
        yield from _trade_offs(run)


def _rows(found: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """A row a name, with its value in each of `found`."""
    names = dict.fromkeys(name for column in found for name in column)
    return [[name, *(column.get(name) for column in found)] for name in names]


def _trade_offs(run: Run) -> Iterator[Table]:
    """The rows of an evaluation over guidance scales and sampler steps, or over checkpoints."""
    for key, what in CURVES.items():
        points = run.documents.get("evaluation.json", {}).get(key)
        points = [p for p in points if isinstance(p, Mapping)] if isinstance(points, list) else []
        set_by = [k for k in SET_BY if any(k in point for point in points)]
        found = [
            {k: point.get(k) for k in set_by}
            | estimates({k: v for k, v in point.items() if k not in set_by})
            for point in points
        ]
        if found:
            header, *rows = zip(*_rows(found))
            yield Table(f"{run.name}: {what}", header, rows)
