"""The tables of a report: configs that differ, ranks, numbers with intervals, cost.

HTML is built by `tag`, which escapes every string that is not `Html` already: what a file says is
text, whatever it contains.
"""

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.report.runs import Run, spent_secs

ABSENT = "–"
# Of an evaluation: how it was made, not what was found.
MADE_WITH = ("device", "weights", "step", "samples", "num", "seed", "sample", "checkpoint")
NO_NUMBERS = ("versions", "sample", "seconds", "sweep")
OF_INTERVALS = ("interval", "intervals", "standard_error", "low", "high")


class Html(str):
    """Text that is HTML already."""


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """An element. `class_` is class, `aria_label` aria-label; True is a bare attribute."""
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value not in (None, False):
            words.append(f'{key}="{html.escape(str(value))}"')
    inner = "".join(
        child if isinstance(child, Html) else html.escape(str(child)) for child in children
    )
    closed = name in ("img", "input", "br")
    return Html(f"<{' '.join(words)}>" if closed else f"<{' '.join(words)}>{inner}</{name}>")


def join(parts: Iterable[str]) -> Html:
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in parts))


def table(caption: str, header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> Html:
    """A table that scrolls by itself, by keyboard too; the first cell of a row is its header."""
    head = tag("tr", *(tag("th", cell, scope="col") for cell in header))
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    ]
    inner = tag(
        "table", tag("caption", tag("span", caption)), tag("thead", head), tag("tbody", *body)
    )
    return tag("div", inner, class_="scroll", role="region", tabindex="0", aria_label=caption)


def number(value: Any) -> str:
    """Four significant digits, in full where that is short."""
    if value is None:
        return ABSENT
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e6):
        return f"{int(value):,}"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    return (
        f"{value:.3e}"
        if not 1e-4 <= size < 1e6
        else f"{value:,.4g}"
        if size < 1e4
        else f"{value:,.0f}"
    )


def duration(secs: float) -> str:
    minutes, secs = divmod(round(secs), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {secs:02d} s" if minutes else f"{secs} s"


# -- configs -------------------------------------------------------------------------------------


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Keys of which the runs' configs do not all hold the same value, with a value a run."""
    keys = sorted({key for run in runs for key in run.config})
    found = {}
    for key in keys:
        values = [run.config.get(key, ABSENT) for run in runs]
        if len({json.dumps(value, sort_keys=True) for value in values}) > 1:
            found[key] = values
    return found


def configs(runs: Sequence[Run]) -> Html:
    """What differs; for a single run its whole config, folded away."""
    runs = [run for run in runs if run.config]
    if not runs:
        return tag("p", "No config was found.")
    if len(runs) == 1:
        rows = [(key, _value(value)) for key, value in sorted(runs[0].config.items())]
        whole = table(f"Config of {runs[0].name}", ("key", "value"), rows)
        return tag("details", tag("summary", f"All {len(rows)} keys"), whole)
    keys = differing(runs)
    if not keys:
        return tag("p", f"The configs of the {len(runs)} runs are the same.")
    caption = f"{len(keys)} keys in which the {len(runs)} runs differ"
    names = [run.name for run in runs]
    rows = [(key, *map(_value, values)) for key, values in keys.items()]
    if len(keys) < len(runs):  # the longer side goes down
        header, *rows = zip(*[("run", *names), *rows])
        made = table(caption, header, rows)
    else:
        made = table(caption, ("key", *names), rows)
    if len(keys) <= 20:
        return made
    return tag("details", tag("summary", caption), made)


def _value(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


# -- runs: state, rank, cost ---------------------------------------------------------------------


class Ranking(NamedTuple):
    """By which number runs are ranked: its best value of the whole run."""

    metric: str
    highest: bool = False

    def best(self, run: Run) -> float | None:
        found = run.series.get(self.metric)
        if found is None:
            return None
        return float(found.values.max() if self.highest else found.values.min())

    def sort(self, runs: Sequence[Run]) -> list[Run]:
        """Best first; failed runs and those without the number last."""
        sign = -1 if self.highest else 1

        def key(run: Run):
            best = self.best(run)
            return (run.failed or best is None, sign * (best if best is not None else 0))

        return sorted(runs, key=key)


def ranking(runs: Sequence[Run], metric: str | None, highest: bool) -> Ranking | None:
    """By `metric`, else by the lowest held-out loss, else the lowest loss.

    Raises ValueError when no run logged `metric`.
    """
    known = sorted({name for run in runs for name in run.series})
    if metric is not None and metric not in known:
        some = ", ".join(known[:12]) or "nothing"
        raise ValueError(f"--metric={metric} was logged by none of the runs: they logged {some}")
    chosen = metric or next((name for name in ("eval_loss", "loss") if name in known), None)
    return Ranking(chosen, highest and metric is not None) if chosen else None


def overview(runs: Sequence[Run], by: Ranking | None) -> Html:
    """A line a run; ranked where `by` says how."""
    header = ["run", "state", "last step", "last loss"]
    if by is not None:
        best_of = f"{'highest' if by.highest else 'lowest'} {by.metric}"
        header = [header[0], "rank", best_of, *header[1:]]
    rows = []
    for place, run in enumerate(by.sort(runs) if by else runs, 1):
        loss = run.series.get("loss")
        state = tag("strong", f"✗ {run.state}", class_="failed") if run.failed else run.state
        row = [run.name, state or ABSENT, number(run.last_step)]
        row.append(number(float(loss.values[-1])) if loss else ABSENT)
        if by is not None:
            best = by.best(run)
            ranked = not run.failed and best is not None
            row = [row[0], str(place) if ranked else ABSENT, number(best), *row[1:]]
        rows.append(row)
    return table("How far each run is" if by is None else "Best first", header, rows)


def cost(runs: Sequence[Run]) -> Html:
    """Steps, examples, time in the training loop, speed and machine of each run."""
    header = ("run", "steps", "examples", "training", "examples/s", "device", "processes")
    rows = []
    for run in runs:
        steps, batch = run.last_step, run.config.get("train.batch_size")
        seconds, known = spent_secs(run), steps is not None and isinstance(batch, int)
        examples = steps * batch if known else None
        device = run.machine.get("device") or run.documents.get("evaluation.json", {}).get("device")
        count = run.machine.get("devices")
        rows.append(
            (
                run.name,
                number(steps),
                number(examples),
                duration(seconds) if seconds is not None else ABSENT,
                number(round(examples / seconds, 1)) if seconds and examples else ABSENT,
                f"{count} × {device}" if count and device else device or ABSENT,
                number(run.machine.get("processes")),
            )
        )
    return table("Cost of training", header, rows)


def stages(run: Run) -> Html:
    """Seconds of each stage, where a results.json says them."""
    seconds = run.documents.get("results.json", {}).get("seconds")
    if not isinstance(seconds, Mapping):
        return Html("")
    rows = [
        (name, duration(value)) for name, value in seconds.items() if isinstance(value, int | float)
    ]
    return table(f"Time of {run.name} by stage", ("stage", "time"), rows)


# -- numbers with intervals ----------------------------------------------------------------------


class Estimate(NamedTuple):
    value: float
    low: float | None = None
    high: float | None = None

    def text(self) -> str:
        if self.low is None or self.high is None:
            return number(self.value)
        return f"{number(self.value)} [{number(self.low)}, {number(self.high)}]"


def estimates(found: Mapping[str, Any], prefix: str = "") -> dict[str, Estimate]:
    """Numbers by dotted name, with their intervals however they are written down.

    As {"value", "low", "high"}, {"value", "interval": [low, high]}, {"a", "interval(s)": {"a":
    [low, high]}}, {"a", "a_interval": [low, high]} or {"mean", "standard_error"} (95%, normal).
    """
    made: dict[str, Estimate] = {}
    intervals = found.get("intervals", found.get("interval"))
    for name, value in found.items():
        path = f"{prefix}{name}"
        if name in (*NO_NUMBERS, *OF_INTERVALS) or (
            name in MADE_WITH and not isinstance(value, Mapping)
        ):
            continue
        if isinstance(value, Mapping):
            made |= estimates(value, f"{path}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            pair = found.get(f"{name}_interval")
            if isinstance(intervals, Mapping):
                pair = intervals.get(name, pair)
            elif name in ("value", "mean"):
                pair = intervals or (found.get("low"), found.get("high"))
            if name == "mean" and isinstance(error := found.get("standard_error"), int | float):
                pair = (value - 1.96 * error, value + 1.96 * error)
            name_only = path.removesuffix(".value").removesuffix(".mean")
            made[name_only] = Estimate(value, *_pair(pair))
    return made


def _pair(pair: Any) -> tuple[float | None, float | None]:
    good = isinstance(pair, list | tuple) and len(pair) == 2
    if good and all(isinstance(x, int | float) and math.isfinite(x) for x in pair):
        return pair[0], pair[1]
    return None, None


def evaluations(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Each evaluation by run and weights: {"ldm (ema)": {...}}."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        for file, document in run.documents.items():
            which = document.get("weights")
            if isinstance(which, Mapping):
                shared = {k: v for k, v in document.items() if k != "weights"}
                for name, values in which.items():
                    if isinstance(values, Mapping):
                        found[f"{run.name} ({name})"] = {**shared, **values, "weights": name}
            else:
                title = f"{run.name} ({which})" if which else run.name
                found[title if title not in found else f"{title}: {file}"] = document
    return found


def numbers(runs: Sequence[Run]) -> Html:
    """Every evaluation.json and results.json: a row a number, a column an evaluation."""
    columns = evaluations(runs)
    if not columns:
        return tag("p", "No evaluation was found: experiments.evaluate writes one.")
    found = {title: estimates(document) for title, document in columns.items()}
    names = list(dict.fromkeys(name for column in found.values() for name in column))
    rows = [
        (name, *(column[name].text() if name in column else ABSENT for column in found.values()))
        for name in names
    ]
    rows += [row for key in MADE_WITH if (row := _made_with(key, columns)) is not None]
    caption = "Evaluations; [low, high] is the interval that the evaluation states (95%)"
    return join([table(caption, ("number", *found), rows), *map(trade_offs, runs)])


def _made_with(key: str, columns: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...] | None:
    cells = [column.get(key) for column in columns.values()]
    if not any(cell not in (None, {}) for cell in cells):
        return None
    return (key, *(_text(cell) for cell in cells))


def _text(cell: Any) -> str:
    if isinstance(cell, Mapping):
        return ", ".join(f"{k} {number(v)}" for k, v in cell.items()) or ABSENT
    return number(cell)


CURVES = {"sweep": "guidance and steps", "checkpoints": "checkpoints"}
SET_BY = ("guidance_scale", "steps", "step", "weights")


def trade_offs(run: Run) -> Html:
    """The rows of an evaluation over guidance scales and sampler steps, or over checkpoints."""
    document = run.documents.get("evaluation.json", {})
    return join(_curve(f"{run.name}: {what}", document.get(key)) for key, what in CURVES.items())


def _curve(title: str, rows: Any) -> Html:
    rows = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    if not rows:
        return Html("")
    set_by = [key for key in SET_BY if any(key in row for row in rows)]
    found = [estimates({k: v for k, v in row.items() if k not in set_by}) for row in rows]
    names = list(dict.fromkeys(name for row in found for name in row))
    cells = [
        (
            *(_text(row.get(key)) for key in set_by),
            *(values[name].text() if name in values else ABSENT for name in names),
        )
        for row, values in zip(rows, found)
    ]
    return table(title, (*set_by, *names), cells)
