"""Expands a config's `sweep(add)` and runs its trials.

    python -m launch.sweep --config=configs/X.py[:arg] --dir=DIR [--config.a.b=v]
        [--launcher=local|slurm|wandb] [--max_parallel=N] [--dry_run]
        [--status [--metric=KEY [--highest]]] [-- --nodes=1 --time=4:00:00 ...]

A trial is one run, with its workdir DIR/NAME, NAME being what it changes; its output is in
DIR/logs/NAME.log. `--config.a.b=v` holds for every trial. What follows `--` are options of
launch/slurm.sh. The outcome of a trial is in DIR/state/NAME.json; a trial that fails is marked
there and the others go on. The same command again runs what is not finished: a trial that was
stopped resumes, one that failed is tried again, one that finished is left alone. `--status` prints
a line a trial, with its lowest (or `--highest`) eval_loss, or another `--metric` of metrics.jsonl;
`experiments.report DIR` ranks the trials and draws their curves over each other.

local: N trials at a time on this machine. slurm: one job array. wandb: DIR/sweep.yaml, a grid over
the trials' names, `wandb sweep`, and N agents here; each trial logs to wandb as its config says.

No JAX here: it runs on a login node.
"""

import argparse
import importlib.util
import json
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from launch import space, trials
from launch.trials import Sweep, Trial

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 75  # exit statuses: as experiments/ has them; 1: a trial


# -- from a config to trials ---------------------------------------------------------------------


def load(config: str, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """What each trial changes: the dicts that the config's `sweep(add)` adds.

    Raises ValueError for whatever is wrong with the config, its overrides or a trial.
    """
    path = pathlib.Path(config.split(":")[0])
    if not path.is_file():
        raise ValueError(f"--config={config}: {path} does not exist: name a file of configs/")
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
    arguments, sys.argv = sys.argv, ["sweep", f"--config={config}", *overrides]
    try:  # ml_collections reads sys.argv, whatever it is handed
        values(sys.argv)
        loaded = values.config
    except Exception as error:
        raise ValueError(f"--config={config}: {error}") from error
    finally:
        sys.argv = arguments
    spec = importlib.util.spec_from_file_location("swept_config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "sweep"):
        raise ValueError(f"--config={config} has no sweep(add): write one beside get_config")
    add = space.Add()
    module.sweep(add)
    if not add.trials:
        raise ValueError(f"--config={config}: sweep(add) adds no trial")
    for trial in add.trials:
        _check(trial, loaded)
    return add.trials


def _check(trial: dict[str, Any], config: ConfigDict) -> None:
    """ValueError when a trial changes what the config lacks, or to another type."""
    copy = config.copy_and_resolve_references()
    for key, value in trial.items():
        section, _, leaf = key.rpartition(".")
        try:
            node = copy
            for word in filter(None, section.split(".")):
                node = node[word]
            known = leaf in node
        except (KeyError, TypeError):
            known = False
        if not known:
            raise ValueError(f"sweep: the config has no key {key}: correct it in sweep(add)")
        try:
            node[leaf] = value
        except (TypeError, ValueError) as error:
            raise ValueError(f"sweep: {key}={value!r} is of the wrong type: {error}") from error


def _word(value: Any) -> str:
    return str(value) if isinstance(value, str | bool | int | float) else repr(value)


def expand(config: str, directory: pathlib.Path, overrides: Sequence[str]) -> Sweep:
    """The trials of a config, named, with the arguments that each is trained with."""
    changes, expanded = load(config, overrides), []
    for name, change in zip(space.names(changes), changes):
        own = [f"--config.{key}={_word(value)}" for key, value in change.items()]
        arguments = [f"--config={config}", f"--workdir={directory / name}", *overrides, *own]
        expanded.append(Trial(name, arguments))
    return Sweep(directory, expanded)


# -- the launchers -------------------------------------------------------------------------------


def run_local(sweep: Sweep, max_parallel: int) -> int:
    """Trials as processes of this machine, `max_parallel` at a time; signals are passed on."""
    waiting, running = sweep.unfinished(), {}
    sweep.prepare(waiting)
    stopping: list[int] = []

    def stop(number, frame):
        del frame
        stopping.append(number)
        for process in running:
            process.send_signal(number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        while running or (waiting and not stopping):
            while waiting and len(running) < max_parallel and not stopping:
                trial = waiting.pop(0)
                print(f"{trial.name}: begins", flush=True)
                running[subprocess.Popen(sweep.command(trial), cwd=trials.ROOT)] = trial
            time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                trial = running.pop(process)
                print(f"{trial.name}: {sweep.word(trial)}", flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return INTERRUPTED if stopping else outcome(sweep)


def outcome(sweep: Sweep) -> int:
    left = sweep.unfinished()
    if left:
        names = ", ".join(trial.name for trial in left[:5]) + (", ..." if len(left) > 5 else "")
        print(f"{len(left)} of {len(sweep.trials)} trials are not finished: {names}", flush=True)
    return FAILED if left else 0


def submit_slurm(sweep: Sweep, max_parallel: int, options: Sequence[str], dry_run: bool) -> int:
    """One job array of what is unfinished and not in the queue; the lines of `commands` are all."""
    queued = set() if dry_run else _queued(sweep)
    todo = [trial for trial in sweep.unfinished() if trial.name not in queued]
    if not todo:
        print(f"nothing to submit: {len(queued)} trials are in the queue, the others finished")
        return 0
    lines = "".join(shlex.join(sweep.command(trial)) + "\n" for trial in sweep.trials)
    indices = ",".join(str(sweep.trials.index(trial)) for trial in todo)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder if dry_run else sweep.directory) / "commands"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines)
        argv = [str(trials.ROOT / "launch" / "slurm.sh"), *options, f"--array={path.absolute()}"]
        argv += [f"--indices={indices}", f"--max_parallel={max_parallel}"]
        argv += [f"--output={sweep.directory.absolute()}/logs/%A_%a.log"]
        if dry_run:
            print(lines, end="", flush=True)
            return subprocess.run([*argv, "--dry_run"]).returncode
        sweep.prepare(todo)
        done = subprocess.run(argv, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return done.returncode
    job = done.stdout.strip().split(";")[0].split()[-1]
    with (sweep.directory / "slurm_jobs").open("a") as file:
        file.write(f"{job}\n")
    print(f"job {job}: {len(todo)} trials, {max_parallel} at a time")
    return 0


def _queued(sweep: Sweep) -> set[str]:
    """Names of trials that Slurm still has, of the arrays that this sweep submitted."""
    jobs = sweep.directory / "slurm_jobs"
    if not jobs.exists() or not shutil.which("squeue"):
        return set()
    found = set()
    for job in jobs.read_text().split():
        argv = ["squeue", "--noheader", "--array", f"--jobs={job}", "--format=%K"]
        out = subprocess.run(argv, capture_output=True, text=True)  # an old job: an error, no lines
        found |= {sweep.trials[int(i)].name for i in out.stdout.split() if i.isdigit()}
    return found


def wandb_file(sweep: Sweep, todo: Sequence[Trial]) -> dict[str, Any]:
    """A sweep as wandb describes one: a grid over the names of trials."""
    return {
        "name": sweep.directory.name,
        "method": "grid",
        "program": "launch/trials.py",
        "command": [*sweep.runner(), "${args}"],
        "parameters": {"trial": {"values": [trial.name for trial in todo]}},
    }


def run_wandb(sweep: Sweep, max_parallel: int, dry_run: bool) -> int:
    """`wandb sweep`, then agents of this machine."""
    todo = sweep.unfinished()
    if not todo:
        return outcome(sweep)
    text = json.dumps(wandb_file(sweep, todo), indent=2) + "\n"  # JSON is YAML
    path = sweep.directory / "sweep.yaml"
    if dry_run:
        print(f"{text}wandb sweep {path}\n" + "wandb agent SWEEP\n" * max_parallel, end="")
        return 0
    if not shutil.which("wandb"):
        raise ValueError("--launcher=wandb: wandb is not on the PATH: `pip install wandb`")
    sweep.prepare(todo)
    path.write_text(text)
    made = subprocess.run(
        ["wandb", "sweep", str(path)], cwd=trials.ROOT, capture_output=True, text=True
    )
    found = re.search(r"wandb agent (?:--\S+ )*(\S+)", made.stdout + made.stderr)
    if made.returncode or not found:
        reason = " ".join((made.stderr or made.stdout).split())[-300:]
        raise ValueError(f"`wandb sweep {path}` did not make a sweep: {reason}")
    agents = [
        subprocess.Popen(["wandb", "agent", found[1]], cwd=trials.ROOT) for _ in range(max_parallel)
    ]
    for agent in agents:
        agent.wait()
    return outcome(sweep)


# -- the command ---------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Flags, overrides (--config.a.b=v) and the options after `--`."""
    own, options = list(argv), []
    if "--" in own:
        own, options = own[: own.index("--")], own[own.index("--") + 1 :]
    overrides = [word for word in own if word.startswith("--config.")]
    parser = _Parser(prog="python -m launch.sweep", allow_abbrev=False, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", required=True)
    parser.add_argument("--dir", required=True, type=lambda text: pathlib.Path(text).absolute())
    parser.add_argument("--launcher", default="local", choices=["local", "slurm", "wandb"])
    parser.add_argument("--max_parallel", default=1, type=int)
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--status", action="store_true")
    parser.add_argument("--metric")
    parser.add_argument("--highest", action="store_true")
    values = parser.parse_args([word for word in own if word not in overrides])
    if values.max_parallel < 1:
        raise ValueError(f"--max_parallel={values.max_parallel} must be at least 1")
    if (values.metric or values.highest) and not values.status:
        raise ValueError("--metric and --highest are of --status: give that as well")
    if options and values.launcher != "slurm":
        raise ValueError(f"{options[0]} after -- is an option of --launcher=slurm")
    return values, overrides, options


def launch(argv: Sequence[str]) -> int:
    values, overrides, options = parse(argv)
    sweep = expand(values.config, values.dir, overrides)
    if values.status:
        print(trials.table(sweep, values.metric, values.highest))
        return 0
    if values.launcher == "slurm":
        return submit_slurm(sweep, values.max_parallel, options, values.dry_run)
    if values.launcher == "wandb":
        return run_wandb(sweep, values.max_parallel, values.dry_run)
    if values.dry_run:
        for trial in sweep.unfinished():
            print(shlex.join(trials.training(trial.arguments)))
        return 0
    return run_local(sweep, values.max_parallel)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return launch(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
