"""What a report shows, read from folders: runs, sweeps, their numbers and pictures.

A folder is a run (it holds config.json), a sweep (state/*.json: `launch/trials.py`) or a set of
runs (its folders hold runs, as the default job's does). Whatever is torn or missing inside a run
becomes a note; a folder that is none of these is refused.

A long series is drawn as at most so many points, each of a stretch of logged values: their mean,
lowest and highest, so that a spike stays visible.
"""

import base64
import dataclasses
import io
import json
import math
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffusion.redact import flatten, redact

POINTS = 400  # of a series, at most
ALL_POINTS = 60_000  # of a report
PICTURE_BYTES = 300_000  # of one picture; a larger one is made smaller
ALL_PICTURE_BYTES = 12_000_000  # of a report
PREVIEWS = 12  # steps of which a run's previews are shown
DOCUMENTS = ("evaluation.json", "results.json")
OWN_CURVES = {"loss.png"}  # the report draws them itself
STATES = {0: "finished", 75: "stopped, to be resumed", "waiting": "waiting", "running": "running"}


class Series(NamedTuple):
    """One logged number of a run."""

    steps: np.ndarray
    values: np.ndarray


class Picture(NamedTuple):
    name: str
    step: int | None
    uri: str
    width: int  # pixels
    height: int


@dataclasses.dataclass
class Run:
    """One run, or (`kind` "set" or "sweep") the folder that holds several."""

    name: str
    directory: pathlib.Path
    kind: str = "run"
    state: str = ""
    failed: bool = False
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    series: dict[str, Series] = dataclasses.field(default_factory=dict)
    documents: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    pictures: list[Picture] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def last_step(self) -> int | None:
        return max((int(s.steps[-1]) for s in self.series.values()), default=None)


def read(directories: Sequence[pathlib.Path]) -> list[Run]:
    """Every run of the folders given, and the folders of several themselves.

    Raises ValueError for a folder that is missing or holds no run, before anything is read.
    """
    opened = [(directory, _kind(directory)) for directory in directories]
    found: list[Run] = []
    for directory, kind in opened:
        if kind == "run":
            found.append(_run(directory, _name(directory)))
            continue
        prefix = f"{_name(directory)}/" if len(opened) > 1 else ""
        if kind == "sweep":
            found += _trials(directory, prefix)
        else:
            found += [_run(path, prefix + path.name) for path in _runs_in(directory)]
        found.append(_described(Run(_name(directory), directory, kind)))
    _tell_apart(found)
    budget = ALL_PICTURE_BYTES
    for run in found:
        budget = _pictures(run, budget)
    return found


def _name(directory: pathlib.Path) -> str:
    return directory.absolute().name or str(directory)


def _kind(directory: pathlib.Path) -> str:
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise ValueError(f"{directory} {what}: name the folder of a run, a sweep or several runs")
    if (directory / "config.json").is_file():
        return "run"
    if any((directory / "state").glob("*.json")):
        return "sweep"
    if _runs_in(directory):
        return "set"
    raise ValueError(
        f"{directory} holds no run (config.json), no sweep (state/) and no folder with a run: name "
        "a --workdir of experiments.train, a --dir of launch.sweep, or a folder of runs"
    )


def _runs_in(directory: pathlib.Path) -> list[pathlib.Path]:
    """The runs directly below. A network's own config.json (first_stage/) is none of a run."""
    found = [
        path
        for path in directory.iterdir()
        if (path / "config.json").is_file()
        and ((path / "metrics.jsonl").exists() or (path / "checkpoints").exists())
    ]
    return sorted(found, key=lambda path: _natural(path.name))


def _natural(text: str) -> list[Any]:
    """Sorts "b=2" before "b=10", and 1e-05 before 0.001."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", text)  # numbers at the odd places
    return [float(part) if i % 2 else part for i, part in enumerate(parts)]


def _tell_apart(runs: list[Run]) -> None:
    """Runs of one name from several folders get their folder's name as well."""
    names = [run.name for run in runs if run.kind == "run"]
    for i, run in enumerate(runs):
        if run.kind == "run" and names.count(run.name) > 1:
            run.name = f"{_name(run.directory.absolute().parent)}/{run.name}"
        if sum(other.name == run.name and other.kind == run.kind for other in runs[:i]):
            run.name = f"{run.name} ({i + 1})"


# -- one run -------------------------------------------------------------------------------------


def _run(directory: pathlib.Path, name: str) -> Run:
    run = Run(name, directory)
    run.config = flatten(redact(_json(directory / "config.json", run.notes)))
    path = directory / "metrics.jsonl"
    if path.is_file():
        run.series = read_series(path, run.notes)
    if not run.series:
        run.notes.append("no metrics logged yet")
    run.machine = _json(directory / "devices.json", run.notes)
    steps, last = run.config.get("train.steps"), run.last_step or 0
    if isinstance(steps, int):
        run.state = "finished" if last >= steps else f"at step {last:,} of {steps:,}"
    return _described(run)


def _described(run: Run) -> Run:
    for name in DOCUMENTS:
        if found := _json(run.directory / name, run.notes):
            run.documents[name] = redact(found)
    return run


def _trials(directory: pathlib.Path, prefix: str) -> Iterable[Run]:
    for path in sorted((directory / "state").glob("*.json"), key=lambda p: _natural(p.stem)):
        name = path.name.removesuffix(".json")
        notes: list[str] = []
        status = _json(path, notes).get("status", "state unknown")
        if (directory / name / "config.json").is_file():
            run = _run(directory / name, prefix + name)
        else:
            run = Run(prefix + name, directory / name, notes=["no run yet: nothing was trained"])
        run.notes += notes
        run.failed = isinstance(status, int) and status not in STATES
        run.state = f"failed, status {status}" if run.failed else STATES.get(status, str(status))
        log = directory / "logs" / f"{name}.log"
        if run.failed and log.is_file():
            run.notes.append(f"the log ends: {_last_line(log)}")
        yield run


def _last_line(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 4000, 0))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "(empty)")


def _json(path: pathlib.Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        notes.append(f"{path.name} cannot be read: it is not the JSON of an object")
        return {}
    return found


# -- logged numbers ------------------------------------------------------------------------------


def read_series(path: pathlib.Path, notes: list[str]) -> dict[str, Series]:
    """The finite numbers of a metrics.jsonl by name; what is torn or not finite becomes a note."""
    points: dict[str, tuple[list[int], list[float]]] = {}
    torn, lost = 0, {}
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
                step = row.pop("step")
            except (ValueError, KeyError, AttributeError, TypeError):
                torn += 1
                continue
            if isinstance(step, bool) or not isinstance(step, int):
                torn += 1
                continue
            for name, value in row.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    steps, values = points.setdefault(name, ([], []))
                    steps.append(step)
                    values.append(value)
                elif value is None or isinstance(value, float):
                    lost[name] = lost.get(name, 0) + 1
    if torn:
        notes.append(f"{torn:,} torn lines of metrics.jsonl were left out")
    notes += [f"{count:,} values of {name} were not finite" for name, count in lost.items()]
    return {name: _sorted(*pair) for name, pair in points.items()}


def _sorted(steps: list[int], values: list[float]) -> Series:
    order = np.argsort(steps, kind="stable")
    return Series(np.asarray(steps)[order], np.asarray(values, np.float64)[order])


def thin(series: Series, limit: int) -> list[list[float]]:
    """At most `limit` points [step, mean, lowest, highest]; [step, value] where none are joined."""
    count = len(series.steps)
    if count <= limit:
        return [[int(s), _short(v)] for s, v in zip(series.steps, series.values)]
    parts = np.array_split(np.arange(count), limit)
    return [
        [
            int(series.steps[i[-1]]),
            *(_short(f(series.values[i])) for f in (np.mean, np.min, np.max)),
        ]
        for i in parts
    ]


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def limit_of(count: int) -> int:
    """Points of each of `count` series, so that the report stays small."""
    return max(min(POINTS, ALL_POINTS // max(count, 1)), 40)


def spent_secs(run: Run) -> float | None:
    """Time in the training loop, from the logged examples a second."""
    speed, batch = run.series.get("examples_per_sec"), run.config.get("train.batch_size")
    if speed is None or not isinstance(batch, int) or (speed.values <= 0).any():
        return None
    steps = np.diff(speed.steps, prepend=0)
    return float((steps * batch / speed.values).sum())


# -- pictures ------------------------------------------------------------------------------------


def _pictures(run: Run, budget: int) -> int:
    """Adds what there is to see of a run; returns what is left of `budget` bytes."""
    paths = [(path.stem, None, path) for path in sorted(run.directory.glob("*.png"))]
    paths = [entry for entry in paths if entry[2].name not in OWN_CURVES]
    paths += _previews(run)
    left_out = 0
    for name, step, path in paths:
        try:
            data, kind, size = _embeddable(path)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            run.notes.append(f"the picture {path.name} cannot be read")
            continue
        if len(data) > budget:
            left_out += 1
            continue
        budget -= len(data)
        uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        run.pictures.append(Picture(name, step, uri, *size))
    if left_out:
        run.notes.append(f"{left_out} pictures were left out to keep the report small")
    return budget


def _previews(run: Run) -> list[tuple[str, int, pathlib.Path]]:
    """Pictures that the run logged (`experiments/evaluate/in_loop.py`), of evenly spread steps."""
    found: dict[str, list[tuple[str, int, pathlib.Path]]] = {}
    for path in sorted((run.directory / "previews").glob("*.png")):
        if match := re.fullmatch(r"(.+)-(\d+)", path.stem):
            found.setdefault(match[1], []).append((match[1], int(match[2]), path))
    shown = []
    for entries in found.values():
        entries.sort(key=lambda entry: entry[1])
        chosen = np.linspace(0, len(entries) - 1, min(PREVIEWS, len(entries)))
        shown += [entries[i] for i in chosen.round().astype(int)]
    return shown


def _embeddable(path: pathlib.Path) -> tuple[bytes, str, tuple[int, int]]:
    data = path.read_bytes()
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        image.load()
        if len(data) <= PICTURE_BYTES:
            return data, "png", image.size
        small = image.convert("RGB")
    quality, size = 85, 1600
    while len(data) > PICTURE_BYTES:
        small.thumbnail((size, size))
        small.save(buffer := io.BytesIO(), "JPEG", quality=quality)
        data, size = buffer.getvalue(), size * 3 // 4
    return data, "jpeg", small.size
