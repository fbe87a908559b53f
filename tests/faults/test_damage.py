"""Every file of a real run's checkpoint, damaged in every way: found out, and fallen back from."""

import pathlib
import random
import shutil

import jax.numpy as jnp
import pytest

from diffusion.checkpoint import Checkpoints, restore_params
from diffusion.manifest import MANIFEST, SOUND, latest_step, newest_good


def flip(path: pathlib.Path, draw: random.Random):
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(path: pathlib.Path, draw: random.Random):
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def zero(path: pathlib.Path, draw: random.Random):
    path.write_bytes(bytes(path.stat().st_size))


def delete(path: pathlib.Path, draw: random.Random):
    path.unlink()


DAMAGES = {"one bit": flip, "truncated": truncate, "zeroed": zero, "deleted": delete}
# How often each file is damaged, in the slow half and (`ONCE`) in the quick one.
TIMES = {"one bit": 5, "truncated": 3, "zeroed": 1, "deleted": 1}
ONCE = dict.fromkeys(DAMAGES, 1)


def damage_all(trials, folder, way, times) -> dict[str, int]:
    """Damages one file of the newest step at a time: how often each way was found out."""
    workdir = folder / "run"
    trials.digest(workdir, way)
    checkpoints, draw = workdir / "checkpoints", random.Random(way)
    whole = folder / "whole"
    shutil.copytree(checkpoints, whole)
    counts = dict.fromkeys(DAMAGES, 0)
    for path in sorted(p for p in (whole / "10").rglob("*") if p.is_file()):
        for name, damage in DAMAGES.items():
            empty = not path.stat().st_size
            for _ in range(times[name] if not empty else name == "deleted"):
                shutil.rmtree(checkpoints)
                shutil.copytree(whole, checkpoints)
                damage(checkpoints / path.relative_to(whole), draw)
                assert restore_params(checkpoints, ("step",)).step == 9, (path, name)
                assert newest_good(checkpoints, None, set_aside=True) == 9, (path, name)
                unfinished = path.name == MANIFEST and name == "deleted"
                assert (checkpoints / "10.corrupt").is_dir() != unfinished
                counts[name] += 1
    return counts


def test_every_file_of_a_run_damaged_is_found_out_and_fallen_back_from(trials, tmp_path):
    counts = damage_all(trials, tmp_path, "denoiser", ONCE)
    assert all(count >= 6 for count in counts.values())
    trials.report({"damage": "denoiser", **counts})
    # With the last one damaged, the run goes on from the one before, and ends alike.
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints)
    shutil.copytree(tmp_path / "whole", checkpoints)
    flip(max((checkpoints / "10").rglob("d/*")), random.Random(0))
    assert trials.digest(tmp_path / "run", "denoiser") == trials.unbroken("denoiser")
    assert latest_step(checkpoints) == 10 and (checkpoints / "10.corrupt").is_dir()
    assert "does not hash" in trials.log(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", ["denoiser", "denoiser, fsdp", "first stage", "denoiser, two processes"]
)
def test_every_file_of_other_runs(way, trials, tmp_path):
    trials.report({"damage": way, **damage_all(trials, tmp_path, way, TIMES)})


# -- retention -------------------------------------------------------------------------------------


def save(directory, steps, metadata=None, **retention):
    with Checkpoints(directory, **retention) as checkpoints:
        for step in steps:
            checkpoints.save(step, {"w": jnp.full(3, step)}, {}, (metadata or {}).get(step, {}))


def kept(directory):
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def test_retention_counts_no_step_that_cannot_be_read(tmp_path):
    """Newer steps whose manifests are damaged would fill `keep_last`; none good would be left."""
    save(tmp_path, [1, 8, 9])
    for step in (8, 9):
        flip(tmp_path / str(step) / MANIFEST, random.Random(3))
    save(tmp_path, [2], keep_last=1)  # goes on without restoring first
    assert kept(tmp_path) == [2, 8, 9]
    assert restore_params(tmp_path, ("w",)).step == 2


def test_retention_keeps_what_was_just_written_and_the_newest_sound_one(tmp_path):
    bad = {SOUND: False}
    save(tmp_path / "a", [5], keep_last=1)
    save(tmp_path / "a", [3], keep_last=1)  # an older step, written later
    assert kept(tmp_path / "a") == [3, 5]
    save(tmp_path / "b", range(1, 7), {4: bad, 5: bad, 6: bad}, keep_last=1)
    assert kept(tmp_path / "b") == [3, 6]
    scores = {n: {"eval_loss": abs(n - 2.0), SOUND: True} for n in range(1, 7)}
    save(
        tmp_path / "c", range(1, 7), scores, keep_last=1, keep_every_steps=5, keep_best="eval_loss"
    )
    assert kept(tmp_path / "c") == [2, 5, 6]
