"""The formats in which publishers hand out images, read and checked.

Every reader checks what it is given before anything is written: that the files are there, of the
right size, unharmed. None runs pickled code.
"""

import dataclasses
import gzip
import hashlib
import io
import logging
import pathlib
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from diffusion.data import images
from diffusion.data.builders.local_files import folders

Example = dict[str, Any]  # "image": bytes of a PNG or JPEG file; "label": int; "caption": str

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Files:
    """A readable data set.

    Attributes:
      splits: name -> a function that yields the examples.
      keys: which of "image", "label", "caption" every example has.
      shape: (height, width, channels) of the images; None where they differ.
      classes: number of labels, 0 for none.
    """

    splits: Mapping[str, Callable[[], Iterator[Example]]]
    keys: tuple[str, ...]
    shape: tuple[int | None, int | None, int]
    classes: int = 0


def read(
    name: str,
    source_dir: pathlib.Path,
    max_bad_images: int = 0,
    names: str | pathlib.Path | None = None,
) -> Files:
    """Chooses the reader of `source_dir` by what data set `name` is published as.

    Args:
      names: a file that names the images of a folder to read, and no others.

    Raises:
      ValueError: a file is missing, of the wrong size or checksum, or no image; names it.
    """
    if not source_dir.is_dir():
        raise ValueError(f"--source_dir={str(source_dir)!r} is not a directory")
    published = name in ("mnist", "fashion_mnist", "cifar10") or any(source_dir.rglob("data.mdb"))
    if names and published:
        raise ValueError(f"--names={names} are of a folder of images, which {source_dir} is not")
    if name in ("mnist", "fashion_mnist"):
        return read_idx(source_dir)
    if name == "cifar10":
        return read_cifar10(source_dir)
    if published:
        return read_lmdb(source_dir)
    return read_folder(source_dir, max_bad_images, names)


def png(image: np.ndarray) -> bytes:
    """A uint8 array (height, width[, 3]) as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _arrays(images: np.ndarray, labels: np.ndarray) -> Callable[[], Iterator[Example]]:
    return lambda: (
        {"image": png(image), "label": int(label)} for image, label in zip(images, labels)
    )


# MNIST's own format, http://yann.lecun.com/exdb/mnist: magic 0x0000TTDD (type, axes), the axes,
# bytes.


def read_idx(source_dir: pathlib.Path, examples: tuple[int, int] = (60_000, 10_000)) -> Files:
    """MNIST or Fashion-MNIST: `train-images-idx3-ubyte[.gz]` and its three siblings."""
    splits = {}
    for split, stem, count in zip(("train", "test"), ("train", "t10k"), examples):
        images = _idx(source_dir, f"{stem}-images-idx3-ubyte", (count, 28, 28))
        labels = _idx(source_dir, f"{stem}-labels-idx1-ubyte", (count,))
        splits[split] = _arrays(images, labels)
    return Files(splits, ("image", "label"), (28, 28, 1), 10)


def _idx(source_dir: pathlib.Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    path = next((p for p in (source_dir / f"{name}.gz", source_dir / name) if p.is_file()), None)
    if path is None:
        raise ValueError(f"{source_dir / name}[.gz] is missing: --source_dir must hold it")
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data  # checks the CRC and size
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from error
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    if data[: len(header)] != header or len(data) != len(header) + int(np.prod(shape)):
        raise ValueError(
            f"{path} has {len(data)} bytes or a header that do not make uint8 {shape}: "
            "fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape)


# MD5 of the members of cifar-10-python.tar.gz, https://www.cs.toronto.edu/~kriz/cifar.html.
CIFAR10_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays and plain containers, and nothing that runs code."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        allowed = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
        }
        if global_name == "_reconstruct" and module_name.startswith("numpy"):
            # Arrays' own allocator: an empty ndarray, filled by __setstate__.
            return lambda kind, shape, typecode: np.ndarray.__new__(np.ndarray, shape, typecode)
        if (module_name, global_name) not in allowed:
            raise ValueError(f"it names {module_name}.{global_name}, which no data file needs")
        return allowed[module_name, global_name]


def read_cifar10(source_dir: pathlib.Path, md5: Mapping[str, str] = CIFAR10_MD5) -> Files:
    """CIFAR-10's python batches, in `source_dir` or its `cifar-10-batches-py`."""
    inner = source_dir / "cifar-10-batches-py"
    folder = inner if inner.is_dir() else source_dir
    batches = {name: _cifar_batch(folder / name, expected) for name, expected in md5.items()}
    train = [batch for name, batch in batches.items() if name != "test_batch"]
    images, labels = (np.concatenate(column) for column in zip(*train))
    splits = {"train": _arrays(images, labels), "test": _arrays(*batches["test_batch"])}
    return Files(splits, ("image", "label"), (32, 32, 3), 10)


def _cifar_batch(path: pathlib.Path, expected: str) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: --source_dir must hold CIFAR-10's python batches")
    data = path.read_bytes()
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != expected:
        raise ValueError(
            f"{path} has MD5 {found} ({len(data)} bytes), the publisher's has {expected}: "
            "fetch it again"
        )
    batch = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
    pixels = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels), np.array(batch[b"labels"], np.int64)


def read_lmdb(source_dir: pathlib.Path) -> Files:
    """LSUN's `<category>_<train|val>_lmdb` folders: each value is an encoded image."""
    folders = sorted(path.parent for path in source_dir.rglob("data.mdb"))
    splits = {}
    for folder in folders:
        split = "train" if "train" in folder.name or len(folders) == 1 else "validation"
        if split in splits:
            raise ValueError(
                f"{source_dir} holds two {split!r} databases, such as {folder}: name one of them"
            )
        splits[split] = lambda folder=folder: _lmdb_values(folder)
    try:
        import lmdb  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"{folders[0]} is an LMDB, whose reader is not installed: pip install lmdb"
        ) from error
    return Files(splits, ("image",), (None, None, 3))


def _lmdb_values(folder: pathlib.Path) -> Iterator[Example]:
    import lmdb  # pyright: ignore[reportMissingImports]

    with lmdb.open(str(folder), readonly=True, lock=False, readahead=False) as database:
        with database.begin() as transaction:
            for key, value in transaction.cursor():
                try:
                    yield {"image": _as_stored(value)}
                except images.NO_IMAGE as error:
                    raise ValueError(f"{folder}: key {key!r} is no image: {error}") from error


def _as_stored(data: bytes) -> bytes:
    """An image file as it will be stored: PNG and JPEG untouched, all else as PNG.

    The whole of it is decoded, so that what cannot be read is found now and not in training: one of
    `images.NO_IMAGE`.
    """
    image = images.open_image(io.BytesIO(data))
    return data if data.startswith((b"\x89PNG", b"\xff\xd8")) else png(np.asarray(image))


def read_folder(
    source_dir: pathlib.Path, max_bad_images: int = 0, names: str | pathlib.Path | None = None
) -> Files:
    """Images as `folders.list_folder` finds them.

    Args:
      max_bad_images: files that are no image to skip, each named in the log, before it is an error.
      names: a file that names those to read, one a line, whatever their suffix; None: all.
    """
    listed = folders.list_folder(source_dir)
    if names:
        listed = _named(listed, source_dir, pathlib.Path(names))
    classes = sorted({row["label"] for rows in listed.values() for row in rows if "label" in row})
    if classes and isinstance(classes[0], int):  # WebDataset's are numbers already
        classes = list(range(classes[-1] + 1))
    bad: list[Any] = []
    splits = {
        split: lambda rows=rows: _folder_examples(rows, classes, bad, max_bad_images)
        for split, rows in listed.items()
    }
    keys = sorted(set(next(iter(listed.values()))[0]) - {"path"})
    return Files(splits, ("image", *keys), (None, None, 3), len(classes))


def _named(listed: dict[str, list], root: pathlib.Path, file: pathlib.Path) -> dict[str, list]:
    """Of what was found, what `file` names."""
    if not file.is_file():
        raise ValueError(f"--names={file} does not exist: name a text file, a name a line")
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    wanted = {pathlib.PurePath(line).with_suffix("") for line in lines if line}
    found = {
        split: [row for row in rows if row["path"].relative_to(root).with_suffix("") in wanted]
        for split, rows in listed.items()
    }
    there = {
        row["path"].relative_to(root).with_suffix("") for rows in found.values() for row in rows
    }
    if missing := sorted(wanted - there):
        raise ValueError(
            f"--names={file} names {missing[0]}, one of {len(missing)} of {len(wanted)} that "
            f"{root} does not hold: fetch them, or remove their lines"
        )
    return {split: rows for split, rows in found.items() if rows}


def _folder_examples(
    rows: list[dict[str, Any]], classes: list[Any], bad: list[Any], max_bad_images: int
) -> Iterator[Example]:
    for row in rows:
        try:
            example: Example = {"image": _as_stored(row["path"].read_bytes())}
        except images.NO_IMAGE as error:
            bad.append(row["path"])
            log.warning("%s is no image (%s): %d so far", row["path"], error, len(bad))
            if len(bad) > max_bad_images:
                raise ValueError(
                    f"{row['path']} is no image ({error}), the {len(bad)}. of more than "
                    f"--max_bad_images={max_bad_images}: remove it, or raise the limit"
                ) from error
            continue
        if "caption" in row:
            example["caption"] = row["caption"]
        if "label" in row:
            example["label"] = classes.index(row["label"])
        yield example
