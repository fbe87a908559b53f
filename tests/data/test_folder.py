"""A user's folder of images: captions, files that are no image, broken metadata."""

import json

import numpy as np
import pytest
from PIL import Image

from diffusion.data import folder, loader, transforms


def picture(path, size=(10, 8), value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, 3), value, np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def captioned(tmp_path):
    """Six images with metadata.jsonl, two of them no image."""
    for i in range(6):
        picture(tmp_path / f"{i}.png", value=40 * i)
    (tmp_path / "1.png").write_text("no image")
    whole = (tmp_path / "4.png").read_bytes()
    (tmp_path / "4.png").write_bytes(whole[: len(whole) // 2])
    rows = [{"file_name": f"{i}.png", "text": f"number {i}"} for i in range(6)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_images_that_are_none_are_counted_named_and_skipped(captioned, caplog, capsys):
    source = folder.open_folder(captioned, "train", 8, 3, max_bad_images=2)
    assert [path.name for path in source.bad] == ["1.png", "4.png"]
    assert "1.png" in caplog.text and "4.png" in caplog.text
    assert "2 of 6" in capsys.readouterr().out
    batch = source.batch(np.arange(4))
    assert batch["caption"] == source.captions == [f"number {i}" for i in (0, 2, 3, 5)]
    assert batch["image"].shape == (4, 8, 8, 3)
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 80, 120, 200]


def test_more_than_the_limit_is_an_error(captioned):
    with pytest.raises(ValueError, match=r"1\.png is no image.*max_bad_images=1"):
        folder.open_folder(captioned, "train", 8, 3, max_bad_images=1)


def test_files_are_counted_and_not_their_captions(tmp_path, capsys):
    (tmp_path / "a.png").write_text("no image")
    rows = [{"file_name": f"{name}.png", "text": text} for name in "ab" for text in ("x", "y")]
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    with pytest.raises(ValueError, match="holds no file that is an image"):
        folder.open_folder(tmp_path, "train", 8, max_bad_images=5)
    picture(tmp_path / "b.png")
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = folder.open_folder(tmp_path, "train", 8, max_bad_images=1)
    assert source.captions == ["x", "y"] and source.provenance["images"] == 1
    assert "note: 1 of 2 files are no image" in capsys.readouterr().out


def test_a_broken_line_is_named(captioned):
    lines = (captioned / "metadata.jsonl").read_text().splitlines()
    (captioned / "metadata.jsonl").write_text("\n".join([*lines[:2], '{"file_name": "2.png"']))
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 3"):
        folder.open_folder(captioned, "train", 8)


def test_captions_beside_the_images_and_splits(tmp_path):
    for split in ("train", "validation"):
        picture(tmp_path / split / "a.png", value=9)
        (tmp_path / split / "a.txt").write_text(f"of {split}\n")
    source = folder.open_folder(tmp_path, "validation", 8)
    assert source.captions == ["of validation"]
    with pytest.raises(ValueError, match="'test'"):
        folder.open_folder(tmp_path, "test", 8)
    with pytest.raises(ValueError, match="nowhere"):
        folder.open_folder(tmp_path / "nowhere", "train", 8)


def test_it_serves_batches_with_edges(tmp_path):
    for i, name in enumerate(("cat", "dog")):
        picture(tmp_path / name / "a.png", value=100 * i)
    source = folder.open_folder(tmp_path, "train", 8)
    (batch,) = loader.one_pass(source, 2, [transforms.Edges()])
    assert batch["label"].tolist() == [0, 1] and source.captions is None
    assert batch["hint"].shape == (2, 8, 8, 3) and not batch["hint"].any()


def test_edges_lie_where_the_colour_changes():
    image = np.zeros((1, 8, 8, 3), np.uint8)
    image[:, :, 4:, 1] = 200
    found = transforms.edges(image)[0, :, :, 0]
    assert (found[:, 3:5] == 255).all() and not found[:, :3].any() and not found[:, 5:].any()
    assert not transforms.edges(image // 4).any()  # too faint


def test_recoloured_digits_are_every_other_picture():
    from diffusion.data.builders.captioned_digits import compose

    digits = np.zeros((4, 28, 28), np.uint8)
    digits[:, 4:24, 12:16] = 255
    made = transforms.ComposeDigits(compose.Glyphs.of(digits), seed=0)
    batch = {"label": np.zeros(4, int), "index": np.arange(4), "epoch": np.zeros(4, int)}
    plain = made(batch)
    changed = transforms.RecolourDigits(made, "yellow")(batch)
    assert [("yellow" in text) for text in changed["caption"]] == [True, False, True, False]
    np.testing.assert_array_equal(changed["image"][1::2], plain["image"][1::2])
    yellow = (changed["image"] == compose.NEW_COLOURS["yellow"]).all(-1)
    assert yellow[0].any() and yellow[2].any() and not yellow[1].any()
    with pytest.raises(ValueError, match="pink"):
        transforms.RecolourDigits(made, "pink")(batch)
