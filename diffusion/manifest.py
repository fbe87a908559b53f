"""Which checkpoints are whole: a manifest of hashes beside the files, and the steps of a directory.

A folder `DIR/<step>` is finished when it holds `manifest.json`, which is written last, by a rename:
the step, what the caller adds, `files` (path -> bytes, SHA-256), and `sha256` of all that, which
names the checkpoint (provenance). Without a manifest a step is unfinished; a step whose files do
not hash to its manifest is damaged. Nothing here knows JAX or what the files hold.
"""

import contextlib
import logging
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from diffusion import files

MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest; a reader refuses a later one
TEMPORARY = ".orbax-checkpoint-tmp"  # what Orbax calls a folder before its commit

_STEP = re.compile(r"0|[1-9]\d*")

log = logging.getLogger(__name__)


class CorruptError(ValueError):
    """A checkpoint that is not what was written; the message names the file."""


def write_manifest(folder: pathlib.Path, body: dict[str, Any]) -> None:
    listed = files.hash_tree(folder, exclude=(MANIFEST,))
    files.seal(folder / MANIFEST, {**body, "format": FORMAT, "files": listed})
    files.sync(folder.parent)  # which has the name of the step


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """The manifest of the checkpoint in `folder`, itself verified, the files not.

    Raises CorruptError when it is missing, unreadable or altered.
    """
    path = pathlib.Path(folder) / MANIFEST
    try:
        body = files.unseal(path, "it is not a whole manifest")
    except ValueError as error:
        raise CorruptError(str(error)) from error
    if body["format"] > FORMAT:  # not damaged: somebody else's, to be left alone
        raise ValueError(f"{path} has format {body['format']}; this code reads up to {FORMAT}")
    return body


def verify(folder: str | os.PathLike) -> dict[str, Any]:
    """The manifest of `folder`, every file hashed; CorruptError names the one that is bad."""
    folder = pathlib.Path(folder)
    manifest = read_manifest(folder)
    try:
        files.check_tree(folder, manifest["files"], contents=True)
    except (OSError, ValueError) as error:
        raise CorruptError(str(error)) from error
    return manifest


def finished(directory: pathlib.Path) -> list[int]:
    """Steps with a manifest, newest first."""
    if not directory.is_dir():
        return []
    names = [p.name for p in directory.iterdir() if _STEP.fullmatch(p.name)]
    return sorted((int(n) for n in names if (directory / n / MANIFEST).is_file()), reverse=True)


def _readable(directory: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for step in finished(directory):
        with contextlib.suppress(CorruptError):
            yield step, read_manifest(directory / str(step))


def latest_step(directory: str | os.PathLike) -> int | None:
    """The newest step under `directory` with a whole manifest, or None; changes nothing."""
    return next((step for step, _ in _readable(pathlib.Path(directory))), None)


def _set_aside(path: pathlib.Path, suffix: str) -> None:
    target, count = path.with_name(f"{path.name}.{suffix}"), 1
    while target.exists():
        target, count = path.with_name(f"{path.name}.{suffix}.{count}"), count + 1
    path.rename(target)
    log.error("%s was set aside as %s", path, target.name)


def check_there(directory: pathlib.Path, inode: int) -> None:
    """OSError where `directory` is gone or another than `clean` saw: moved or unmounted.

    Orbax would make it again, and what is then written there is not all of a checkpoint.
    """
    if not directory.is_dir() or directory.stat().st_ino != inode:
        raise FileNotFoundError(f"{directory} is gone or another than it was")


def clean(directory: pathlib.Path) -> int:
    """Removes what killed saves left behind; the directory's inode number.

    A committed step whose manifest is missing goes too, unless nothing better exists: then it is
    renamed, because it may be the arrays of the only checkpoint there ever was.
    """
    directory.mkdir(parents=True, exist_ok=True)
    good = latest_step(directory) is not None
    for path in directory.iterdir():
        unfinished = _STEP.fullmatch(path.name) and not (path / MANIFEST).is_file()
        if unfinished and not good:
            _set_aside(path, "unfinished")
        elif unfinished or TEMPORARY in path.name:
            log.warning("removing %s, which a save that did not end left behind", path)
            shutil.rmtree(path, ignore_errors=True)
    return directory.stat().st_ino


def newest_good(root: pathlib.Path, step: int | None, set_aside: bool) -> int | None:
    """The newest step (or `step`) whose files verify; damaged ones are logged and set aside."""
    steps = finished(root)
    if step is not None:
        if step not in steps:
            raise ValueError(f"{root} has no finished checkpoint of step {step}; it has {steps}")
        verify(root / str(step))
        return step
    for candidate in steps:
        try:
            verify(root / str(candidate))
            return candidate
        except CorruptError as error:
            log.error("checkpoint of step %d is damaged: %s", candidate, error)
            if set_aside:
                with contextlib.suppress(OSError):  # a read-only disk: pass it over instead
                    _set_aside(root / str(candidate), "corrupt")
    return None


SOUND = "sound"  # in a checkpoint's metadata; False: saved amid steps that were skipped


def prune(
    directory: pathlib.Path,
    keep_last: int,
    keep_every_steps: int | None,
    keep_best: str | None,
    highest: bool,
    written: int,
) -> None:
    """Deletes finished steps but the newest `keep_last`, the multiples of `keep_every_steps`, the
    one whose `metadata[keep_best]` is lowest (or `highest`), the newest sound one and `written`.

    A step whose manifest cannot be read counts for nothing and is left to whoever restores.
    """
    metadata = {step: manifest["metadata"] or {} for step, manifest in _readable(directory)}
    keep = {written, *list(metadata)[:keep_last]}
    if keep_every_steps:
        keep |= {step for step in metadata if step % keep_every_steps == 0}
    if keep_best and (scores := _scores(metadata, keep_best)):
        keep.add((max if highest else min)(scores, key=scores.__getitem__))
    keep |= set([step for step, known in metadata.items() if known.get(SOUND, True)][:1])
    for step in metadata.keys() - keep:
        folder = directory / str(step)
        (folder / MANIFEST).unlink()  # first: a step half deleted is then an unfinished one
        shutil.rmtree(folder)


def _scores(metadata: Mapping[int, Any], name: str) -> dict[int, float]:
    found = {step: known.get(name) for step, known in metadata.items()}
    return {
        step: score
        for step, score in found.items()
        if isinstance(score, int | float) and math.isfinite(score)
    }
