"""What a folder of images holds: pictures, their captions or classes, and what is left out and why.

It is read as Hugging Face's ImageFolder reads it: images under the folder, or under its `train`,
`validation` and `test` (SPLITS), through links; captions of metadata.jsonl, .csv or .parquet
(`file_name`, below the folder of the metadata, and `text`; of several captions of an image each is
an example), which may stand at the root or in a split; else of a .txt or .caption file of the same
stem beside each image; else classes, where every image lies in a sub-folder of
the first level; else images alone. Hidden files and folders are none of it. Where there are no
images but tars, they are WebDataset's (`tars.py`), of the split whose folder or name they have.
"""

import codecs
import collections
import csv
import io
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from diffusion import files
from diffusion.data import images
from diffusion.data.builders.local_files import tars

SPLITS = {  # Hugging Face's words for them
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTIONS = (".txt", ".caption")  # of the same stem as an image
COLUMNS = ("text", "caption", "prompt")  # of metadata, the first that is there
RUBBISH = ("__MACOSX", "Thumbs.db", "desktop.ini", "lost+found")
MAX_CAPTION = 2**14  # characters; text encoders read some hundred

Row = dict[str, Any]  # "path", and "caption" or "label"


def list_folder(root: pathlib.Path) -> dict[str, list[Row]]:
    """By split, what there is to read. Prints what was found, and what is left out and why.

    Raises ValueError, naming the file, for no images, a broken line of metadata, captions for some
    images only, a folder that may not be read or a link that leads back.
    """
    held = sorted(_files(root))
    names = {path.relative_to(root).parts[0] for path in held if path.parent != root}
    folders = {name: root / name for name in sorted(names & SPLITS.keys())}
    metadata = [path for path in held if path.name in METADATA]
    captions: dict[pathlib.Path, list[str]] = {}
    for row in (row for path in metadata for row in _metadata(path)):
        told = captions.setdefault(row["path"], [])
        if row["caption"] not in told:  # a root's and a split's metadata may say the same
            told.append(row["caption"])
    pictures = [path for path in held if path.suffix.lower() in images.SUFFIXES]
    if not pictures and any(path.suffix == ".tar" for path in held):
        return _shards(root, held)
    if not pictures:
        raise ValueError(f"{root} holds no images ({', '.join(images.SUFFIXES)}), nor .tar")
    listed: dict[str, list[Row]] = {}
    beside = [p for p in pictures if folders and p.relative_to(root).parts[0] not in folders]
    for name, folder in folders.items() or {"train": root}.items():
        own = [path for path in pictures if path.is_relative_to(folder)]
        if own:
            listed.setdefault(SPLITS[name], []).extend(_rows(folder, own, captions, metadata))
    if not listed:
        raise ValueError(f"{root}: its folders {', '.join(folders)} hold no images")
    _check_alike(root, listed)
    used = {row["path"] for rows in listed.values() for row in rows} | {*beside, *metadata}
    stems = {path.with_suffix("") for path in pictures}
    beside_them = (p for p in held if p.suffix in CAPTIONS and p.with_suffix("") in stems)
    used |= {path for path in beside_them if not _nowhere(path)}
    print(_said(root, listed, beside, [path for path in held if path not in used]), flush=True)
    return listed


def _files(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """What is not hidden, links to folders followed. ValueError for one that leads back."""
    above: dict[pathlib.Path, tuple[pathlib.Path, ...]] = {root: ()}  # resolved, through links
    for at, names, held in os.walk(root, followlinks=True, onerror=_refuse):
        folder = pathlib.Path(at)
        entered = (*above.pop(folder), folder.resolve())
        names[:] = [name for name in names if not _hidden(name)]
        for path in (folder / name for name in names):
            if path.is_symlink() and any(one.is_relative_to(path.resolve()) for one in entered):
                raise ValueError(f"{path} leads back to a folder that it is in: remove the link")
            above[path] = entered
        yield from (folder / name for name in held if not _hidden(name))


def _refuse(error: OSError) -> None:
    raise ValueError(
        f"{error.filename} is a folder that cannot be read ({error.strerror}): change its "
        "permissions, or move it elsewhere"
    ) from error


def _nowhere(path: pathlib.Path) -> bool:
    """Whether it is a link to what is not there."""
    return os.path.islink(path) and not os.path.exists(path)


def _check_alike(root: pathlib.Path, listed: dict[str, list[Row]]) -> None:
    keys = {tuple(sorted(set(row) - {"path"})) for rows in listed.values() for row in rows}
    if len(keys) > 1:
        raise ValueError(
            f"{root}: some images have captions or labels and some have none: give all or none"
        )


def _shards(root: pathlib.Path, held: list[pathlib.Path]) -> dict[str, list[Row]]:
    """Of WebDataset's tars."""
    listed: dict[str, list[Row]] = {}
    rest: list[Any] = [path for path in held if path.suffix != ".tar"]
    for path in (path for path in held if path.suffix == ".tar"):
        words = re.split(r"[-_./]", path.relative_to(root).as_posix())
        named = {SPLITS[word] for word in words if word in SPLITS} or {"train"}
        if len(named) > 1:
            raise ValueError(f"{path} names the splits {' and '.join(sorted(named))}: rename it")
        (split,) = named
        rows, others = tars.read(path, _caption, COLUMNS)
        listed.setdefault(split, []).extend(rows)
        rest += others
    _check_alike(root, listed)
    print(_said(root, listed, [], rest), flush=True)
    return listed


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in RUBBISH


def _rows(
    folder: pathlib.Path,
    pictures: list[pathlib.Path],
    captions: dict[pathlib.Path, list[str]],
    metadata: list[pathlib.Path],
) -> list[Row]:
    """Of one split."""
    if any(path in captions for path in pictures):  # those without are left out, as there
        return [{"path": p, "caption": text} for p in pictures for text in captions.get(p, ())]
    if metadata and any(m.is_relative_to(folder) for m in metadata):
        raise ValueError(f"{metadata[0]} names none of the images of {folder}: mend or remove it")
    beside = [next(filter(pathlib.Path.is_file, _candidates(path)), None) for path in pictures]
    if any(beside):
        for path, caption in zip(pictures, beside):
            if caption is None:
                raise ValueError(f"{path} has no caption file {path.with_suffix('.txt').name}")
        return [{"path": p, "caption": _caption_file(c)} for p, c in zip(pictures, beside) if c]
    if all(len(path.relative_to(folder).parts) == 2 for path in pictures):
        return [{"path": path, "label": path.parent.name} for path in pictures]
    return [{"path": path} for path in pictures]


def _candidates(path: pathlib.Path) -> Iterator[pathlib.Path]:
    return (path.with_suffix(suffix) for suffix in CAPTIONS)


def _said(
    root: pathlib.Path,
    listed: dict[str, list[Row]],
    beside: list[pathlib.Path],
    rest: list[Any],
) -> str:
    """One line: how many of what, and what is left out. An image of two captions is one."""
    rows = [row for rows in listed.values() for row in rows]
    held = {split: len({row["path"] for row in rows}) for split, rows in listed.items()}
    counts = ", ".join(f"{count} {split}" for split, count in held.items())
    parts = [f"{root}: {sum(held.values())} images ({counts})"]
    if "caption" in rows[0]:
        empty = sum(not row["caption"] for row in rows)
        parts.append(f"{len(rows)} captions" + (f", {empty} of them empty" if empty else ""))
    classes = sorted({row["label"] for row in rows if "label" in row})
    if classes:
        more = ", ..." if len(classes) > 10 else ""
        parts.append(f"{len(classes)} classes: {', '.join(map(str, classes[:10]))}{more}")
    out = []
    if beside:
        out.append(f"{len(beside)} images beside the splits, such as {beside[0].name}")
    loose = [path for path in rest if isinstance(path, pathlib.Path)]  # and not in a tar
    lost = [path for path in loose if _nowhere(path)]
    if lost:
        out.append(f"{len(lost)} links that lead nowhere, such as {lost[0].name}")
    pictures = [path for path in loose if path.suffix.lower() in images.SUFFIXES]
    bare = [path for path in pictures if not _nowhere(path)]
    if bare:
        out.append(f"{len(bare)} images that the metadata does not name, such as {bare[0].name}")
    told = {*lost, *bare}
    kinds = collections.Counter(p.suffix.lower() or p.name for p in rest if p not in told)
    out += [f"{count} {kind}" for kind, count in kinds.most_common(5)]
    parts.append(f"left out: {', '.join(out)}" if out else "nothing left out")
    return "; ".join(parts)


# -- captions ------------------------------------------------------------------------------------


def _metadata(path: pathlib.Path) -> Iterator[Row]:
    rows = list(_table(path))
    if not rows:
        raise ValueError(f"{path} is empty: give a line for each image, or remove it")
    for number, row in rows:
        try:
            if not isinstance(row, dict):
                raise TypeError(f"{row!r:.80}")
            if None in row:  # the csv module's name for what is beyond the columns
                raise ValueError(f"it has {row.pop(None)} beyond its columns: quote commas")
            column = next((name for name in COLUMNS if name in row), "text")
            yield {"path": _inside(path.parent, row["file_name"]), "caption": _caption(row[column])}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            has = f", which has {', '.join(map(str, row))}" if isinstance(row, dict) else ""
            raise ValueError(
                f"{path}, line {number}, is no object with file_name and text{has}: {error}"
            ) from error


def _table(path: pathlib.Path) -> Iterable[tuple[int, Any]]:
    """(line, row) of a metadata file; a broken one is refused by name."""
    if _nowhere(path):
        raise ValueError(f"{path} is a link that leads nowhere: mend or remove it")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(f"{path} needs pyarrow, or save it as metadata.jsonl") from error
        try:
            return list(enumerate(parquet.read_table(path).to_pylist(), 1))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no parquet file that can be read: {error}") from error
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if path.suffix == ".csv":
        try:
            return list(enumerate(csv.DictReader(io.StringIO(data.decode(), newline="")), 2))
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path} is no table in UTF-8: {error}") from error
    lines = [(n, line) for n, line in enumerate(data.splitlines(), 1) if line.strip()]
    return [(n, _object(path, n, line)) for n, line in lines]


def _object(path: pathlib.Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}, is no JSON object: {error}") from error


def _inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """An image of `folder` by the name that metadata gives it; what leads out of it is refused."""
    path = files.inside(folder, name.replace("\\", "/"))
    try:
        there = path.is_file()
    except OSError:  # a name longer than the file system has
        there = False
    if not there:
        raise ValueError(f"{str(path)[:500]} does not exist")
    return path


def _caption(text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"text is {text!r:.80}, no string")
    if len(text) > MAX_CAPTION:
        raise ValueError(f"text has {len(text)} characters, more than {MAX_CAPTION}: cut it")
    text.encode()  # a lone surrogate is no text: UnicodeEncodeError, a ValueError
    return text


def _caption_file(path: pathlib.Path) -> str:
    try:
        if path.stat().st_size > 4 * MAX_CAPTION:
            raise ValueError(f"{path.stat().st_size} bytes are more than {MAX_CAPTION} characters")
        return _caption(path.read_text("utf-8-sig").strip())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no caption ({error}): mend or remove it") from error
