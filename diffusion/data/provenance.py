"""What a directory of data is: `provenance.json`, written last.

A directory without it is half-written. It names the data and every file with its size and SHA-256;
`sha256` over all of that is the identity by which data made from this data (stored latents, say)
recalls its origin.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from diffusion import files

FILE = "provenance.json"


def write(
    directory: pathlib.Path, body: Mapping[str, Any], exclude: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Hashes the files of `directory` and writes its provenance: `body`, `files`, `sha256`."""
    listed = files.hash_tree(directory, exclude=(FILE, ".*", *exclude))
    return files.seal(directory / FILE, {**body, "files": listed})


def read(directory: pathlib.Path, remedy: str) -> dict[str, Any]:
    """The provenance of `directory`, once every file it names is there with its size.

    Raises:
      ValueError: the directory is missing, half-written, altered, or short of a file; ends with
      `remedy`.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} does not exist: {remedy}")
    if not (directory / FILE).is_file():
        raise ValueError(f"{directory} is half-written (it has no {FILE}): {remedy}")
    found = files.unseal(directory / FILE, remedy)
    if "files" not in found:
        raise ValueError(f"{directory / FILE} lists no files: {remedy}")
    try:
        files.check_tree(directory, found["files"])
    except ValueError as error:
        raise ValueError(f"{error}: {remedy}") from error
    return found
