"""What else is known of a folder's images: maps of labels and boxes, fitted as the images are.

Both are for `folder.FolderSource`, whose images are cropped to the centre square and resized.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from diffusion.data import images, layouts
from diffusion.data.sources import Batch


def read_segments(path: str | pathlib.Path) -> np.ndarray:
    """uint8 (height, width): a picture's grey levels, or the indices of its palette.

    ValueError for a file that is no such picture.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode not in ("L", "P"):
                raise ValueError(f"its pixels are {picture.mode}, not one label each")
            return np.asarray(picture)
    except images.NO_IMAGE as error:
        raise ValueError(f"segments={path} is no map of labels: {error}") from error


@dataclasses.dataclass(frozen=True)
class Segments:
    """Adds "segments", uint8 (batch, side, side): of image NAME.jpg the file DIRECTORY/NAME.png.

    Attributes:
      directory: of the maps, laid out as the images are.
      root: of the images.
      rows: of the source.
      side: pixels of the images.
    """

    directory: pathlib.Path
    root: pathlib.Path
    rows: list[dict[str, Any]]
    side: int

    def __call__(self, batch: Batch) -> Batch:
        return {**batch, "segments": np.stack([self._of(i) for i in batch["index"].tolist()])}

    def _of(self, i: int) -> np.ndarray:
        image = self.rows[i]["path"]
        path = (self.directory / image.relative_to(self.root)).with_suffix(".png")
        found, wanted = read_segments(path), images.shape(image)[:2]
        if found.shape != wanted:
            raise ValueError(
                f"segments={path} has {found.shape[0]}x{found.shape[1]} labels, but its image "
                f"{wanted[0]}x{wanted[1]} pixels: make them alike"
            )
        side, (top, left) = min(wanted), _corner(wanted)
        square = Image.fromarray(found[top : top + side, left : left + side])
        return np.asarray(square.resize((self.side, self.side), Image.Resampling.NEAREST))


@dataclasses.dataclass(frozen=True)
class Boxes:
    """Adds "layout", float32 (batch, most, 5), of a JSONL of "file_name" and "boxes" (`layouts`).

    Boxes, [label, left, top, width, height], are of the whole image, and cut by the crop; what is
    left of none is dropped, and so are those beyond `most`.
    """

    of_row: list[np.ndarray]
    most: int

    @classmethod
    def of(
        cls,
        file: pathlib.Path,
        root: pathlib.Path,
        rows: list[dict[str, Any]],
        most: int,
        classes: int,
    ) -> "Boxes":
        """ValueError naming the line for what is no box, and the image that has no line."""
        if not file.is_file():
            raise ValueError(f"data.boxes={file} does not exist: name a JSONL file")
        known: dict[pathlib.Path, np.ndarray] = {}
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                boxes = [",".join(map(str, box)) for box in row["boxes"]]
                known[root / row["file_name"]] = layouts.parse(boxes, classes)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"data.boxes={file}, line {number}: {error}") from error
        if missing := [row["path"] for row in rows if row["path"] not in known]:
            raise ValueError(f"data.boxes={file} has no line of {missing[0]}: add one, or [] boxes")
        return cls([_cropped(known[row["path"]], row["path"]) for row in rows], most)

    def __call__(self, batch: Batch) -> Batch:
        found = np.zeros((len(batch["index"]), self.most, 5), np.float32)
        found[..., 0] = -1
        for row, i in zip(found, batch["index"].tolist()):
            own = self.of_row[i][: self.most]
            row[: len(own)] = own
        return {**batch, "layout": found}


def _corner(shape: tuple[int, int]) -> tuple[int, int]:
    """Top and left of the centre square."""
    side = min(shape)
    return (shape[0] - side) // 2, (shape[1] - side) // 2


def _cropped(boxes: np.ndarray, path: pathlib.Path) -> np.ndarray:
    height, width = images.shape(path)[:2]
    side, (top, left) = min(height, width), _corner((height, width))
    label, x, y, w, h = boxes.T
    starts = [(x * width - left) / side, (y * height - top) / side]
    ends = [a + n / side for a, n in zip(starts, (w * width, h * height))]
    (x0, y0), (x1, y1) = (np.clip(corner, 0, 1) for corner in (starts, ends))
    kept = (x1 > x0) & (y1 > y0)
    return np.stack([label, x0, y0, x1 - x0, y1 - y0], -1)[kept].astype(np.float32)
