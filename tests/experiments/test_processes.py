"""Two and three real processes on the loopback address train as one process does.

The network is tiny and the batch is a fifth of the data, so that five steps are an epoch.
"""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from diffusion.data import prepare
from experiments.host import cluster, guards

ROOT = pathlib.Path(__file__).parents[2]
STEPS, BATCH, EXAMPLES = 8, 900, 4500
HEARTBEAT_SECS = 10

# The command, with the indices that its process read written down, and steps slow enough to hit.
DRIVER = """
import json, os, pathlib, sys, time
from diffusion.data import loader
read = loader.Loader.__next__
def spy(self):
    batch = read(self)
    with open(os.environ["SPY"], "a") as file:
        file.write(json.dumps(batch["index"].tolist()) + "\\n")
    time.sleep(600 if self.step == int(os.environ["HANG"]) else float(os.environ["PAUSE"]))
    return batch
loader.Loader.__next__ = spy
from experiments import train
from experiments.host import cli
sys.exit(cli.run(train.define, train.main, sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("data")
    prepare.prepare("captioned_digits", root)
    return root


def arguments(data, workdir, *more):
    return [
        "--config=configs/digits_classifier.py:smoke",
        *(f"--config.data.dir={data}", f"--workdir={workdir}"),
        *("--config.model.classifier.widths=(8,16,16)", "--config.model.classifier.feature_dim=64"),
        *(f"--config.train.steps={STEPS}", f"--config.train.batch_size={BATCH}"),
        *("--config.train.save_every_steps=3", "--config.optim.eps=1e-3"),
        # Small: rounding, which differs from mesh to mesh, must not grow in eight steps.
        "--config.optim.learning_rate=1e-4",
        *("--config.parallel.agree_every_steps=1", f"--config.evaluation.every_steps={STEPS}"),
        *("--config.evaluation.batch_size=125", *more),
    ]


def environment(**more):
    """One fake device a process, unless more are asked for."""
    base = {"JAX_NUM_CPU_DEVICES": "1", "PAUSE": "0", "HANG": "-1", "SPY": os.devnull}
    return {**os.environ, **base, **more}


def start(count, data, workdir, *more, spies=None, **env):
    """`count` processes of one run."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    place = [f"--coordinator={address}", f"--num_processes={count}"]
    place = [*place, f"--heartbeat_secs={HEARTBEAT_SECS}"] if count > 1 else []
    started = []
    for i in range(count):
        mine = [*place, f"--process_id={i}"] if place else []
        spied = {"SPY": str(spies / f"{i}.jsonl")} if spies else {}
        argv = [sys.executable, "-c", DRIVER, *arguments(data, workdir, *more), *mine]
        with (workdir.parent / f"{workdir.name}-{i}.log").open("a") as log:
            started.append(
                subprocess.Popen(argv, env=environment(**spied, **env), stdout=log, stderr=log)
            )
    return started


def run(count, data, workdir, *more, **options):
    """Statuses of `count` processes that are left to end by themselves."""
    return [process.wait(300) for process in start(count, data, workdir, *more, **options)]


def rows(workdir):
    path = workdir / "metrics.jsonl"
    return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


def losses(workdir):
    return {row["step"]: row["loss"] for row in rows(workdir) if "loss" in row}


def logs(workdir):
    return "".join(p.read_text() for p in sorted(workdir.parent.glob(f"{workdir.name}-*.log")))


def saved_steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def same(found, wanted):
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-6)


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """What one process does."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    assert run(1, data, workdir) == [0], logs(workdir)
    return workdir


@pytest.mark.parametrize(
    ("count", "mesh"), [(2, "--config.parallel.fsdp=2"), (3, "--config.parallel.mode=pmap")]
)
def test_processes_train_as_one_does(count, mesh, data, tmp_path, unbroken):
    spies, workdir = tmp_path / "spies", tmp_path / "run"
    spies.mkdir()
    assert run(count, data, workdir, mesh, spies=spies) == [0] * count, logs(workdir)
    same(losses(workdir), losses(unbroken))
    (found, *_), (wanted, *_) = (
        [row["eval_loss"] for row in rows(w) if "eval_loss" in row] for w in (workdir, unbroken)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    read = [[json.loads(x) for x in p.read_text().splitlines()] for p in sorted(spies.iterdir())]
    epoch = [i for process in read for step in process[: EXAMPLES // BATCH] for i in step]
    assert sorted(epoch) == list(range(EXAMPLES))  # each once, none left out
    assert all(len(step) == BATCH // count for process in read for step in process)
    assert logs(workdir).count(f"{count} processes, {count} devices") == 1  # one process speaks
    assert rows(workdir)[-2]["slowest_process"] in range(count)


def wait_for_step(workdir, step, processes):
    deadline = time.time() + 240
    while max(losses(workdir), default=0) < step:
        assert time.time() < deadline and all(p.poll() is None for p in processes), logs(workdir)
        time.sleep(0.02)


def test_a_signal_a_lost_process_and_another_number_of_processes(data, tmp_path, unbroken):
    """One run: told to stop, gone on, robbed of a process, gone on alone."""
    workdir = tmp_path / "run"
    processes = start(2, data, workdir, PAUSE="0.3")
    wait_for_step(workdir, 2, processes)
    processes[1].send_signal(signal.SIGUSR1)  # only the second is told
    assert [p.wait(60) for p in processes] == [guards.INTERRUPTED] * 2, logs(workdir)
    (agreed, *others) = [step for step in saved_steps(workdir) if step != 3]
    assert not others and agreed < STEPS
    assert max(losses(workdir)) == agreed

    processes = start(2, data, workdir, "--config.train.save_every_steps=1", PAUSE="0.3")
    wait_for_step(workdir, agreed + 1, processes)
    processes[1].kill()
    processes[1].wait()
    lost = time.monotonic()
    assert processes[0].wait(60) in (cluster.LOST_PEER, -signal.SIGABRT), logs(workdir)
    assert time.monotonic() - lost < HEARTBEAT_SECS + 10
    assert max(saved_steps(workdir)) < STEPS

    assert run(1, data, workdir) == [0], logs(workdir)
    same(losses(workdir), losses(unbroken))


def test_a_checkpoint_of_one_process_goes_on_in_two(data, tmp_path, unbroken):
    """From four devices of one process to two processes of one; from eight: tests/training."""
    workdir = tmp_path / "run"
    first = ("--config.parallel.fsdp=4", "--config.train.steps=4")
    assert run(1, data, workdir, *first, JAX_NUM_CPU_DEVICES="4") == [0], logs(workdir)
    shutil.rmtree(workdir / "checkpoints" / "3")
    assert run(2, data, workdir, "--config.parallel.fsdp=2") == [0, 0], logs(workdir)
    same(losses(workdir), losses(unbroken))


def test_a_refusal_ends_all_with_one_sentence_each(data, tmp_path):
    workdir = tmp_path / "run"
    assert run(2, data, workdir, "--config.train.batch_size=901") == [2, 2]
    assert logs(workdir).count("error: train.batch_size=901") == 1
    assert logs(workdir).count("error: process 0 could not go on") == 1
    assert not workdir.exists()


@pytest.mark.slow  # of a smaller run: tests/faults/test_hangs.py
def test_a_data_fetch_that_hangs_ends_the_run_and_it_goes_on(data, tmp_path, unbroken):
    workdir = tmp_path / "run"
    limit = "--config.watchdog.step_secs=10"
    assert run(1, data, workdir, limit, HANG="6") == [guards.HUNG], logs(workdir)
    assert "error: step 6 or its data has taken more than 10 s" in logs(workdir)
    assert "in spy" in logs(workdir)  # the stack of the thread that hung
    assert run(1, data, workdir) == [0], logs(workdir)
    same(losses(workdir), losses(unbroken))
