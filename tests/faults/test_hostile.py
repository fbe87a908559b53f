"""Hostile configs, captions, images and weights: no traceback, no hang, nothing half-written.

What is asserted of each input, and how inputs are made: `hostile.py`, run in a process of its own
without the suite's type checks, which the commands do not have either.
"""

import json
import os
import pathlib
import subprocess
import sys
import time
import zlib

import pytest

from diffusion.data.builders.local_files import folders

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["overrides", "captions", "images", "weights"])
def test_hostile_inputs(kind, count, trials, tmp_path):
    began = time.monotonic()
    script = str(pathlib.Path(__file__).with_name("hostile.py"))
    done = subprocess.run(
        [sys.executable, script, kind, str(count), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["inputs"] == count
    assert 0 < found["accepted"] < count, "both must occur, or the inputs are no test"
    trials.report({"fuzz": kind, **found, "secs": round(time.monotonic() - began, 1)})


@pytest.mark.parametrize(
    "name", ["../outside.png", "a/../../outside.png", "..\\outside.png", "{folder}/outside.png"]
)
def test_metadata_cannot_leave_its_folder(name, tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "images"):
        (folder / "outside.png").write_bytes(b"secret")
    line = {"file_name": name.format(folder=tmp_path), "text": "a fox"}
    (tmp_path / "images" / "metadata.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1, .*is outside its folder"):
        folders.list_folder(tmp_path / "images")


@pytest.mark.parametrize("side", [8_200, 60_000])
def test_an_image_of_absurd_size_is_refused_by_its_header(side, tmp_path):
    """Nothing is decoded of 10 GB, nor of a whole image that is a little over the bound."""
    from diffusion.data import folder, images

    assert side**2 > images.MAX_PIXELS > 8_190**2
    rows = zlib.compress(bytes(1 + side // 8) * side) if side == 8_200 else b"x"
    header = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", side.to_bytes(4) * 2 + b"\x01\0\0\0\0")
    (tmp_path / "0.png").write_bytes(header + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match=r"0\.png is no image \(.*pixels.*max_bad_images"):
        folder.open_folder(tmp_path, "train", 8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)
