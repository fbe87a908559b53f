"""A folder of images as it lies on disk, with captions or labels: nothing is prepared.

What is read, and how captions are found, is `builders.local_files.read_folder`'s: metadata.jsonl of
`file_name` and `text` (Hugging Face's ImageFolder), a .txt of the same stem beside each image,
labels by sub-folder, or images alone, under the folder or its `train`, `validation` and `test`.
Every file is opened once at the start: those that are no image are counted and named.
"""

import concurrent.futures
import dataclasses
import logging
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from diffusion.data.builders.local_files import readers
from diffusion.data.sources import Batch, decode_image

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Images decoded as they are asked for, cropped to the centre square and resized.

    Attributes:
      rows: "path" of each image, and "caption" or "label" (int).
      bad: files that are no image and were left out.
    """

    rows: list[dict[str, Any]]
    channels: int
    image_size: int
    provenance: dict[str, Any]
    bad: tuple[pathlib.Path, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def captions(self) -> list[str] | None:
        """All of them; None where there are none."""
        return [row["caption"] for row in self.rows] if "caption" in self.rows[0] else None

    def batch(self, indices: np.ndarray) -> Batch:
        rows = [self.rows[i] for i in np.asarray(indices).tolist()]
        images = [
            decode_image(row["path"].read_bytes(), self.channels, self.image_size) for row in rows
        ]
        batch: Batch = {"image": np.stack(images)}
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
) -> FolderSource:
    """The images of `split` under `directory`.

    Raises:
      ValueError: no such folder or split, a broken line of metadata, or more than `max_bad_images`
        files that are no image; names the file.
    """
    root = pathlib.Path(directory)
    if not root.is_dir():
        raise ValueError(f"data.dir={str(root)!r} is not a directory")
    listed = readers.list_folder(root)
    if split not in listed:
        raise ValueError(f"data.dir={str(root)!r} has no split {split!r}: it has {[*listed]}")
    rows = listed[split]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        good = list(pool.map(lambda row: _opens(row["path"]), rows))
    bad = tuple(row["path"] for row, fine in zip(rows, good) if not fine)
    for number, path in enumerate(bad, 1):
        log.warning("%s is no image: skipped (%d of %d)", path, number, len(rows))
    if len(bad) > max_bad_images:
        raise ValueError(
            f"{bad[0]} is no image, one of {len(bad)} of {len(rows)}, more than "
            f"data.max_bad_images={max_bad_images}: remove them, or raise the limit"
        )
    if bad:
        print(f"note: {len(bad)} of {len(rows)} files are no image, such as {bad[0]}", flush=True)
    kept = [row for row, fine in zip(rows, good) if fine]
    classes = sorted({row["label"] for row in kept if "label" in row})
    kept = [
        {**row, "label": classes.index(row["label"])} if "label" in row else row for row in kept
    ]
    made_from = {"name": "folder", "directory": str(root), "split": split, "images": len(kept)}
    return FolderSource(kept, channels, image_size, made_from, bad)


def _opens(path: pathlib.Path) -> bool:
    """Whether the whole file decodes."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True
