"""Runs that are killed with SIGKILL, again and again, end with the state of an unbroken one."""

import pathlib
import random
import re
import runpy
import shutil
import signal

import pytest

from experiments.run import workdir as workdirs

# Kills of each kind in the slow half, 100 together; a run is killed up to four times.
KILLS = {
    "denoiser": 60,
    "denoiser, fsdp": 10,
    "denoiser, two processes": 10,
    "first stage": 14,
    "first stage, two devices, accumulated": 6,
}


def moment(draw: random.Random) -> dict:
    """Four in five within a save: before one of its file operations, or some time after it began
    (what its C++ threads write is no operation that Python sees)."""
    kind = draw.choices(("operation", "save", "secs"), (40, 40, 20))[0]
    found = {"at": kind, "signal": signal.SIGKILL}
    if kind == "operation":
        return found | {"n": draw.randint(1, 40)}  # a save has about 20
    if kind == "save":
        return found | {"n": draw.randint(1, 2), "secs": draw.uniform(0, 0.2)}
    return found | {"secs": draw.uniform(0.2, 3.5)}


class Kills:
    """Counts what was done, for the results."""

    def __init__(self, trials, folder):
        self.trials, self.folder = trials, folder
        self.kills, self.moments, self.runs = 0, {}, 0

    def until_done(self, name: str, draw: random.Random, at_most: int) -> tuple[int, dict]:
        """Kills one run up to `at_most` times; (how often, what it ended with)."""
        workdir, kills = self.folder / f"killed-{self.runs}", 0
        for _ in range(at_most):
            fault = moment(draw)
            # With several processes the machine is taken away: all die as soon as one did.
            more = {"fault": fault, "victim": 0, "together": True}
            statuses = self.trials.run_way(workdir, name, **more)
            if set(statuses) == {0}:  # it was done before the moment came
                break
            assert set(statuses) == {-signal.SIGKILL}, self.trials.log(workdir)
            kills += 1
            self.moments[fault["at"]] = self.moments.get(fault["at"], 0) + 1
        digest = self.trials.digest(workdir, name)
        self.runs += 1
        self.kills += kills
        assert leftovers(workdir) == [], workdir
        shutil.rmtree(workdir)
        return kills, digest


def leftovers(workdir: pathlib.Path) -> list[str]:
    """What no run needs. A first step that was killed before its manifest stays, set aside."""
    names = [p.name for p in (workdir / "checkpoints").iterdir() if not p.name.isdigit()]
    names = [name for name in names if ".unfinished" not in name]
    hidden = [p.name for p in workdir.rglob(".*") if not p.name.startswith(".manifest.json")]
    return names + hidden


def test_a_run_killed_in_its_saves_ends_as_an_unbroken_one(trials, tmp_path):
    wanted, kills = trials.unbroken("denoiser"), Kills(trials, tmp_path)
    draw = random.Random(8)
    while kills.kills < 4:
        _, found = kills.until_done("denoiser", draw, at_most=2)
        assert found == wanted


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_a_hundred_kills(name, trials, tmp_path):
    """`KILLS[name]` of them; where RELIABILITY names a file, the counts go there."""
    wanted, kills = trials.unbroken(name), Kills(trials, tmp_path)
    draw = random.Random(f"kills of {name}")
    while kills.kills < KILLS[name]:
        _, found = kills.until_done(name, draw, at_most=min(4, KILLS[name] - kills.kills))
        assert found == wanted
    counts = {"kills": kills.kills, "runs": kills.runs, "moments": kills.moments, "equal": True}
    trials.report({"way": name, **counts})


def test_a_kill_amid_the_first_files_leaves_a_run_that_goes_on(trials, tmp_path):
    """Before every other of the first file operations: what is found then is never refused."""
    config = runpy.run_path(f"{trials.here}/tiny.py")["get_config"]("denoiser").lock()
    seen = set()
    for n in range(1, 15, 2):
        directory = tmp_path / f"run-{n}"
        fault = {"at": "operation", "n": n, "signal": signal.SIGKILL}
        assert trials.run_way(directory, "denoiser", fault=fault) == [-signal.SIGKILL]
        names = [p.name for p in directory.glob("*")]
        seen.add(tuple(sorted(re.sub(r"\w{8}\.partial", "partial", name) for name in names)))
        workdirs.check(directory, config)  # raises where the folder is refused
    assert len(seen) >= 5
