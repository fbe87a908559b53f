"""Random folders of images, for `test_generated_files.py`, as `generated_kinds.py`'s kinds are."""

import json

import numpy as np
from PIL import Image

from diffusion.data import folder as folders

LOSSLESS = {"quality": 100, "lossless": True}
WAYS = {
    ".png": ("RGB", "L", "P", "turned", "deep", "opaque", "RGB", "moving", "clear"),
    ".jpg": ("RGB", "L", "CMYK", "YCbCr", "turned"),
    ".webp": ("RGB", "turned", "opaque", "RGB", "RGB", "moving", "clear"),
    ".bmp": ("RGB", "L", "P"),
    ".tif": ("RGB", "L", "P", "CMYK", "turned", "deep", "RGB", "float", "moving"),
    ".gif": ("RGB", "L", "P", "L", "RGB", "moving"),
}


def _saved(draw, path, level, ways):
    """A picture whose upper half is of `level` and lower of 100 more, in one of the ways to write
    it: (size, whether it is refused)."""
    size = (2 * draw.randrange(1, 8),) * 2
    grey = np.full(size[::-1], level, np.uint8)
    grey[size[0] // 2 :] += 100
    image = Image.fromarray(grey)
    way = draw.choice(ways)
    if way == "turned":
        image = image.transpose(Image.Transpose.ROTATE_180)
        exif = image.getexif()
        exif[0x0112] = 3
        image.convert("RGB").save(path, exif=exif, **LOSSLESS)
    elif way == "deep":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    elif way == "moving":
        image.save(path, save_all=True, append_images=[Image.fromarray(255 - grey)])
    elif way == "float":
        Image.fromarray(grey.astype(np.float32)).save(path)
    elif way == "clear":
        Image.fromarray(np.stack([*[grey] * 3, 200 - 0 * grey], -1)).save(path, **LOSSLESS)
    elif way == "opaque":
        Image.fromarray(np.stack([*[grey] * 3, 255 + 0 * grey], -1)).save(path, **LOSSLESS)
    else:
        image.convert(way).save(path, **LOSSLESS)
    return way in BAD


BAD = ("moving", "float", "clear")


def images(draw, folder, change):
    """Pictures whose number, pixels, captions and classes are known as they are written."""
    kind = draw.choice(("plain", "classes", "txt", "jsonl", "csv"))
    root = folder / draw.choice((".", "train", "training"))
    wanted, suffix, bad = [], draw.choice(sorted(WAYS)), False
    for i in range(draw.randrange(1, 5)):
        inside = f"{'cab'[i % 3]}/" if kind == "classes" else draw.choice(("", "b/"))
        path = root / inside / f"{i}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        ways = [way for way in WAYS[suffix] if i == 0 or way not in BAD]
        bad |= _saved(draw, path, 20 * i, ways)
        more = draw.choice(('"ö"', "two\nlines", "", "{}", "a; b, c"))
        wanted.append((path, inside[:1] if kind == "classes" else f"caption {i}, {more}".strip()))
    _captioned(draw, root, kind, wanted)
    if draw.random() < 0.3:
        (root / ".ipynb_checkpoints").mkdir()
        Image.new("RGB", (4, 4)).save(root / ".ipynb_checkpoints/a.png")
    if (root / "b").is_dir() and draw.random() < 0.3:  # a folder that lies elsewhere
        (root / "b").rename(folder.parent / f"{folder.name}_b")
        (root / "b").symlink_to(folder.parent / f"{folder.name}_b")
    spoilt = _spoilt_images(draw, root, kind, wanted) if change else None
    said = f"{kind}{suffix} of {len(wanted)} in {root.name}, bad: {bad}, changed: {spoilt}"
    try:
        source = folders.open_folder(folder, "train", 8)
    except ValueError as error:
        assert change or bad, f"{said}: {error}"
        assert str(folder) in str(error), f"{said}: {error}"
        return "refused"
    except Exception as error:
        raise AssertionError(f"{said}: {type(error).__name__}: {error}") from error
    assert not bad and spoilt in ("a strange file", None), f"{said}: taken"
    assert len(source) == len(wanted), said
    by = {row["path"]: i for i, row in enumerate(source.rows)}
    classes = sorted({label for _, label in wanted})
    for i, (path, text) in enumerate(wanted):
        row, pixels = source.rows[by[path]], source.batch(np.array([by[path]]))["image"][0]
        edges = [int(edge.mean()) - 20 * i for edge in (pixels[0], pixels[-1])]
        assert np.abs(np.subtract(edges, (0, 100))).max() < 12, f"{said}: {path.name} {edges}"
        found = row.get("label", row.get("caption"))
        if kind != "plain":
            assert found == (classes.index(text) if kind == "classes" else text), said
    return "same"


def _captioned(draw, root, kind, wanted):
    """Captions beside the pictures or in a table, maybe after a byte-order mark."""
    mark, end = draw.choice(("", "\ufeff")), draw.choice(("\n", "\r\n"))
    if kind == "txt":
        for path, text in wanted:
            path.with_suffix(".txt").write_text(f"{mark}{text}{draw.choice(('', end))}", "utf-8")
    names = [{"file_name": p.relative_to(root).as_posix(), "text": t} for p, t in wanted]
    if kind == "jsonl":
        lines = "".join(json.dumps(row) + end for row in names)
        (root / "metadata.jsonl").write_text(mark + lines, "utf-8", newline="")
    elif kind == "csv":
        quoted = ['"' + row["text"].replace('"', '""') + '"' for row in names]
        lines = [f"{row['file_name']},{text}" for row, text in zip(names, quoted)]
        text = mark + end.join(["file_name,text", *lines])
        (root / "metadata.csv").write_text(text, "utf-8", newline="")


def _spoilt_images(draw, root, kind, wanted):
    path, _ = wanted[0]
    if kind == "txt" and draw.random() < 0.5:
        if len(wanted) > 1 and draw.random() < 0.5:
            path.with_suffix(".txt").unlink()
            return "a caption missing"
        path.with_suffix(".txt").write_bytes(b"\xff\xff\xff")
        return "a caption that is no text"
    if kind in ("jsonl", "csv") and draw.random() < 0.5:
        lines = ('{"file_name": "none.png", "text": "a"}\n', "{\n", "[1]\n")
        lines = lines if kind == "jsonl" else (f"\n{path.name},a, b", "\nnone.png,a", '\n"')
        with (root / f"metadata.{kind}").open("a") as file:
            file.write(draw.choice(lines))
        return "a line that is wrong"
    way = draw.choice(("truncated", "loop", "strange", "broken link", "no picture"))
    if way == "loop":
        (root / "back").symlink_to(root.resolve())
        return "a link that leads back"
    if way == "broken link":
        path.unlink()
        path.symlink_to(root / "nowhere")
        return "a broken link"
    if way == "no picture":
        path.write_bytes(b"<html>")
        return "an error page"
    if way == "truncated":
        path.write_bytes(path.read_bytes()[:20])
        return "a truncated image"
    (root / "notes.md").write_text("x")
    return "a strange file"
