"""A job of several stages: how long each took over all starts, its trainings, its losses."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import jax
from ml_collections import ConfigDict

from diffusion import files, pictures, writers
from diffusion.pictures import Panel, logged
from experiments.host.guards import SIGNALS
from experiments.run import workdir
from experiments.train import INTERRUPTED, train


class Stopped(Exception):
    """A stage was ended by a signal, and saved."""


class Job:
    """A workdir and the seconds that its stages took, over all starts.

    seconds: of the clock. processor_secs: of all cores together, children's too.
    """

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.seconds, self.processor_secs = (self._kept(n) for n in ("seconds", "processor_secs"))

    def _kept(self, name: str) -> dict[str, float]:
        path = self.root / f"{name}.json"
        return files.read_json(path, "delete it") if path.is_file() else {}

    @contextlib.contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        print(f"\n== {what}", flush=True)
        started, used = time.monotonic(), sum(os.times()[:4])
        try:
            yield
        finally:
            self.add(name, time.monotonic() - started, sum(os.times()[:4]) - used)

    def add(self, name: str, secs: float, processor_secs: float = 0.0) -> None:
        for of, more in ((self.seconds, secs), (self.processor_secs, processor_secs)):
            of[name] = round(of.get(name, 0.0) + more, 1)
        if self.root.is_dir():
            files.write_json(self.root / "seconds.json", self.seconds)
            files.write_json(self.root / "processor_secs.json", self.processor_secs)

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
    try:
        workdir.check(directory, config)
    except ValueError as error:
        raise ValueError(
            f"{error}; or delete {directory} and what was made of it, to train it anew"
        ) from error
    if train(config, directory) is None:
        raise Stopped(str(directory))


@contextlib.contextmanager
def beside(name: str, what: str, command: Sequence[str]) -> Iterator[None]:
    """Runs `python -m COMMAND` in a process of its own while the body runs, and waits for it.

    Its lines come out behind its name. Where it fails, the body is stopped as by a signal (what it
    trains is saved) and a ValueError names it; where the body ends early, it is stopped so too.
    Raises Stopped where a signal ended either.
    """
    print(f"\n== beside it, in lines behind {name + ':'!r}: {what}", flush=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if cache := jax.config.values.get("jax_compilation_cache_dir"):
        environment["JAX_COMPILATION_CACHE_DIR"] = cache
    before = {number: signal.signal(number, _stop) for number in (*SIGNALS, signal.SIGHUP)}
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,  # Ctrl-C is this process's, which passes it on
    )
    last, needed = [""], threading.Event()  # its last line; whether the body is under way
    needed.set()

    def relay() -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                print(f"{name}: {line.rstrip()}", flush=True)
                last[0] = line.strip() or last[0]
        if process.wait() not in (0, INTERRUPTED) and needed.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    relaying = threading.Thread(target=relay, name=name)
    relaying.start()
    try:
        yield
        relaying.join()
    except BaseException as error:
        needed.clear()
        process.terminate()  # nothing, where it ended
        relaying.join()
        if isinstance(error, Stopped) and process.returncode not in (-signal.SIGTERM, INTERRUPTED):
            _check(name, process.returncode, last[0])
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    _check(name, process.returncode, last[0])


def _stop(signum, frame) -> None:
    raise Stopped("what was trained so far")


def _check(name: str, status: int, words: str) -> None:
    if status == INTERRUPTED:
        raise Stopped(name)
    if status:
        raise ValueError(
            f"{name}, which ran beside another stage, ended with status {status} ({words}); "
            "what the other trained is saved: mend that and run the same command"
        )
