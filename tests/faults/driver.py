"""Runs of `experiments.train` in forked processes, with faults: the modules are imported once.

Reads jobs, a line of JSON each, and answers each with {"statuses": [...], "secs": ...}. A job has

    argv, workdir      of the command
    devices            fake devices a process; processes: how many
    log                a file for what they print
    digest             a file for the digest of the final state, written after status 0
    fault, victim      what happens to process `victim` (None: to all of them)

and a fault is one of

    {"at": "operation", "n": N, "signal": S}   before the N-th change of a file under workdir
    {"at": "save", "n": N, "secs": T, "signal": S}   T after the N-th save began
    {"at": "secs", "secs": T, "signal": S}     T after the start, from outside
    {"at": "step", "n": N, "signal": S}        before batch N is read
    {"at": "nan", "steps": [...]}              NaN in one example of these batches
    {"at": "vanish", "n": N}                   workdir is renamed before batch N is read, its
                                               first checkpoint written
    {"at": "hang_fetch" or "hang_step", "n": N}    batch or step N takes for ever, and
                                               "signals" come to a fetch that does
"""

import hashlib
import json
import os
import pathlib
import signal
import socket
import sys
import threading
import time

import jax
import numpy as np

from diffusion import checkpoint
from diffusion.data import loader
from diffusion.training import parallel
from experiments import train
from experiments.host import cli, guards

STATE = ("step", "rng", "params", "opt_state", "ema", "extra", "profiles")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")


def digest(workdir: str) -> dict[str, str]:
    """SHA-256 of the last checkpoint's arrays, and of every loss that was logged."""
    found = checkpoint.restore_params(f"{workdir}/checkpoints", STATE)
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(found.items):
        total.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        total.update(np.ascontiguousarray(leaf).tobytes())
    with open(f"{workdir}/metrics.jsonl") as lines:
        rows = [json.loads(line) for line in lines]
    losses = [[row["step"], row["loss"], row["grad_norm"]] for row in rows if "loss" in row]
    return {
        "state": total.hexdigest(),
        "losses": hashlib.sha256(json.dumps(losses).encode()).hexdigest(),
        "step": found.step,
    }


# -- faults, in the process they happen to ---------------------------------------------------------


class Operations:
    """Counts what changes files under `workdir`, and sends a signal before the n-th."""

    def __init__(self, workdir: str, n: int = 0, number: int = signal.SIGKILL):
        self.workdir, self.n, self.number, self.count = workdir, n, number, 0
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if event == "open":
            writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            inside = writes and str(arguments[0]).startswith(self.workdir)
        elif event in CHANGES:
            inside = str(arguments[0]).startswith(self.workdir) or arguments[-1] not in (-1, None)
        else:
            return
        if inside:
            self.count += 1
            if self.count == self.n:
                os.kill(os.getpid(), self.number)


def before_batch(n: int, do) -> None:
    """`do()` before the n-th batch is read."""
    read = loader.Loader.__next__

    def next_batch(self):
        if self.step + 1 == n:
            do()
        return read(self)

    loader.Loader.__next__ = next_batch


def at_save(n: int, secs: float, number: int) -> None:
    save, calls = checkpoint.Checkpoints.save, []

    def timed(self, *arguments):
        calls.append(None)
        if len(calls) == n:
            timer = threading.Timer(secs, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()
        return save(self, *arguments)

    checkpoint.Checkpoints.save = timed


def not_a_number(steps: list[int]) -> None:
    read = loader.Loader.__next__

    def next_batch(self):
        batch = read(self)
        if self.step in steps:
            batch["image"] = np.where(batch["position"][:, None, None] == 3, np.nan, batch["image"])
            batch["image"] = batch["image"].astype(np.float32)
        return batch

    loader.Loader.__next__ = next_batch


def hang(signals: list[int]) -> None:
    """Sleeps, and has this process sent the signals, half a second apart."""

    def send():
        for number in signals:
            time.sleep(0.5)
            os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    time.sleep(600)


def hang_step(n: int) -> None:
    """The device's part of step n takes for ever."""
    step = parallel.Parallel.step

    def hanging(self, train_step):
        def slow(state, batch, frozen, axis_name=None):
            new, metrics = train_step(state, batch, frozen, axis_name)

            def wait(now):
                time.sleep(600 if now + 1 == n else 0)
                return np.float32(0)

            zero = jax.pure_callback(wait, jax.ShapeDtypeStruct((), np.float32), state.step)
            metrics["skipped_in_a_row"] += zero.astype(np.int32)
            return new, metrics

        return step(self, slow)

    parallel.Parallel.step = hanging


def vanish(workdir: str) -> None:
    """Not amid a save: Orbax's threads would print tracebacks of their own."""
    deadline = time.time() + 60
    while not list(pathlib.Path(workdir).glob("checkpoints/*/manifest.json")):
        assert time.time() < deadline, "no checkpoint was finished"
        time.sleep(0.01)
    os.rename(workdir, workdir + ".gone")


def break_it(fault: dict, workdir: str) -> None:
    at, number = fault.get("at"), fault.get("signal", signal.SIGKILL)
    if at == "operation":
        Operations(workdir, fault["n"], number)
    elif at == "save":
        at_save(fault["n"], fault["secs"], number)
    elif at == "step":
        before_batch(fault["n"], lambda: os.kill(os.getpid(), number))
    elif at == "nan":
        not_a_number(fault["steps"])
    elif at == "hang_fetch":
        before_batch(fault["n"], lambda: hang(fault.get("signals", [])))
    elif at == "vanish":
        before_batch(fault["n"], lambda: vanish(workdir))
    elif at == "hang_step":
        hang_step(fault["n"])


# -- processes -------------------------------------------------------------------------------------


def child(job: dict, place: list[str], fault: dict) -> None:
    log = os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 99
    try:
        jax.config.update("jax_num_cpu_devices", job["devices"])
        guards.ONE_REQUEST_SECS = 0.2
        break_it(fault, job["workdir"])
        status = cli.run(train.define, train.main, [*job["argv"], *place])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def write_digest(job: dict) -> None:
    """In a process of its own, which is alone: the run's own may be one of several."""
    if not (pid := os.fork()):
        try:
            with open(job["digest"], "w") as file:
                json.dump(digest(job["workdir"]), file)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def places(job: dict) -> list[list[str]]:
    count = job.get("processes", 1)
    if count == 1:
        return [[]]
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    shared = [f"--coordinator={address}", f"--num_processes={count}", "--heartbeat_secs=10"]
    return [[*shared, f"--process_id={i}"] for i in range(count)]


def serve(job: dict) -> dict:
    fault, victim, began = job.get("fault") or {}, job.get("victim"), time.monotonic()
    running, statuses, ends = {}, {}, []
    for index, place in enumerate(places(job)):
        hit = victim in (None, index)
        if not (pid := os.fork()):
            child(job, place, fault if hit else {})
        running[pid] = index
    targets = [pid for pid, index in running.items() if victim in (None, index)]
    struck = fault.get("at") != "secs"
    while running:
        if not struck and time.monotonic() - began > fault["secs"]:
            struck = True
            for pid in set(targets) & running.keys():
                os.kill(pid, fault["signal"])
        if time.monotonic() - began > job.get("limit_secs", 120):
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                statuses[running.pop(pid)] = os.waitstatus_to_exitcode(status)
                ends.append(time.monotonic())
        # A machine that is taken away takes all of its processes.
        if job.get("together") and any(s == -signal.SIGKILL for s in statuses.values()):
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    if job.get("digest") and set(statuses.values()) == {0}:
        write_digest(job)
    return {
        "statuses": [statuses[i] for i in sorted(statuses)],
        "secs": time.monotonic() - began,
        "secs_apart": ends[-1] - ends[0],
    }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
