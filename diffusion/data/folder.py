"""A folder of images as it lies on disk, with captions or labels: nothing is prepared.

What is read, and how captions are found, is `builders/local_files/folders.py`'s. Every file is
opened once at the start: those that are no image are counted and named.
"""

import concurrent.futures
import dataclasses
import logging
import pathlib
from typing import Any

import numpy as np

from diffusion import files
from diffusion.data.builders.local_files import folders
from diffusion.data.fitting import CENTRE, How
from diffusion.data.images import NO_IMAGE, decode_images, open_image
from diffusion.data.sources import Batch

DECODERS = 4  # threads, each with an image of at most `images.MAX_PIXELS`

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Images decoded as they are asked for, and fitted.

    Attributes:
      rows: "path" of each image (or `tars.Member`), and "caption" or "label" (int); a row for
        each caption of an image.
      bad: files that are no image and were left out.
      how: images are fitted; where that cuts nothing off, "image" is a list.
    """

    rows: list[dict[str, Any]]
    channels: int
    image_size: int
    provenance: dict[str, Any]
    bad: tuple[Any, ...] = ()
    how: How = CENTRE

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def captions(self) -> list[str] | None:
        """All of them; None where there are none."""
        return [row["caption"] for row in self.rows] if "caption" in self.rows[0] else None

    @property
    def classes(self) -> int:
        """How many kinds of labels there are; 0: none."""
        return 1 + max((row["label"] for row in self.rows if "label" in row), default=-1)

    def batch(self, indices: np.ndarray) -> Batch:
        rows = [self.rows[i] for i in np.asarray(indices).tolist()]
        given = self.channels, self.image_size, self.how
        batch: Batch = decode_images((row["path"].read_bytes() for row in rows), *given)
        if not self.how.whole:
            batch["image"] = np.stack(batch["image"])
        if "caption" in rows[0]:
            batch["caption"] = [row["caption"] for row in rows]
        if "label" in rows[0]:
            batch["label"] = np.array([row["label"] for row in rows], np.int32)
        return batch


def open_folder(
    directory: str | pathlib.Path,
    split: str,
    image_size: int,
    channels: int = 3,
    max_bad_images: int = 0,
    how: How = CENTRE,
) -> FolderSource:
    """The images of `split` under `directory`, fitted as `how` has it.

    Raises:
      ValueError: no such folder or split, a broken line of metadata, or more than `max_bad_images`
        files that are no image; names the file.
    """
    root = pathlib.Path(directory)
    if not root.is_dir():
        raise ValueError(f"data.dir={str(root)!r} is not a directory")
    listed = folders.list_folder(root)
    if split not in listed:
        raise ValueError(f"data.dir={str(root)!r} has no split {split!r}: it has {[*listed]}")
    rows = listed[split]
    paths = list(dict.fromkeys(row["path"] for row in rows))  # of several captions one
    with concurrent.futures.ThreadPoolExecutor(DECODERS) as pool:  # bounds memory as well
        reasons = pool.map(_why_not, paths)
        bad = {path: reason for path, reason in zip(paths, reasons) if reason}
    for number, (path, reason) in enumerate(bad.items(), 1):
        log.warning("%s is no image (%s): skipped (%d of %d)", path, reason, number, len(paths))
    if len(bad) > max_bad_images:
        (path, reason), *_ = bad.items()
        raise ValueError(
            f"{path} is no image ({reason}), one of {len(bad)} of {len(paths)}, more than "
            f"data.max_bad_images={max_bad_images}: remove them, or raise the limit"
        )
    if len(bad) == len(paths):
        raise ValueError(f"{root} holds no file that is an image: give a folder of images")
    if bad:
        such = next(iter(bad))
        print(f"note: {len(bad)} of {len(paths)} files are no image, such as {such}", flush=True)
    kept = [row for row in rows if row["path"] not in bad]
    # Of all splits, and of files that were left out: a class has one number whatever is read.
    labels = {row.get("label") for rows in listed.values() for row in rows}
    classes = sorted(label for label in labels if isinstance(label, str))
    kept = [{**row, "label": classes.index(row["label"])} if classes else row for row in kept]
    count = len(paths) - len(bad)
    made_from = {"name": "folder", "directory": str(root), "split": split, "images": count}
    made_from["sha256"] = files.digest({"rows": [_identity(root, row) for row in kept]})
    return FolderSource(kept, channels, image_size, made_from, tuple(bad), how)


def _identity(root: pathlib.Path, row: dict[str, Any]) -> list[Any]:
    """What tells a row from another: its file's name and size, its caption or label."""
    path = row["path"]
    said = [row[name] for name in ("caption", "label") if name in row]
    return [path.relative_to(root).as_posix(), path.stat().st_size, *said]


def _why_not(path: Any) -> str:
    """Why the file is no image; "" where all of it decodes and its size is not absurd."""
    try:
        open_image(path)
    except NO_IMAGE as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    return ""
