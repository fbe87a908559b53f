"""Prepared datasets on disk as arrays, fetched by whole batches of indices.

`open_source` reads what `prepare` wrote: a tensorflow-datasets directory in ArrayRecord format,
read through its random-access data source, which needs no TensorFlow. A set that fits into
`memory_limit_bytes` is decoded once into one uint8 array, and a batch is then one gather; a larger
one is read and decoded batch by batch (in the loader's threads: Pillow releases the interpreter
lock while it decodes).
"""

import dataclasses
import pathlib
from typing import Any, Protocol, runtime_checkable

import numpy as np

from diffusion.data import provenance
from diffusion.data.fitting import CENTRE, How
from diffusion.data.images import decode_images

Batch = dict[str, Any]  # arrays with a leading batch axis, or lists as long; see `loader`

REMEDY = "run `python -m experiments.prepare_data` with the same --config and --config.data.dir"


@runtime_checkable
class Source(Protocol):
    """A fixed number of examples, in a fixed order."""

    @property
    def provenance(self) -> dict[str, Any]: ...

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> Batch:
        """The examples `indices`, stacked: "image" uint8, "label" int32, "caption" list[str]."""
        ...


@dataclasses.dataclass(frozen=True)
class MemorySource:
    """Examples held in memory: arrays (or lists, for captions) with a leading axis of examples."""

    columns: Batch
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def batch(self, indices: np.ndarray) -> Batch:
        return {
            name: column[indices]
            if isinstance(column, np.ndarray)
            else [column[i] for i in np.asarray(indices).tolist()]
            for name, column in self.columns.items()
        }


@dataclasses.dataclass(frozen=True)
class RecordSource:
    """Examples read from ArrayRecord as they are asked for.

    Attributes:
      records: a tensorflow-datasets data source with undecoded images.
      channels: 1 or 3, what images are converted to.
      image_size: pixels a side to crop and resize to; None leaves images as they are.
      how: they are fitted; where that cuts nothing off, "image" is a list.
    """

    records: Any
    channels: int
    image_size: int | None
    provenance: dict[str, Any]
    how: How = CENTRE

    def __len__(self) -> int:
        return len(self.records)

    def batch(self, indices: np.ndarray) -> Batch:
        rows = self.records.__getitems__(np.asarray(indices).tolist())
        given = self.channels, self.image_size, self.how
        batch: Batch = decode_images((row["image"] for row in rows), *given)
        images = batch["image"]
        if not self.how.whole and len({image.shape for image in images}) > 1:
            raise ValueError(
                "data.image_size=None, but the images have several sizes "
                f"({', '.join(map(str, sorted({i.shape[:2] for i in images})[:3]))}, ...): set it"
            )
        batch["image"] = images if self.how.whole else np.stack(images)
        if "label" in rows[0]:
            batch["label"] = np.array([row["label"] for row in rows], np.int32)
        if "caption" in rows[0]:
            batch["caption"] = [row["caption"].decode() for row in rows]
        return batch


def find_directory(name: str, data_dir: str | pathlib.Path) -> pathlib.Path | None:
    """The newest version of data set `name` under `data_dir`, whole or not; None: there is none."""
    root = pathlib.Path(data_dir) / name
    versions = [path for path in root.glob("*.*.*") if path.name.replace(".", "").isdigit()]
    return max(versions, key=lambda path: [int(n) for n in path.name.split(".")], default=None)


def open_source(
    name: str,
    data_dir: str | pathlib.Path,
    split: str = "train",
    image_size: int | None = None,
    memory_limit_bytes: int = 2**30,
    how: How = CENTRE,
) -> Source:
    """Opens a data set that `prepare` wrote to `data_dir/name/version`.

    Args:
      split: a split, or a slice of one as tensorflow-datasets spells it ("train[:5%]").
      image_size: pixels a side; None: as stored.
      memory_limit_bytes: decode a set up to this size into memory once.
      how: a picture is brought to that size.

    Raises:
      ValueError: the data is missing, half-written or of another size than was written; no such
      split.
    """
    import tensorflow_datasets as tfds

    if not name or not str(data_dir):
        raise ValueError(f"data.name={name!r} and data.dir={str(data_dir)!r} must both be set")
    directory = find_directory(name, data_dir)
    if directory is None:
        raise ValueError(f"data.dir={str(data_dir)!r} holds no data.name={name!r}: {REMEDY}")
    known = provenance.read(directory, REMEDY)
    if split.split("[")[0] not in known["splits"]:
        raise ValueError(
            f"data set {name!r} has no split {split!r}: use one of {[*known['splits']]}"
        )
    builder: Any = tfds.builder_from_directory(str(directory))
    skip = {"image": tfds.decode.SkipDecoding()}
    records = builder.as_data_source(split=split, decoders=skip)
    features: Any = builder.info.features
    channels = features["image"].shape[-1] or 3
    source = RecordSource(records, channels, image_size, known | {"split": split}, how)
    if how.whole:
        return source
    height, width = (image_size,) * 2 if image_size else features["image"].shape[:2]
    if height and width and len(source) * height * width * channels <= memory_limit_bytes:
        return in_memory(source)
    return source


def in_memory(source: Source, chunk: int = 4096) -> MemorySource:
    """All of `source`, decoded once."""
    parts = [
        source.batch(np.arange(start, min(start + chunk, len(source))))
        for start in range(0, len(source), chunk)
    ]
    columns = {
        name: np.concatenate([part[name] for part in parts])
        if isinstance(parts[0][name], np.ndarray)
        else [item for part in parts for item in part[name]]
        for name in (parts[0] if parts else {})
    }
    return MemorySource(columns, source.provenance)
