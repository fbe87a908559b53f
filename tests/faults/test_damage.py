"""Every file of a real run's checkpoint, damaged in every way: found out, and fallen back from."""

import pathlib
import random
import shutil

import pytest

from diffusion.checkpoint import latest_step, restore_params
from diffusion.manifest import MANIFEST, newest_good


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
TIMES = {"one bit": 5, "truncated": 3, "zeroed": 1, "deleted": 1}


def damage_all(trials, folder, way) -> dict[str, int]:
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
            for _ in range(TIMES[name] if not empty else name == "deleted"):
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
    counts = damage_all(trials, tmp_path, "denoiser")
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
@pytest.mark.parametrize("way", ["denoiser, fsdp", "first stage", "denoiser, two processes"])
def test_every_file_of_other_runs(way, trials, tmp_path):
    trials.report({"damage": way, **damage_all(trials, tmp_path, way)})
