"""What a directory of data is: `provenance.json`, written last.

A directory without it is half-written. It names the data and every file with its size and SHA-256;
`sha256` over all of that is the identity by which data made from this data (stored latents, say)
recalls its origin.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

FILE = "provenance.json"


def digest(body: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def hash_file(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: pathlib.Path, data: bytes) -> None:
    """Writes a file under a temporary name and renames it: it is whole, or it is not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write(
    directory: pathlib.Path, body: Mapping[str, Any], exclude: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Hashes the files of `directory` and writes its provenance: `body`, `files`, `sha256`."""
    paths = sorted(
        path
        for path in directory.rglob("*")
        if path.is_file() and path.name not in (FILE, *exclude) and not path.name.startswith(".")
    )
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # hashing releases the interpreter lock
        hashes = list(pool.map(hash_file, paths))
    files = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha}
        for path, sha in zip(paths, hashes)
    }
    whole = {**body, "files": files}
    whole["sha256"] = digest(whole)
    write_whole(directory / FILE, (json.dumps(whole, indent=1) + "\n").encode())
    return whole


def read(directory: pathlib.Path, remedy: str) -> dict[str, Any]:
    """The provenance of `directory`, once every file it names is there with its size.

    Raises:
      ValueError: the directory is missing, half-written, altered, or short of a file; ends with
      `remedy`.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} does not exist: {remedy}")
    path = directory / FILE
    if not path.is_file():
        raise ValueError(f"{directory} is half-written (it has no {FILE}): {remedy}")
    try:
        body = json.loads(path.read_bytes())
        claimed = body.pop("sha256")
        files = body["files"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not readable as provenance ({error}): {remedy}") from error
    if digest(body) != claimed:
        raise ValueError(f"{path} was altered (its SHA-256 does not match): {remedy}")
    for name, entry in files.items():
        found = (directory / name).stat().st_size if (directory / name).is_file() else None
        if found != entry["bytes"]:
            state = "is missing" if found is None else f"has {found} bytes, not {entry['bytes']}"
            raise ValueError(f"{directory / name} {state}: {remedy}")
    return {**body, "sha256": claimed}


def check_provenance(
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    prefix: str = "",
    where: str = "the data",
) -> None:
    """Refuses data whose provenance is not what is `expected` of it (nested; other keys are free).

    Raises:
      ValueError: naming the first key that differs, and both values.
    """
    for key, value in expected.items():
        name = f"{prefix}{key}"
        if key not in found:
            raise ValueError(
                f"{name} is missing from the data's provenance, which must say {name}={value!r}: "
                "make the data again"
            )
        if isinstance(value, Mapping) and isinstance(found[key], Mapping):
            check_provenance(found[key], value, f"{name}.", where)
        elif found[key] != value:
            raise ValueError(
                f"{where} was made with {name}={found[key]!r}, but {name}={value!r} is asked for: "
                "make it again, name another folder, or ask for what it holds"
            )
