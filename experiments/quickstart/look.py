"""What a folder of pictures holds, and its pictures at one size in the workdir.

WORKDIR/data/{train,validation}/   PNGs of one size, with a metadata.jsonl of their captions, or in
                                   a folder for each class
WORKDIR/data/.about.json           counts, classes, what was left out and why, what it was made of
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from diffusion import files, wording
from diffusion.data import images
from diffusion.data.builders.local_files import folders

FEWEST = 20  # pictures
HELD_OUT = 0.1  # of the pictures, where the folder has no validation or test of its own
MOST_HELD_OUT = 1000
THREADS = 4  # each with a picture of at most `images.MAX_PIXELS`

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Found:
    """A folder, looked at: nothing is written.

    rows: by split, "train" and "validation": "path", and "caption" or "label" (a name).
    sides: the shorter side of each picture, in pixels. left_out: why, by file.
    """

    directory: pathlib.Path
    rows: dict[str, Rows]
    sides: np.ndarray
    left_out: dict[str, str]

    @property
    def told(self) -> str:
        """What the denoiser is told: "captions", "classes" or "nothing"."""
        first = self.rows["train"][0]
        return "captions" if "caption" in first else "classes" if "label" in first else "nothing"

    @property
    def hash(self) -> str:
        """Tells another folder, or other files in it, from this one."""
        named = []
        for row in (row for rows in self.rows.values() for row in rows):
            path, said = row["path"], (row.get("caption", ""), row.get("label", ""))
            named.append([str(path.relative_to(self.directory)), path.stat().st_size, *said])
        return files.digest({"rows": sorted(named)})

    def said(self) -> str:
        """One line of sizes and splits; what the folder holds is said as it is listed."""
        low, middle, high = np.percentile(self.sides, (0, 50, 100)).astype(int)
        counts = ", ".join(f"{len(_paths(rows)):,} {split}" for split, rows in self.rows.items())
        text = f"shorter side {low} to {high} pixels, half of them {middle} or more; {counts}"
        if self.left_out:
            (path, reason), *_ = self.left_out.items()
            text += f"; {len(self.left_out):,} files are no picture, such as {path}: {reason}"
        return text


def look(directory: pathlib.Path, seed: int) -> Found:
    """Reads names, captions and headers.

    Raises ValueError, a sentence, for what is no folder of at least `FEWEST` pictures.
    """
    if not directory.is_dir():
        what = "is a file" if directory.is_file() else "does not exist"
        raise ValueError(f"--images={directory} {what}: name a folder of pictures")
    if not os.access(directory, os.R_OK | os.X_OK):
        raise ValueError(f"--images={directory} may not be read: change its permissions")
    listed = folders.list_folder(directory)
    left_out: dict[str, str] = {}
    sides: list[int] = []

    def side(path):
        try:
            return min(images.shape(path)[:2])
        except images.NO_IMAGE as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for split, rows in listed.items():
            sized = dict(zip(_paths(rows), pool.map(side, _paths(rows))))
            for path, size in sized.items():
                if isinstance(size, Exception):
                    left_out[str(path.relative_to(directory))] = _reason(size)
                else:
                    sides.append(size)
            listed[split] = [r for r in rows if not isinstance(sized[r["path"]], Exception)]
    if len(sides) < FEWEST:
        example = next((f"; {path}: {reason}" for path, reason in left_out.items()), "")
        raise ValueError(
            f"--images={directory} has {len(sides)} pictures that can be read, and at least "
            f"{FEWEST} are needed to learn from and to measure by: add some{example}"
        )
    if len({row.get("label") for rows in listed.values() for row in rows}) == 1:  # no class at all
        listed = {split: [_bare(row) for row in rows] for split, rows in listed.items()}
    return Found(directory, _split(listed, seed), np.array(sides), left_out)


def _bare(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "label"}


def _paths(rows: Rows) -> list[Any]:
    """Of the pictures, in order: each caption of one is a row."""
    return list(dict.fromkeys(row["path"] for row in rows))


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _split(listed: dict[str, Rows], seed: int) -> dict[str, Rows]:
    """The folder's own splits, or a tenth of its pictures held out, with all their captions; of a
    class at most half."""
    train = listed.get("train") or next(rows for rows in listed.values() if rows)
    for name in ("validation", "test"):
        if listed.get(name) and listed[name] is not train:
            classes = [{row.get("label") for row in rows} for rows in (train, listed[name])]
            if stranger := next(iter(classes[1] - classes[0]), None):
                raise ValueError(
                    f"class {stranger!r} is in the folder's {name} and not in its train: move some"
                )
            return {"train": train, "validation": listed[name]}
    labels = {row["path"]: row.get("label") for row in train}
    paths, held = list(labels), set()
    wanted = int(np.clip(HELD_OUT * len(paths), 2, MOST_HELD_OUT))
    most = {name: count // 2 for name, count in collections.Counter(labels.values()).items()}
    for i in np.random.default_rng(seed).permutation(len(paths)).tolist():
        name = labels[paths[i]]
        if len(held) < wanted and most[name]:
            most[name] -= 1
            held.add(paths[i])
    return {
        "train": [row for row in train if row["path"] not in held],
        "validation": [row for row in train if row["path"] in held],
    }


def shrink(found: Found, directory: pathlib.Path, size: int) -> dict[str, Any]:
    """Writes every picture to `directory`, cropped to its middle and `size` pixels a side.

    Whole or not at all; what is there already must be of the same folder. Returns .about.json.
    Raises ValueError for another folder's pictures, or where too few can be decoded.
    """
    about = directory / ".about.json"
    made_from = {"images": str(found.directory), "size": size, "sha256": found.hash}
    if about.is_file():
        known = files.read_json(about, f"delete {directory}")
        if known["made_from"]["sha256"] != made_from["sha256"]:
            raise ValueError(
                f"--workdir={directory.parent} was begun with other pictures "
                f"({known['made_from']['images']}) than --images={found.directory} holds now: name "
                "another --workdir"
            )
        return known
    total = sum(map(len, found.rows.values()))
    progress, left_out, counts = wording.Progress("pictures", total), dict(found.left_out), {}
    with contextlib.closing(progress), _renamed(directory) as folder:
        for split, rows in found.rows.items():
            reasons = _write(rows, folder / split, size, progress, sum(counts.values()))
            counts[split] = sum(row["path"] not in reasons for row in rows)
            left_out |= {str(p.relative_to(found.directory)): why for p, why in reasons.items()}
        if counts["train"] < FEWEST // 2 or not counts["validation"]:
            (path, reason), *_ = left_out.items()
            raise ValueError(
                f"--images={found.directory}: of {total} pictures only {sum(counts.values())} can "
                f"be decoded, too few; {path}: {reason}"
            )
        classes = sorted({path.parent.name for path in (folder / "train").glob("*/*.png")})
        known = {"made_from": made_from, "told": found.told, "counts": counts}
        known |= {"classes": classes, "left_out": left_out}
        files.write_json(folder / ".about.json", known)
    return known


@contextlib.contextmanager
def _renamed(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder that becomes `directory` if the block ends well, and is gone if not. Its files,
    thousands, are not synced one by one: what a power cut tears is refused when it is decoded."""
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(
    rows: Rows, folder: pathlib.Path, size: int, progress: wording.Progress, done: int
) -> dict[pathlib.Path, str]:
    """One split; returns why, of those that do not decode."""
    folder.mkdir()
    for label in {row["label"] for row in rows if "label" in row}:
        (folder / label).mkdir()

    def write(numbered):
        number, row = numbered
        try:
            pixels = images.decode_image(row["path"].read_bytes(), 3, size)
        except images.NO_IMAGE as error:
            return _reason(error)
        Image.fromarray(pixels).save(encoded := io.BytesIO(), "PNG")
        try:
            (folder / row.get("label", "") / f"{number:06d}.png").write_bytes(encoded.getvalue())
        except OSError as error:
            text = f"{folder.parent} could not be written ({error.strerror}): free space"
            raise files.WriteError(text) from error
        return ""

    reasons, captions = {}, []
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for number, why in enumerate(pool.map(write, enumerate(rows))):
            row = rows[number]
            if why:
                reasons[row["path"]] = why
            elif "caption" in row:
                captions.append({"file_name": f"{number:06d}.png", "text": row["caption"]})
            progress.at(done + number + 1)
    if captions:
        lines = "".join(json.dumps(row) + "\n" for row in captions)
        (folder / "metadata.jsonl").write_text(lines)
    return reasons
