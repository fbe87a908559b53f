"""Sets of images to be evaluated: a folder, an .npz, or samples as they are made.

folder of images     PNG, JPEG, WebP or BMP, in the order of their names; grid.png is left out
.npz                 "arr_0" (as guided-diffusion writes it) or "images" (experiments.sample),
                     uint8, read a part at a time
folder of shards     what `--keep=DIR` leaves (`run/kept.py`): 00000.npy, ... and samples.json
"""

import dataclasses
import pathlib
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from diffusion import files
from diffusion.data import images
from experiments.run import kept

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
OWN = ("grid.png",)
ARRAYS = ("arr_0", "images")
BATCH = 250
ROUNDINGS = ("nearest", "truncate")
REMEDY = "remove it, or make it again"


@dataclasses.dataclass(frozen=True)
class SampleSet:
    """`count` images of `shape`; `batches()` yields them in order as uint8."""

    path: pathlib.Path
    count: int
    shape: tuple[int, ...]
    batches: Callable[[], Iterator[np.ndarray]]
    described: dict[str, Any] = dataclasses.field(default_factory=dict)


def open_samples(path: str | pathlib.Path, limit: int | None = None) -> SampleSet:
    """The first `limit` images at `path`, or all. ValueError for anything that is no such set."""
    path = pathlib.Path(path)
    if path.is_dir():
        found = open_shards(path) if (path / kept.DESCRIPTION).is_file() else open_folder(path)
    elif path.suffix == ".npz" and path.is_file():
        found = open_npz(path)
    else:
        raise ValueError(f"--samples={path} is neither a folder of images nor an .npz file")
    if limit is None or limit >= found.count:
        return found
    return dataclasses.replace(found, count=limit, batches=lambda: first(found.batches(), limit))


def first(batches: Iterator[np.ndarray], limit: int) -> Iterator[np.ndarray]:
    for batch in batches:
        yield batch[:limit]
        limit -= len(batch)
        if limit <= 0:
            return


# -- a folder of images --------------------------------------------------------------------------


def open_folder(path: pathlib.Path) -> SampleSet:
    """Every header is read before anything is computed, so that sizes are known to agree."""
    unfinished = sorted(p.name for p in path.iterdir() if p.suffix in (".partial", ".tmp"))
    if unfinished:
        raise ValueError(
            f"--samples={path} is half-written (it holds {unfinished[0]}): finish it, or remove "
            "that file"
        )
    paths = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.name not in OWN)
    if not paths:
        raise ValueError(f"--samples={path} holds no images ({', '.join(SUFFIXES)})")
    shape = _header(paths[0])
    for other in paths[1:]:
        if (size := _header(other)) != shape:
            raise ValueError(
                f"--samples={path} mixes sizes: {paths[0].name} is {shape}, {other.name} {size} "
                "(height, width, channels); give images of one size"
            )

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, len(paths), BATCH):
            yield np.stack([_decode(one, shape[-1]) for one in paths[start : start + BATCH]])

    return SampleSet(path, len(paths), shape, batches)


def _header(path: pathlib.Path) -> tuple[int, int, int]:
    try:
        return images.shape(path)
    except images.NO_IMAGE as error:
        raise ValueError(f"{path} is half-written or no image ({error}): {REMEDY}") from error


def _decode(path: pathlib.Path, channels: int) -> np.ndarray:
    try:
        return images.decode_image(path.read_bytes(), channels, None)
    except images.NO_IMAGE as error:
        raise ValueError(f"{path} is half-written or no image ({error}): {REMEDY}") from error


# -- an .npz -------------------------------------------------------------------------------------


def open_npz(path: pathlib.Path, flag: str = "--samples") -> SampleSet:
    name, shape, dtype = npz_array(path, flag)
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3):
        _refuse_array(path, name, shape, dtype, flag)
    return SampleSet(path, shape[0], shape[1:], lambda: npz_batches(path, name))


def npz_array(path: pathlib.Path, flag: str) -> tuple[str, tuple[int, ...], np.dtype]:
    """Name, shape and dtype of the array of images, without reading it."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n.removesuffix(".npy") for n in archive.namelist()]
            chosen = [name for name in ARRAYS if name in names]
            if not chosen:
                raise ValueError(
                    f"{flag}={path} has the arrays {', '.join(names)}, none of them "
                    f"{' or '.join(ARRAYS)}: name the images so"
                )
            with archive.open(f"{chosen[0]}.npy") as file:
                return chosen[0], *_array_header(file)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ValueError(f"{flag}={path} is truncated or no .npz file: make it again") from error


def _array_header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    old = np.lib.format.read_magic(file)[0] == 1
    read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran:
        raise ValueError("an array of images is stored by columns: save it in C order")
    return shape, dtype


def npz_batches(path: pathlib.Path, name: str, size: int = BATCH) -> Iterator[np.ndarray]:
    """The array's rows, `size` at a time."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            shape, dtype = _array_header(file)
            row = int(np.prod(shape[1:])) * dtype.itemsize
            for start in range(0, shape[0], size):
                count = min(size, shape[0] - start)
                data = file.read(count * row)
                if len(data) < count * row:
                    raise EOFError
                yield np.frombuffer(data, dtype).reshape(count, *shape[1:])
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ValueError(f"{path} is truncated: make it again") from error


def _refuse_array(path: pathlib.Path, name: str, shape: Any, dtype: np.dtype, flag: str) -> None:
    if dtype.kind == "f":
        bad = [not np.isfinite(part).all() for part in npz_batches(path, name)]
        if any(bad):
            raise ValueError(
                f"{flag}={path}: {name} holds NaN or infinity, first among the images from "
                f"{bad.index(True) * BATCH} on: look at how it was made"
            )
    raise ValueError(
        f"{flag}={path}: {name} is {dtype}{list(shape)}, but images are uint8 (count, height, "
        "width, 1 or 3): convert it"
    )


# -- samples as they are made --------------------------------------------------------------------


def to_uint8(x: np.ndarray, rounding: str, start: int = 0) -> np.ndarray:
    """Pixels in [0, 1] to 0..255, rounded to nearest or cut off; series stay as they are.

    `start`: the place of the first, for the error. ValueError for NaN, which would turn black.
    """
    if not np.isfinite(x).all():
        bad = int(np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(1))[0])
        raise ValueError(
            f"sample {start + bad} is NaN: the model has diverged; try --weights, an earlier "
            "--checkpoint_step, or sample.clip"
        )
    if x.ndim == 3:
        return x
    scaled = x * np.float32(255)
    return (np.rint(scaled) if rounding == "nearest" else np.floor(scaled)).astype(np.uint8)


def open_shards(path: pathlib.Path) -> SampleSet:
    """A finished folder of shards."""
    described = _description(path)
    parts = [path / f"{i:05d}.npy" for i in range(described["shards"])]
    have = sum(part.is_file() for part in parts)
    if have < len(parts):
        raise ValueError(
            f"{path} is half-written ({have} of {len(parts)} parts): run the command that made it "
            "again, with the same --keep"
        )

    def batches() -> Iterator[np.ndarray]:
        for part in parts:
            yield kept.shard(part)

    shape = kept.shard(parts[0]).shape[1:]
    return SampleSet(path, described["num"], shape, batches, described["made_from"])


def _description(path: pathlib.Path) -> dict[str, Any]:
    found = files.read_json(path / kept.DESCRIPTION, f"remove {path}")
    try:
        return {key: found[key] for key in ("num", "shards", "made_from")}
    except KeyError as error:
        raise ValueError(f"{path / kept.DESCRIPTION} has no {error}: remove {path}") from error
