"""A run that is killed, and the same command again: the losses of an unbroken run, to the bit."""

import json
import signal
import subprocess
import sys
import time

import pytest

from experiments import train


def command(job, workdir, *more):
    return [
        sys.executable,
        *("-m", "experiments.train", "--config=configs/digits_pixel.py:smoke"),
        *(f"--config.data.dir={job}/data", f"--workdir={workdir}"),
        *("--config.model.denoiser.multipliers=(1,)", "--config.model.denoiser.attention=(False,)"),
        *("--config.train.steps=8", "--config.train.save_every_steps=2", *more),
    ]


def losses(workdir):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def start_and_wait_for_step(argv, workdir, step):
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 240
    while time.time() < deadline and process.poll() is None:
        if (workdir / "metrics.jsonl").exists() and max(losses(workdir), default=0) >= step:
            return process
        time.sleep(0.005)
    process.kill()
    pytest.fail(f"no step {step} within the time; exit status {process.poll()}")


@pytest.fixture(scope="module")
def unbroken(job, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    subprocess.run(command(job, workdir), check=True, capture_output=True)
    return losses(workdir)


def test_killed_and_resumed(job, tmp_path, unbroken):
    workdir = tmp_path / "run"
    process = start_and_wait_for_step(command(job, workdir), workdir, 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command(job, workdir), check=True, capture_output=True)
    assert losses(workdir) == unbroken
    assert len(set(unbroken.values())) == 8


@pytest.mark.slow  # three signals of a smaller run: tests/faults/test_signals.py
def test_sigterm_saves_and_says_to_run_again(job, tmp_path, unbroken):
    workdir = tmp_path / "run"
    argv = command(job, workdir, "--config.train.save_every_steps=1000")
    process = start_and_wait_for_step(argv, workdir, 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) in (train.INTERRUPTED, 0)  # 0: it was at the last step already
    saved = [p.name for p in (workdir / "checkpoints").iterdir()]
    assert any(name.isdigit() for name in saved)
    subprocess.run(argv, check=True, capture_output=True)
    assert losses(workdir) == unbroken
