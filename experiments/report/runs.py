"""What a report shows, read from folders: runs, sweeps, their numbers and pictures.

A folder is a run (it holds config.json), a sweep (state/*.json: `launch/trials.py`) or a set of
runs (its folders hold runs, as the default job's does). Whatever is torn or missing inside a run
becomes a note; a folder that is none of these is refused.

A long series is drawn as at most so many points, each of a stretch of logged values: their mean,
lowest and highest, so that a spike stays visible.
"""

import base64
import collections
import dataclasses
import io
import json
import math
import os
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
    series: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # (n, 2): step, value
    documents: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    pictures: list[Picture] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def last_step(self) -> int | None:
        return max((int(points[-1, 0]) for points in self.series.values()), default=None)

    def json(self, path: pathlib.Path) -> dict[str, Any]:
        """The object in a file; {} where there is none, with a note where it cannot be read."""
        try:
            found = json.loads(path.read_bytes()) if path.is_file() else {}
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            self.notes.append(f"{path.name} cannot be read: it is not the JSON of an object")
        return found if isinstance(found, dict) else {}


def read(directories: Sequence[pathlib.Path]) -> list[Run]:
    """Every run of the folders given, and the folders of several themselves.

    Raises ValueError for a folder that is missing or holds no run, before anything is read.
    """
    found: list[Run] = []
    for directory, kind in {path.absolute(): _kind(path) for path in directories}.items():
        if kind == "sweep":
            found += _trials(directory)
        elif kind == "set":
            found += [_read(Run(path.name, path)) for path in _runs_in(directory)]
        found.append(_read(Run(directory.name, directory, kind)))
    shared = os.path.commonpath([run.directory.parent for run in found if run.kind == "run"])
    budget = ALL_PICTURE_BYTES
    for run in found:
        if run.directory != pathlib.Path(shared):  # those of one name in several folders differ
            run.name = str(run.directory.relative_to(shared))
        budget = _pictures(run, budget)
    return found


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
    found = {path.parent for path in directory.glob("*/config.json")}
    of_runs = ("metrics.jsonl", "checkpoints")
    return sorted((p for p in found if any((p / name).exists() for name in of_runs)), key=_natural)


def _natural(path: pathlib.Path) -> list[Any]:
    """Sorts "b=2" before "b=10", and 1e-05 before 0.001."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", path.name)  # numbers at the odd places
    return [float(part) if i % 2 else part for i, part in enumerate(parts)]


# -- one run -------------------------------------------------------------------------------------


def _read(run: Run) -> Run:
    """Fills in what stands in the run's folder."""
    run.documents = {
        name: redact(found) for name in DOCUMENTS if (found := run.json(run.directory / name))
    }
    if run.kind != "run":
        return run
    run.config = flatten(redact(run.json(run.directory / "config.json")))
    run.machine = run.json(run.directory / "devices.json")
    path = run.directory / "metrics.jsonl"
    run.series = read_series(path, run.notes) if path.is_file() else {}
    if not run.series:
        run.notes.append("no metrics logged yet")
    steps, last = run.config.get("train.steps"), run.last_step or 0
    if isinstance(steps, int):
        run.state = "finished" if last >= steps else f"at step {last:,} of {steps:,}"
    return run


def _trials(directory: pathlib.Path) -> Iterable[Run]:
    for path in sorted((directory / "state").glob("*.json"), key=_natural):
        name = path.name.removesuffix(".json")
        run = Run(name, directory / name)
        if (run.directory / "config.json").is_file():
            _read(run)
        else:
            run.notes.append("no run yet: nothing was trained")
        status = run.json(path).get("status", "state unknown")
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


# -- logged numbers ------------------------------------------------------------------------------


def read_series(path: pathlib.Path, notes: list[str]) -> dict[str, np.ndarray]:
    """The finite numbers of a metrics.jsonl by name; what is torn or not finite becomes a note."""
    points: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
    torn, lost = 0, collections.Counter()
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
                step = row.pop("step")
            except (ValueError, KeyError, AttributeError, TypeError):
                step = None
            if type(step) is not int:
                torn += 1
                continue
            for name, value in row.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    points[name].append((step, value))
                elif value is None or isinstance(value, float):
                    lost[name] += 1
    if torn:
        notes.append(f"{torn:,} torn lines of metrics.jsonl were left out")
    notes += [f"{count:,} values of {name} were not finite" for name, count in lost.items()]
    return {
        name: np.array(sorted(pairs, key=lambda pair: pair[0]), np.float64)
        for name, pairs in points.items()
    }


def thin(points: np.ndarray, limit: int) -> list[list[float]]:
    """At most `limit` points [step, mean, lowest, highest]; [step, value] where none are joined."""

    def short(value: float) -> float:
        return float(f"{value:.5g}")

    if len(points) <= limit:
        return [[int(step), short(value)] for step, value in points]
    parts = np.array_split(points, limit)
    return [
        [int(part[-1, 0]), *(short(f(part[:, 1])) for f in (np.mean, np.min, np.max))]
        for part in parts
    ]


def spent_secs(run: Run) -> float | None:
    """Time in the training loop, from the logged examples a second."""
    speed, batch = run.series.get("examples_per_sec"), run.config.get("train.batch_size")
    if speed is None or not isinstance(batch, int) or (speed[:, 1] <= 0).any():
        return None
    return float((np.diff(speed[:, 0], prepend=0) * batch / speed[:, 1]).sum())


# -- pictures ------------------------------------------------------------------------------------


def _pictures(run: Run, budget: int) -> int:
    """Adds what there is to see of a run; returns what is left of `budget` bytes."""
    paths = sorted(path for path in run.directory.glob("*.png") if path.name not in OWN_CURVES)
    left_out = 0
    for name, step, path in [*((path.stem, None, path) for path in paths), *_previews(run)]:
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


def _previews(run: Run) -> Iterable[tuple[str, int, pathlib.Path]]:
    """Pictures that the run logged (`experiments/evaluate/in_loop.py`), of evenly spread steps."""
    found: dict[str, list[tuple[int, pathlib.Path]]] = collections.defaultdict(list)
    for path in (run.directory / "previews").glob("*.png"):
        if match := re.fullmatch(r"(.+)-(\d+)", path.stem):
            found[match[1]].append((int(match[2]), path))
    for name, entries in sorted(found.items()):
        chosen = np.linspace(0, len(entries) - 1, min(PREVIEWS, len(entries)))
        yield from ((name, *sorted(entries)[i]) for i in chosen.round().astype(int))


def _embeddable(path: pathlib.Path) -> tuple[bytes, str, tuple[int, int]]:
    data = path.read_bytes()
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        image.load()
        if len(data) <= PICTURE_BYTES:
            return data, "png", image.size
        small = image.convert("RGB")
    size = 1600
    while len(data) > PICTURE_BYTES:
        small.thumbnail((size, size))
        small.save(buffer := io.BytesIO(), "JPEG", quality=85)
        data, size = buffer.getvalue(), size * 3 // 4
    return data, "jpeg", small.size
