"""WebDataset's tars: read where they lie as the same files unpacked, or refused by name."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from diffusion.data import folder, prepare, sources
from diffusion.data.builders.local_files import folders


def png(value, suffix="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, suffix)
    return file.getvalue()


def write(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


CAPTIONED = [
    ("000.png", png(10)),
    ("000.txt", b"\xef\xbb\xbfa fox\n"),
    ("000.json", json.dumps({"caption": "not this", "width": 8}).encode()),
    ("._000.png", b"rubbish"),
    ("b/001.v2.jpg", png(20, "JPEG")),
    ("b/001.JPG", png(30, "JPEG")),
    ("b/001.json", json.dumps({"text": "the sea"}).encode()),
]


def test_shards_are_read_as_they_lie(tmp_path, capsys):
    write(tmp_path / "train-000.tar", CAPTIONED)
    write(tmp_path / "train-001.tar", [("9.webp", png(40, "WEBP")), ("9.txt", b"a dog")])
    write(tmp_path / "val/0.tar", [("7.png", png(50)), ("7.txt", b"a cat")])
    source = folder.open_folder(tmp_path, "train", 8)
    batch = source.batch(np.arange(3))
    assert batch["caption"] == source.captions == ["a fox", "the sea", "a dog"]
    assert batch["image"][:, 4, 4, 0].tolist() == pytest.approx([10, 30, 40], abs=2)
    said = capsys.readouterr().out
    assert "4 images (3 train, 1 validation); 4 captions; left out: 1 .jpg" in said
    assert len(folder.open_folder(tmp_path, "validation", 8)) == 1
    other = folder.open_folder(tmp_path, "train", 8).provenance["sha256"]
    assert other == source.provenance["sha256"]
    write(tmp_path / "train-001.tar", [("9.webp", png(40, "WEBP")), ("9.txt", b"a god")])
    assert folder.open_folder(tmp_path, "train", 8).provenance["sha256"] != other


def test_classes_are_the_numbers_that_are_written(tmp_path):
    write(tmp_path / "0.tar", [("0.png", png(1)), ("0.cls", b"2\n"), ("1.png", png(2))][:2])
    source = folder.open_folder(tmp_path, "train", 8)
    assert source.batch(np.arange(1))["label"].tolist() == [2]
    assert source.classes == 3
    made = prepare.prepare("tars", str(tmp_path / "out"), str(tmp_path))
    batch = sources.open_source("tars", str(tmp_path / "out"), "train").batch(np.arange(1))
    assert batch["label"].tolist() == [2] and made


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("0.txt", b"a")], ("0 has 0 pictures",)),
        ([("0.png", png(1)), ("0.jpg", png(1, "JPEG"))], ("0 has 2 pictures",)),
        ([("0.png", png(1)), ("0.png", png(1))], ("0.png is there twice",)),
        ([("0.png", png(1)), ("1.png", png(1)), ("0.txt", b"a")], ("0 do not stand beside",)),
        ([("0.png", png(1)), ("0.txt", b"\xff\xfe")], ("0.txt", "utf-8")),
        ([("0.png", png(1)), ("0.json", b"[1]")], ("0.json", "no object")),
        ([("0.png", png(1)), ("0.json", b"{")], ("0.json",)),
        ([("0.png", png(1)), ("0.json", b'{"text": 3}')], ("0.json", "no string")),
        ([("0.png", png(1)), ("0.cls", b"-1")], ("0.cls", "no whole number")),
        ([("0.png", png(1)), ("0.txt", b"a"), ("1.png", png(1))], ("captions", "none")),
        ([("0.png", b"no image")], ("0.png is no image",)),
        ([("png", png(1))], ("png has no name",)),
        ([], ("holds no example",)),
    ],
)
def test_what_is_no_shard_is_named(tmp_path, members, words):
    write(tmp_path / "0.tar", members)
    with pytest.raises(ValueError) as refused:
        folder.open_folder(tmp_path, "train", 8)
    assert all(word in str(refused.value) for word in words), refused.value
    assert str(tmp_path) in str(refused.value)


def test_broken_tars_and_those_beside_images(tmp_path, capsys):
    whole = write(tmp_path / "0.tar", CAPTIONED).read_bytes()
    second = whole.index(b"ustar", 1024) - 257  # where another header begins
    flipped = bytearray(whole)
    flipped[second] ^= 1
    for data in (
        whole[:700],
        whole[:second],
        whole[: second + 100],
        bytes(flipped),
        whole + whole,
        b"no tar at all" * 99,
    ):
        (tmp_path / "0.tar").write_bytes(data)
        with pytest.raises(ValueError, match=r"0\.tar.*no whole, uncompressed tar"):
            folders.list_folder(tmp_path)
    write(tmp_path / "0.tar", CAPTIONED, "w:gz")
    with pytest.raises(ValueError, match=r"0\.tar.*uncompressed"):
        folders.list_folder(tmp_path)
    (tmp_path / "a.png").write_bytes(png(1))
    assert len(folders.list_folder(tmp_path)["train"]) == 1
    assert "left out: 1 .tar" in capsys.readouterr().out


@pytest.mark.parametrize(
    "names",
    [
        ("imagenet-train-0000.tar", "imagenet-validation-00.tar"),
        ("train-0.tar", "valid-0.tar"),
        ("data/train/0.tar", "data/val/0.tar"),
    ],
)
def test_any_word_of_a_name_says_the_split(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, CAPTIONED)
    counts = {split: len(rows) for split, rows in folders.list_folder(tmp_path).items()}
    assert counts["train"] == counts["validation"] > 0


def test_a_name_of_two_splits_is_refused(tmp_path):
    write(tmp_path / "train-of-test.tar", CAPTIONED)
    with pytest.raises(ValueError, match="names the splits test and train: rename it"):
        folders.list_folder(tmp_path)
