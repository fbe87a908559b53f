"""A disk that is full, read-only or gone: one sentence, status 2, and the checkpoint before it."""

import json
import os
import shutil
import subprocess

import pytest

from diffusion import files
from diffusion.manifest import latest_step, verify
from diffusion.writers import Jsonl


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, in memory; skipped where this user may mount none."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True).returncode

    if mount("size=64m"):
        pytest.skip("may not mount a tmpfs here; tests/test_checkpoint.py limits file sizes")
    yield folder, mount
    subprocess.run(["umount", "-l", str(folder)], check=False)


def error_of(trials, workdir) -> str:
    (error,) = [line for line in trials.log(workdir).splitlines() if line.startswith("error: ")]
    assert "Traceback" not in trials.log(workdir)
    return error


def fill(folder, leave_bytes=0):
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    (folder / "filler").write_bytes(bytes(max(free - leave_bytes, 0)))


@pytest.fixture
def begun(disk, trials):
    """A run of six steps on that disk, and the means to change the disk."""
    folder, mount = disk
    workdir = folder / "run"
    trials.log_of = lambda w, out=folder.parent: out / f"{w.name}.log"
    assert trials.run_way(workdir, "denoiser", "--config.train.steps=6") == [0]
    yield workdir, mount
    del trials.log_of


@pytest.mark.parametrize("leave_bytes", [300_000, 0])
def test_a_full_disk(leave_bytes, begun, trials, tmp_path):
    """Full when the save comes, and full from the start."""
    workdir, _ = begun
    fill(workdir.parent, leave_bytes)
    assert trials.run_way(workdir, "denoiser") == [2]
    error = error_of(trials, workdir)
    assert str(workdir) in error and "space" in error
    assert latest_step(workdir / "checkpoints") == 6
    verify(workdir / "checkpoints" / "6")
    whole_lines(workdir)
    (workdir.parent / "filler").unlink()
    digest = tmp_path / "digest"
    assert trials.run_way(workdir, "denoiser", digest=digest) == [0], trials.log(workdir)
    assert json.loads(digest.read_text()) == trials.unbroken("denoiser")


def whole_lines(workdir):
    text = (workdir / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    assert all("step" in json.loads(line) for line in text.splitlines())


def test_a_disk_that_is_read_only(begun, trials):
    workdir, mount = begun
    assert mount("remount", "ro") == 0
    assert trials.run_way(workdir, "denoiser") == [2]
    assert "ead-only" in error_of(trials, workdir) and str(workdir) in error_of(trials, workdir)
    assert latest_step(workdir / "checkpoints") == 6
    new = workdir.with_name("new")
    assert trials.run_way(new, "denoiser") == [2]
    assert str(new) in error_of(trials, new)
    assert not new.exists()


def test_a_workdir_that_vanishes(trials, tmp_path):
    """Moved away amid a run: the run ends at its next save and makes no second one there."""
    workdir = tmp_path / "run"
    fault = {"at": "vanish", "n": 5}
    assert trials.run_way(workdir, "denoiser", fault=fault) == [2]
    error = error_of(trials, workdir)
    assert "checkpoints is gone or another" in error
    assert latest_step(workdir / "checkpoints") is None
    assert latest_step(workdir.with_name("run.gone") / "checkpoints") == 3
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.move(tmp_path / "run.gone", workdir)
    assert trials.digest(workdir, "denoiser") == trials.unbroken("denoiser")


def test_metrics_on_a_full_disk_keep_whole_lines(disk):
    folder, _ = disk
    path = folder / "metrics.jsonl"
    writer = Jsonl(path)
    writer.scalars(1, {"loss": 1.0})
    fill(folder)
    with pytest.raises(OSError, match=r"metrics\.jsonl: no space for .*step"):
        for step in range(2, 1000):
            writer.scalars(step, {"loss": 1.0})
    writer.close()
    lines = path.read_text()
    assert lines.endswith("\n") and [json.loads(line)["step"] for line in lines.splitlines()]


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(disk):
    folder, _ = disk
    path = folder / "config.json"
    files.write(path, "old")
    fill(folder)
    with pytest.raises(OSError):
        files.write(path, "x" * 10**6)
    assert path.read_text() == "old"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "filler"]


def test_a_torn_line_is_mended_when_the_run_goes_on(trials, tmp_path):
    workdir = tmp_path / "run"
    assert trials.run_way(workdir, "denoiser", "--config.train.steps=6") == [0]
    path = workdir / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 7, "lo')
    assert trials.digest(workdir, "denoiser") == trials.unbroken("denoiser")
    whole_lines(workdir)
