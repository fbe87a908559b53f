"""The trials of a sweep on disk, and one of them run.

    python -m launch.trials --dir=DIR --trial=NAME

DIR/state/NAME.json holds the arguments of a trial and how it stands: "waiting", "running" or the
exit status of its training. Under Slurm every task of a trial runs this; the first one writes.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
WORDS = {0: "finished", 75: "stopped, to be resumed", "waiting": "waiting", "running": "running"}


class Trial(NamedTuple):
    """A run: its name, and the arguments of its training."""

    name: str
    arguments: list[str]


def training(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "experiments.train", *arguments]


class Sweep(NamedTuple):
    directory: pathlib.Path
    trials: list[Trial]

    def state(self, trial: Trial) -> dict[str, Any]:
        """Its state; empty for a trial of other arguments, or none."""
        found = read(self.directory, trial.name)
        return found if found.get("arguments") == trial.arguments else {}

    def unfinished(self) -> list[Trial]:
        return [trial for trial in self.trials if self.state(trial).get("status") != 0]

    def prepare(self, trials: Sequence[Trial]) -> None:
        """Writes down what is to be run."""
        (self.directory / "logs").mkdir(parents=True, exist_ok=True)
        for trial in trials:
            mark(self.directory, trial.name, "waiting", trial.arguments)

    def runner(self) -> list[str]:
        return [sys.executable, "-m", "launch.trials", f"--dir={self.directory.absolute()}"]

    def command(self, trial: Trial) -> list[str]:
        return [*self.runner(), f"--trial={trial.name}"]

    def word(self, trial: Trial) -> str:
        status = self.state(trial).get("status", "waiting")
        return WORDS.get(status, f"failed, status {status}")


def _path(directory: pathlib.Path, name: str) -> pathlib.Path:
    return directory / "state" / f"{name}.json"


def read(directory: pathlib.Path, name: str) -> dict[str, Any]:
    try:
        return json.loads(_path(directory, name).read_text())
    except (OSError, ValueError):
        return {}


def mark(directory: pathlib.Path, name: str, status: int | str, arguments: Sequence[str]) -> None:
    path = _path(directory, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps({"status": status, "arguments": list(arguments)}) + "\n")
    temporary.replace(path)


def run(directory: pathlib.Path, name: str) -> int:
    """Trains one trial, its output in DIR/logs/NAME.log; returns its exit status.

    Raises ValueError when the sweep knows no such trial.
    """
    arguments = read(directory, name).get("arguments")
    if arguments is None:
        raise ValueError(f"--trial={name} is none of {directory}: start it by launch.sweep")
    first = os.environ.get("SLURM_PROCID", "0") == "0"
    if first:
        mark(directory, name, "running", arguments)
    told = {"WANDB_RUN_GROUP": directory.name, "WANDB_JOB_TYPE": "trial", "WANDB_TAGS": "sweep"}
    with (directory / "logs" / f"{name}.log").open("a") as log:
        process = subprocess.Popen(
            training(arguments), stdout=log, stderr=log, cwd=ROOT, env={**told, **os.environ}
        )
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: process.send_signal(number))
    status = process.wait()
    status = status if status >= 0 else 128 - status  # by a signal: as a shell has it
    if first:
        mark(directory, name, status, arguments)
    return status


# -- how they stand ------------------------------------------------------------------------------


def table(sweep: Sweep, metric: str | None = None, highest: bool = False) -> str:
    """A line a trial: its state, last step, last loss, and best `metric` with the step it had it.

    `metric` None: eval_loss. The best is the lowest, or the `highest`. Raises ValueError for a
    metric that no trial logged, unless it is the default one.
    """
    logged = {trial.name: _rows(sweep.directory / trial.name) for trial in sweep.trials}
    known = {name for rows in logged.values() for row in rows for name in row} - {"step"}
    if metric is not None and metric not in known:
        found = ", ".join(sorted(known)) or "nothing yet"
        raise ValueError(f"--metric={metric} is logged by none of the trials: they log {found}")
    title = f"{'highest' if highest else 'lowest'} {metric or 'eval_loss'}"
    rows = [("trial", "state", "step", "loss", title, "at step")]
    for trial in sweep.trials:
        numbers = _numbers(logged[trial.name], metric or "eval_loss", highest)
        rows.append((trial.name, sweep.word(trial), *numbers))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )


def _rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """What a trial logged; a line that is being written is left out."""
    try:
        lines = (workdir / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def _numbers(rows: list[dict[str, Any]], metric: str, highest: bool) -> tuple[str, str, str, str]:
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    having = [row for row in rows if row.get(metric) is not None]
    best = (max if highest else min)(having, key=lambda row: row[metric], default=None)
    return (
        str(rows[-1]["step"]) if rows else "-",
        f"{losses[-1]:.4g}" if losses else "-",
        f"{best[metric]:.4g}" if best else "-",
        str(best["step"]) if best else "-",
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", required=True, type=pathlib.Path)
    parser.add_argument("--trial", required=True)
    values = parser.parse_args(argv)
    try:
        return run(values.dir, values.trial)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
