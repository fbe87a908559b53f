"""A step, a fetch of data or a peer that is gone ends the run within its limit, and it goes on."""

import signal

import pytest

from experiments.host import cluster, guards

LIMIT = 6.0  # seconds: more than this run's compilation takes


@pytest.mark.parametrize("at", ["hang_step", "hang_fetch"])
def test_a_hang_ends_within_the_limit_and_goes_on(at, trials, tmp_path):
    workdir, wanted = tmp_path / "run", trials.unbroken("denoiser")
    limits = [f"--config.watchdog.step_secs={LIMIT}"]
    fault = {"at": at, "n": 8}
    assert trials.run_way(workdir, "denoiser", *limits, fault=fault) == [guards.HUNG]
    assert trials.secs < 25 + LIMIT, "the start, and the limit"
    assert "has taken more than 6 s" in trials.log(workdir)
    assert "Thread 0x" in trials.log(workdir) and "driver.py" in trials.log(workdir)  # the stacks
    assert trials.digest(workdir, "denoiser") == wanted


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_peer_ends_the_other_and_both_go_on(victim, trials, tmp_path):
    workdir, way = tmp_path / "run", "denoiser, two processes"
    wanted = trials.unbroken(way)
    fault = {"at": "step", "n": 6, "signal": signal.SIGKILL}
    statuses = trials.run_way(workdir, way, fault=fault, victim=victim)
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[1 - victim] in (cluster.LOST_PEER, -signal.SIGABRT), trials.log(workdir)
    after = trials.secs_apart
    assert after < 25, "the heartbeat's 10 s, and what noticing and ending take"
    assert trials.digest(workdir, way) == wanted
    trials.report({"killed peer": victim, "secs_after": after, "status": statuses[1 - victim]})
