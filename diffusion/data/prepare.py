"""Datasets to ArrayRecord on disk, once: all that may import TensorFlow."""

import pathlib
from typing import Any

from diffusion.data import provenance, sources


def prepare(
    name: str, data_dir: str | pathlib.Path, source_dir: str | pathlib.Path | None = None
) -> pathlib.Path:
    """Writes data set `name` under `data_dir`, unless it is already there and whole.

    Returns:
      the directory of the data set's version.
    """
    if not name or not str(data_dir):
        raise ValueError(f"data.name={name!r} and data.dir={str(data_dir)!r} must both be set")
    try:
        directory = sources.dataset_directory(name, data_dir)
        provenance.read(directory, sources.REMEDY)
        return directory
    except ValueError:
        pass
    return _finish(_builder(name, data_dir))


def _builder(name: str, data_dir: str | pathlib.Path) -> Any:
    from diffusion.data.builders import captioned_digits

    if name == "captioned_digits":
        return captioned_digits.Builder(data_dir=str(data_dir), file_format="array_record")
    raise ValueError(f"data.name={name!r} is unknown")


def _finish(builder: Any) -> pathlib.Path:
    builder.download_and_prepare()
    directory = pathlib.Path(builder.data_dir)
    splits = {split: info.num_examples for split, info in builder.info.splits.items()}
    provenance.write(
        directory,
        {"name": builder.info.full_name, "version": str(builder.version), "splits": splits},
    )
    return directory
