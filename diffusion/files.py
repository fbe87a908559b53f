"""Files and folders that are whole or not there, their hashes, and "is it what it was made from?".

What is being written has a hidden name of its own beside its place, `.NAME.XXXXXXXX.partial`, and
takes that place by one rename once its bytes are on the disk. So a reader, and whoever goes on
after a kill or a full disk, finds what was there before or all of what is there now. What a kill
leaves under a hidden name is removed by the folder's only writer (`clear`), and read by nobody.

A sealed file is a JSON object that holds its own hash: what is told by `hash_tree` of the files
beside it is then known to be what was written.
"""

import concurrent.futures
import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

PARTIAL = ".*.partial"  # what is being written, or was when its writer was killed
ABSENT = object()  # what a mapping has for a key that it lacks: not None, which is a value


class WriteError(OSError):
    """What could not be written and what to do about it, in a sentence."""


# -- whole or not at all -------------------------------------------------------------------------


def sync(path: str | os.PathLike) -> None:
    """Returns when the bytes of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems have no fsync; full disks must be heard
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _naming(path: Path, *failures: type[Exception]) -> Iterator[None]:
    try:
        yield
    except (OSError, *failures) as error:
        reason = getattr(error, "strerror", None) or error
        message = f"{path} could not be written ({reason}): free space, or mend the folder"
        raise WriteError(message) from error


def _place(path: str | os.PathLike) -> tuple[Path, Path]:
    """Where `path`, maybe a link, leads to, and a new hidden name beside that."""
    path = Path(path).resolve() if os.path.islink(path) else Path(path)
    return path, path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def clear(directory: Path) -> None:
    """Removes what killed writers left in `directory`, whose only writer the caller is."""
    for path in directory.glob(PARTIAL):
        _remove(path)


@contextlib.contextmanager
def whole(path: str | os.PathLike, *failures: type[Exception]) -> Iterator[Path]:
    """The name to write a file under, which is `path`'s if the block ends well, and gone if not.

    Folders above it are made. `failures`: what the block's writer raises, beside OSError, where it
    cannot write. Raises WriteError for those, ValueError where `path` is no regular file.
    """
    path, partial = _place(path)
    if path.exists() and not path.is_file():  # a folder, or /dev/null
        raise ValueError(f"{path} is there and no regular file: name another")
    try:
        with _naming(path, *failures):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
            mode = partial.stat().st_mode
            yield partial
            partial.chmod(mode)  # safetensors' writer makes files that nobody else may read
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
    except BaseException:
        _remove(partial)
        raise


def write(path: str | os.PathLike, data: str | bytes) -> None:
    """Writes a file whole or not at all, text as UTF-8. Raises WriteError."""
    with whole(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: str | os.PathLike, value: Any, sort_keys: bool = False) -> None:
    """`write` of JSON. Raises WriteError, and TypeError for what is no JSON."""
    write(path, json.dumps(value, indent=2, sort_keys=sort_keys) + "\n")


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Any], **metadata: str) -> None:
    """Arrays by name as a .safetensors, whole or not at all. Raises WriteError."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with whole(path, SafetensorError) as partial:
        save_file(dict(tensors), partial, metadata or None)


def write_arrays(path: str | os.PathLike, /, **arrays: Any) -> None:
    """Arrays by name as an .npz, whole or not at all. Raises WriteError."""
    import numpy as np

    with whole(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def check_folder(path: str | os.PathLike, mine: Collection[str] = ()) -> None:
    """ValueError where `path` is a file, or a folder that holds anything but `mine`."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: name a folder")
    held = {p.name for p in path.iterdir()} if path.is_dir() else set()
    others = sorted(n for n in held.difference(mine) if not fnmatch.fnmatch(n, PARTIAL))
    if others:
        raise ValueError(
            f"{path} holds other files ({others[0]}), which would be lost: name a new folder"
        )


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike, mine: Collection[str] = ()) -> Iterator[Path]:
    """A new folder that takes `path`'s place if the block ends well, and is gone if it does not.

    A folder that is there already is replaced if it holds nothing but `mine`, else ValueError.
    Raises WriteError where the folder cannot be made or moved.
    """
    path, partial = _place(path)
    check_folder(path, mine)
    try:
        with _naming(path):
            partial.mkdir(parents=True)
        yield partial
        with _naming(path):
            for made in (*partial.rglob("*"), partial):
                sync(made)
            _exchange(partial, path)
            sync(path.parent)
    except BaseException:
        _remove(partial)
        raise


def _exchange(new: Path, path: Path) -> None:
    """Renames a folder to `path`; what was there is put back if that fails, removed if not."""
    if not path.is_dir() or not any(path.iterdir()):
        new.rename(path)
        return
    old = new.with_suffix(".old")
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old)


# -- hashes --------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _each(function: Callable[[Path], Any], paths: Sequence[Path]) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # hashing releases the interpreter lock
        return list(pool.map(function, paths))


def hash_tree(directory: Path, exclude: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """{path below `directory`: {"bytes", "sha256"}} of every file, on the disk when it is hashed.

    `exclude`: patterns of file names, such as "*.tmp".
    """
    paths = [p for p in sorted(directory.rglob("*")) if p.is_file()]
    paths = [p for p in paths if not any(fnmatch.fnmatch(p.name, x) for x in exclude)]
    _each(sync, paths)
    hashes = zip(paths, _each(hash_file, paths))
    found = {path: {"bytes": path.stat().st_size, "sha256": one} for path, one in hashes}
    return {path.relative_to(directory).as_posix(): one for path, one in found.items()}


def inside(directory: Path, name: str) -> Path:
    """`directory / name`. ValueError where the name leads out of it."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"{name[:200]!r} is outside its folder {directory}")
    return directory / relative


def check_tree(directory: Path, listed: Mapping[str, Any], contents: bool = False) -> None:
    """ValueError naming the first file that is not as `hash_tree` listed it.

    Without `contents` only sizes are compared. OSError where a file cannot be read.
    """
    for name, entry in listed.items():
        path = inside(directory, name)
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise ValueError(f"{path} has {size} bytes where {entry['bytes']} were written")
    paths = [directory / name for name in listed] if contents else []
    for path, entry, found in zip(paths, listed.values(), _each(hash_file, paths)):
        if found != entry["sha256"]:
            raise ValueError(f"{path} does not hash to what was written: its content has changed")


def seal(path: Path, body: Mapping[str, Any]) -> dict[str, Any]:
    """Writes `body` with its own `digest` as "sha256"; returns that. Raises WriteError."""
    sealed = {**body, "sha256": digest(body)}
    write(path, json.dumps(sealed, indent=1))  # no newline: a byte less, and it is broken
    return sealed


def unseal(path: Path, remedy: str) -> dict[str, Any]:
    """What `seal` wrote. ValueError naming the file that is no such thing, or was altered."""
    body = read_json(path, remedy)
    if digest({k: v for k, v in body.items() if k != "sha256"}) != body.get("sha256"):
        raise ValueError(f"{path} was altered (its own SHA-256 does not match): {remedy}")
    return body


def read_json(path: str | os.PathLike, remedy: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    ValueError naming the file that is missing or holds none; ends with `remedy`.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: {remedy}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): {remedy}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, no JSON object: {remedy}")
    return found


# -- the same or not -----------------------------------------------------------------------------


def differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], free: bool = False, above: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, what is found, what is wanted) wherever two nested mappings differ.

    ABSENT stands for what one of them lacks. `free`: `found` may have more keys than are wanted.
    """
    for key in dict.fromkeys((*wanted, *(() if free else found))):
        has, asked = found.get(key, ABSENT), wanted.get(key, ABSENT)
        if isinstance(has, Mapping) and isinstance(asked, Mapping):
            yield from differences(has, asked, free, f"{above}{key}.")
        elif has != asked:
            yield f"{above}{key}", has, asked


def mismatch(what: str, differ: Sequence[tuple[str, Any, Any]], remedy: str) -> str:
    """The sentence for `differences`: the first, and how many more there are."""
    key, *values = differ[0]
    has, asked = (f"no {key}" if v is ABSENT else f"{key}={v!r}" for v in values)
    more = f" ({len(differ) - 1} more differ)" if len(differ) > 1 else ""
    return f"{what} was made with {has}, but {asked} is asked for{more}: {remedy}"


def check_same(
    found: Mapping[str, Any], wanted: Mapping[str, Any], what: str, remedy: str, free: bool = False
) -> None:
    """ValueError naming the first of the `differences`; `wanted` as it would be read from JSON."""
    if differ := list(differences(found, json.loads(json.dumps(wanted)), free)):
        raise ValueError(mismatch(what, differ, remedy))
