"""SIGTERM, SIGINT and SIGUSR1 at any moment: saved at an agreed step, status 75, and gone on."""

import json
import random
import signal

import pytest

from diffusion.manifest import latest_step, verify
from experiments.host import guards

NUMBERS = [int(number) for number in guards.SIGNALS]


def moment(draw: random.Random) -> dict:
    kind = draw.choices(("step", "operation", "save", "secs"), (30, 30, 20, 20))[0]
    found = {"at": kind, "signal": draw.choice(NUMBERS)}
    if kind == "step":
        return found | {"n": draw.randint(1, 10)}
    if kind == "operation":
        return found | {"n": draw.randint(1, 60)}
    if kind == "save":
        return found | {"n": draw.randint(1, 3), "secs": draw.uniform(0, 0.2)}
    return found | {"secs": draw.uniform(0.5, 3)}


def check(trials, workdir, way, fault, victim) -> bool:
    """One signal: whether it came before the run was done."""
    statuses = trials.run_way(workdir, way, fault=fault, victim=victim)
    if set(statuses) == {0}:  # the moment came after the last step
        return False
    assert set(statuses) == {guards.INTERRUPTED}, (fault, statuses, trials.log(workdir))
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    logged = max((json.loads(line)["step"] for line in lines), default=None)
    saved = latest_step(workdir / "checkpoints")
    assert saved == logged, "what was done is what was saved"
    if saved is not None:
        verify(workdir / "checkpoints" / str(saved))
    assert {k: v for k, v in trials.digest(workdir, way).items()} == trials.unbroken(way)
    return True


def test_a_signal_saves_and_the_command_goes_on(trials, tmp_path):
    fault = {"at": "step", "n": 5, "signal": signal.SIGUSR1}
    assert check(trials, tmp_path / "run", "denoiser", fault, None)


def test_a_signal_before_the_first_step_ends_with_the_same_status(trials, tmp_path):
    fault = {"at": "operation", "n": 2, "signal": signal.SIGINT}  # the config is being written
    assert check(trials, tmp_path / "run", "denoiser", fault, None)
    assert "Traceback" not in trials.log(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("way", "count"), [("denoiser", 38), ("denoiser, three processes", 12)])
def test_fifty_signals(way, count, trials, tmp_path):
    draw = random.Random(f"signals of {way}")
    done = tries = 0
    while done < count:
        tries += 1
        assert tries < 3 * count
        fault = moment(draw)
        victim = None if way == "denoiser" or fault["at"] == "secs" else draw.randrange(3)
        done += check(trials, tmp_path / f"run-{tries}", way, fault, victim)
    trials.report({"signals": way, "saved and gone on": done, "too late to matter": tries - done})


def test_a_second_signal_ends_at_once_and_the_last_checkpoint_stays(trials, tmp_path):
    """The first one comes while step 8 reads its data, which never ends; so does the second."""
    workdir = tmp_path / "run"
    fault = {"at": "hang_fetch", "n": 8, "signals": [signal.SIGTERM, signal.SIGTERM]}
    assert trials.run_way(workdir, "denoiser", fault=fault) == [-signal.SIGTERM]
    assert latest_step(workdir / "checkpoints") == 6
    assert trials.digest(workdir, "denoiser") == trials.unbroken("denoiser")
