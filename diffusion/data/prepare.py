"""Data sets to ArrayRecord on disk, once. Nothing else in the library may import TensorFlow.

Three ways lead there, all through a tensorflow-datasets builder, which writes to a temporary
directory and renames it: `captioned_digits`, made from a package; the user's own files, where
`source_dir` names them; else tensorflow-datasets' catalogue, which downloads and needs TensorFlow.
Then the records are counted, the files hashed, and `provenance.json` written: a directory without
it is never read.
"""

import contextlib
import io
import os
import pathlib
import socket
import sys
import urllib.parse
from typing import Any

from diffusion.data import provenance, sources


def prepare(
    name: str,
    data_dir: str | pathlib.Path,
    source_dir: str | pathlib.Path | None = None,
    max_bad_images: int = 0,
    names: str | pathlib.Path | None = None,
) -> pathlib.Path:
    """Writes data set `name` under `data_dir`, unless it is there already and whole.

    Args:
      name: `captioned_digits`; a name of the catalogue, such as "cifar10", "celeb_a_hq/256"; or,
        with `source_dir`, any.
      source_dir: the publisher's own files (CIFAR-10 python batches, MNIST's idx.gz, LSUN's lmdb),
        or a folder of images.
      max_bad_images: files of a folder that are no image to skip before it is an error.
      names: a file of names, one a line, of the folder's images to take, and no others.

    Returns:
      The directory of the data set's version.

    Raises:
      ValueError: a source file is missing or damaged, the publisher cannot be reached, or what
        stands there is damaged; nothing is left that could be taken for a data set.
    """
    if not name or not str(data_dir):
        raise ValueError(f"data.name={name!r} and data.dir={str(data_dir)!r} must both be set")
    if max_bad_images < 0:
        raise ValueError(f"max_bad_images={max_bad_images} must be 0 or more")
    directory = sources.find_directory(name, data_dir)
    if directory is not None and (directory / provenance.FILE).exists():
        # Whole, or damaged after it was whole; a damaged one is the user's to delete.
        provenance.read(directory, f"delete {directory} and prepare it again")
        return directory
    if name == "captioned_digits":
        from diffusion.data.builders.captioned_digits import captioned_digits

        builder = captioned_digits.Builder(data_dir=str(data_dir), file_format="array_record")
    elif source_dir is not None:
        from diffusion.data.builders.local_files import local_files, readers

        files = readers.read(name, pathlib.Path(source_dir), max_bad_images, names)
        builder = local_files.builder(name, files, data_dir)
    else:
        return _finish(name, _from_catalogue(name, data_dir))
    _quietly(builder)
    return _finish(name, builder)


def _quietly(builder: Any) -> None:
    """Prepares what needs no download; what tensorflow-datasets says of it is told if it fails."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()  # ours say how far it is
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            builder.download_and_prepare()
    except (ValueError, OSError):  # a sentence of ours says it all
        raise
    except BaseException:
        print(said.getvalue(), file=sys.stderr, flush=True)
        raise
    finally:
        tfds.enable_progress_bar()


def _from_catalogue(name: str, data_dir: str | pathlib.Path) -> Any:
    import tensorflow_datasets as tfds

    give = "give the publisher's own files with --source_dir=DIR"
    try:
        builder: Any = tfds.builder(name, data_dir=str(data_dir), file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise ValueError(
            f"data.name={name!r} is not in tensorflow-datasets' catalogue: correct it, or {give}"
        ) from error
    try:
        _check_reachable(list(builder.url_infos or {}))
        builder.download_and_prepare()
    except ImportError as error:
        raise ValueError(
            f"data.name={name!r} cannot be prepared without the package {error.name!r}: "
            f"install it, or {give}"
        ) from error
    except Exception as error:  # whatever the network, the publisher or the catalogue raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"data.name={name!r} could not be prepared ({reason}): {give}") from error
    return builder


def _check_reachable(urls: list[str], timeout_secs: float = 10) -> None:
    """Fails at once where the download would retry for many minutes."""
    if not urls or any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy")):
        return
    parts = urllib.parse.urlsplit(urls[0])
    if parts.hostname:
        port = parts.port or {"http": 80, "ftp": 21}.get(parts.scheme, 443)
        try:
            socket.create_connection((parts.hostname, port), timeout_secs).close()
        except OSError as error:
            raise OSError(f"this host cannot reach {parts.hostname}: {error}") from error


def _finish(name: str, builder: Any) -> pathlib.Path:
    """Counts the records that are there, and only then says that the data set is whole."""
    directory = pathlib.Path(builder.data_dir)
    again = f"delete {directory} and prepare it again"
    splits = {split: int(info.num_examples) for split, info in builder.info.splits.items()}
    for split, count in splits.items():
        found = sum(_records(path, again) for path in builder.info.splits[split].filepaths)
        if found != count or not count:
            raise ValueError(f"{directory} has {found} of {count} {split!r} examples: {again}")
    if not splits:
        raise ValueError(f"{directory} is half-written (it has no splits): {again}")
    provenance.write(directory, {"name": name, "version": str(builder.version), "splits": splits})
    return directory


def _records(path: Any, remedy: str) -> int:
    from array_record.python import array_record_data_source

    try:
        # The file's own count, in its footer; that of dataset_info.json is a promise.
        with array_record_data_source.ArrayRecordDataSource([str(path)]) as records:
            return len(records)
    except Exception as error:  # the reader's own kinds
        raise ValueError(f"{path} is missing or damaged: {remedy}") from error
