"""`metrics.jsonl`, the record of a run, and the interface of everything that a run reports to.

Every line is whole, no step stands in it twice after a resume, and numbers that are not finite are
`null`, so that it is JSON to any reader.
"""

import contextlib
import json
import logging
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion import files

log = logging.getLogger(__name__)


class Writer:
    """Where a run reports to. This one is silent: what processes above 0 get."""

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers of one step, by name: `loss`, `examples_per_sec`, `eval/psnr`, ..."""

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Named uint8 arrays (batch, height, width, 1 or 3)."""

    def hparams(self, values: Mapping[str, Any]) -> None:
        """The resolved config, nested; what looks like a secret is not written."""

    def message(self, text: str) -> None:
        """A line for the person watching."""

    def close(self) -> None:
        """Writes what is left. The writer is not used afterwards."""


def _finite(value: Any) -> int | float | None:
    value = np.asarray(value).item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Jsonl(Writer):
    """`metrics.jsonl`: one object a call of `scalars`, `step` first.

    A line is appended by one write, so a killed process leaves a torn line at most at the end; the
    next one removes it, and the lines of steps after `resume_step`, which it will log again.

    Raises OSError when the disk is full or read-only; the lines before stay whole.
    """

    def __init__(self, path: str | os.PathLike, resume_step: int | None = None):
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _repair(self.path, resume_step)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        record = {"step": int(step)} | {name: _finite(value) for name, value in values.items()}
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        size = os.fstat(self._file).st_size
        with contextlib.suppress(OSError):
            if os.write(self._file, line) == len(line):
                return
            os.ftruncate(self._file, size)  # the disk filled up within the line
        raise OSError(f"{self.path}: no space for the metrics of step {step}; free some")

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """What a run logged, a dict a line of its `metrics.jsonl`."""
    text = pathlib.Path(workdir, "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def _repair(path: pathlib.Path, resume_step: int | None) -> None:
    """Drops torn and foreign lines and those of steps after `resume_step`; a rename, or nothing."""
    kept, torn, later = [], 0, 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            step = json.loads(line)["step"] if line.endswith(b"\n") else None
        except (ValueError, KeyError, TypeError):
            step = None
        if not isinstance(step, int):
            torn += 1
        elif resume_step is not None and step > resume_step:
            later += 1
        else:
            kept.append(line)
    if not torn and not later:
        return
    log.warning("%s: dropped %d torn lines, %d after step %s", path, torn, later, resume_step)
    files.write(path, b"".join(kept))
