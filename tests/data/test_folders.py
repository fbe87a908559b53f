"""What lies in a folder of images: what is read as ImageFolder reads it, and what is left out."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from diffusion.data import folder
from diffusion.data.builders.local_files import folders, readers


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)


def names(rows):
    return [row["path"].name for row in rows]


def test_hidden_things_are_no_class_and_no_image(tmp_path, capsys):
    for name in ("cat", "dog", ".ipynb_checkpoints", "__MACOSX"):
        picture(tmp_path / name / "a.png")
    picture(tmp_path / "cat" / "._a.png")
    rows = folders.list_folder(tmp_path)["train"]
    assert [row["label"] for row in rows] == ["cat", "dog"]
    assert capsys.readouterr().out.endswith(
        ": 2 images (2 train); 2 classes: cat, dog; nothing left out\n"
    )
    source = folder.open_folder(tmp_path, "train", 8)
    assert source.batch(np.arange(2))["label"].tolist() == [0, 1]


def test_every_suffix_of_a_picture_is_read_and_the_rest_is_counted(tmp_path, capsys):
    for suffix in ("png", "jpg", "jfif", "gif", "tif", "webp", "bmp", "avif"):
        path = tmp_path / f"{suffix}.{suffix}"
        image = Image.new("RGB", (8, 8), (9, 9, 9))
        image.save(path, "JPEG" if suffix == "jfif" else None)
    for name in ("a.heic", "b.heic", "notes.md"):
        (tmp_path / name).write_text("x")
    source = folder.open_folder(tmp_path, "train", 8)
    assert len(source) == 8
    assert "left out: 2 .heic, 1 .md" in capsys.readouterr().out


def test_images_beside_the_splits_are_told(tmp_path, capsys):
    picture(tmp_path / "train" / "a.png")
    picture(tmp_path / "val" / "b.png")
    picture(tmp_path / "stray.png")
    listed = folders.list_folder(tmp_path)
    assert {k: names(v) for k, v in listed.items()} == {"train": ["a.png"], "validation": ["b.png"]}
    assert "1 images beside the splits, such as stray.png" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path, suffix):
    picture(tmp_path / "a.png")
    (tmp_path / f"a{suffix}").write_bytes(b"\xef\xbb\xbfa fox\n")
    assert folders.list_folder(tmp_path)["train"][0]["caption"] == "a fox"


ROWS = [{"file_name": "train/a.png", "text": "a, fox"}, {"file_name": "train/b.png", "text": "b"}]


def write_metadata(path, rows):
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(f'"{v}"' for v in row.values()) for row in rows)]
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    else:
        path.write_bytes(b"\xef\xbb\xbf" + "\n".join(map(json.dumps, rows)).encode())


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
@pytest.mark.parametrize("place", ["root", "split"])
def test_captions_of_metadata(tmp_path, kind, column, place, capsys):
    for name in "abc":
        picture(tmp_path / "train" / f"{name}.png")
    home = tmp_path if place == "root" else tmp_path / "train"
    rows = [
        {"file_name": str((tmp_path / row["file_name"]).relative_to(home)), column: row["text"]}
        for row in ROWS
    ]
    write_metadata(home / f"metadata.{kind}", rows)
    listed = folders.list_folder(tmp_path)["train"]
    assert [row["caption"] for row in listed] == ["a, fox", "b"]
    said = capsys.readouterr().out
    assert "2 captions" in said and "1 images that the metadata does not name, such as c" in said


def test_what_is_wrong_with_metadata_is_said(tmp_path):
    picture(tmp_path / "a.png")
    write_metadata(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "title": "a fox"}])
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1, .*which has file_name, title"):
        folders.list_folder(tmp_path)
    write_metadata(tmp_path / "metadata.jsonl", [{"file_name": "b.png", "text": "a fox"}])
    with pytest.raises(ValueError, match=r"b\.png does not exist"):
        folders.list_folder(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"metadata\.parquet is no parquet file"):
        folders.list_folder(tmp_path)


def test_a_split_without_captions_beside_one_with_is_refused(tmp_path):
    picture(tmp_path / "train" / "a.png")
    picture(tmp_path / "test" / "b.png")
    write_metadata(tmp_path / "train" / "metadata.csv", [{"file_name": "a.png", "text": "x"}])
    with pytest.raises(ValueError, match="give all or none"):
        folders.list_folder(tmp_path)


def test_what_is_stored_is_upright_when_it_is_read(tmp_path):
    """A JPEG is stored as it is, orientation and all; all that it says is honoured later."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    (example,) = readers.read_folder(tmp_path).splits["train"]()
    assert example["image"] == (tmp_path / "a.jpg").read_bytes()
    from diffusion.data import images

    assert images.decode_image(example["image"], 3, None).shape == (8, 4, 3)


def test_a_class_has_one_number_whatever_is_read(tmp_path):
    """As Hugging Face's: of all splits together, and with those whose pictures are broken."""
    for name in ("train/ant", "train/bee", "train/cat", "dev/bee"):
        picture(tmp_path / name / "a.png")
    assert folder.open_folder(tmp_path, "validation", 8).rows[0]["label"] == 1
    (tmp_path / "train/ant/a.png").write_bytes(b"x")
    found = folder.open_folder(tmp_path, "train", 8, max_bad_images=1)
    assert [row["label"] for row in found.rows] == [1, 2]


def test_links_to_folders_are_followed_and_not_in_circles(tmp_path):
    picture(tmp_path / "elsewhere" / "a.png")
    for name in ("bee", "ant"):
        picture(tmp_path / "set" / name / "a.png")
    (tmp_path / "set" / "aaa").symlink_to(tmp_path / "elsewhere")
    rows = folders.list_folder(tmp_path / "set")["train"]
    assert [row["label"] for row in rows] == ["aaa", "ant", "bee"]
    (tmp_path / "set" / "bee" / "up").symlink_to(tmp_path / "set")
    with pytest.raises(ValueError, match="bee/up leads back"):
        folders.list_folder(tmp_path / "set")
    (tmp_path / "set" / "bee" / "up").unlink()
    (tmp_path / "set" / "bee" / "to").symlink_to(tmp_path / "set" / "ant")  # twice, and no circle
    assert len(folders.list_folder(tmp_path / "set")["train"]) == 4
    (tmp_path / "set" / "ant" / "fro").symlink_to(tmp_path / "set" / "bee")
    with pytest.raises(ValueError, match=r"(ant/fro/to|bee/to/fro) leads back"):
        folders.list_folder(tmp_path / "set")
    for link in ("ant/fro", "bee/to"):
        (tmp_path / "set" / link).unlink()
    (tmp_path / "set" / "bee" / "b.png").symlink_to("nowhere.png")
    with pytest.raises(ValueError, match=r"b\.png is no image"):
        folder.open_folder(tmp_path / "set", "train", 8)


def test_every_caption_of_a_picture_is_an_example(tmp_path, capsys):
    picture(tmp_path / "train" / "a.png")
    rows = [{"file_name": "a.png", "text": text} for text in ("a fox", "", "a fox")]
    write_metadata(tmp_path / "train" / "metadata.csv", rows)
    write_metadata(tmp_path / "metadata.jsonl", [{"file_name": "train/a.png", "text": "a fox"}])
    listed = folders.list_folder(tmp_path)["train"]
    assert [row["caption"] for row in listed] == ["a fox", ""]  # not twice what is said twice
    assert "1 images (1 train); 2 captions, 1 of them empty; noth" in capsys.readouterr().out
    source = folder.open_folder(tmp_path, "train", 8)
    assert (len(source), source.provenance["images"]) == (2, 1)
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\na.png,red, a fox\n")
    with pytest.raises(ValueError, match=r"metadata\.csv, line 2, .*quote commas"):
        folders.list_folder(tmp_path)


def test_links_that_lead_nowhere_are_told_and_metadata_is_refused(tmp_path, capsys):
    picture(tmp_path / "a.png")
    for name in ("a.txt", "train"):
        (tmp_path / name).symlink_to("gone")
    assert folders.list_folder(tmp_path)["train"] == [{"path": tmp_path / "a.png"}]
    said = capsys.readouterr().out
    assert said.endswith("; left out: 2 links that lead nowhere, such as a.txt\n")
    for name in ("metadata.jsonl", "metadata.parquet"):
        (tmp_path / name).symlink_to("gone")
        with pytest.raises(ValueError, match=f"{name} is a link that leads nowhere: mend"):
            folders.list_folder(tmp_path)
        (tmp_path / name).unlink()


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    for name in ("ant", "bee"):
        picture(tmp_path / name / "a.png")
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(ValueError, match=r"bee is a folder that cannot be read \(Permission den"):
        folders.list_folder(tmp_path)
