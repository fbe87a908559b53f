"""A job of several stages: how long each took over all starts, its trainings, its losses."""

import contextlib
import pathlib
import time
from collections.abc import Iterator, Sequence

from ml_collections import ConfigDict

from diffusion import files, pictures, writers
from diffusion.pictures import Panel, logged
from experiments.train import train


class Stopped(Exception):
    """A stage was ended by a signal, and saved."""


class Job:
    """A workdir and the seconds that its stages took, over all starts."""

    def __init__(self, root: pathlib.Path):
        self.root = root
        path = root / "seconds.json"
        self.seconds: dict[str, float] = (
            files.read_json(path, "delete it") if path.is_file() else {}
        )

    @contextlib.contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        print(f"\n== {what}", flush=True)
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - started)

    def add(self, name: str, secs: float) -> None:
        self.seconds[name] = round(self.seconds.get(name, 0.0) + secs, 1)
        if self.root.is_dir():
            files.write_json(self.root / "seconds.json", self.seconds)

    @property
    def spent(self) -> dict[str, float]:
        """Seconds of each stage, and of all."""
        return {**self.seconds, "total": round(sum(self.seconds.values()), 1)}

    def losses(self, names: Sequence[str]) -> None:
        """loss.png of the runs that lie in its folder."""
        settings = {"xlabel": "step", "ylabel": "loss", "yscale": "log"}
        panels = [
            Panel([logged(writers.read(self.root / name), "loss")], {"title": name, **settings})
            for name in names
        ]
        pictures.figure(self.root / "loss.png", panels, columns=len(panels), size=(4.2, 3.2))


def train_stage(config: ConfigDict, directory: pathlib.Path) -> None:
    """Trains, or goes on. Raises Stopped where a signal ended it."""
    if train(config, directory) is None:
        raise Stopped(str(directory))
