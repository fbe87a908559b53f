"""Samples kept as they are made: shards of a folder, from which an interrupted command goes on.

Shards, 00000.npy and so on, are written whole, each under another name first, and samples.json says
how many there are to be and what they are made from: a folder that lacks some is half-written.
"""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from diffusion import files
from experiments.host import cluster

DESCRIPTION = "samples.json"


def shard(file: pathlib.Path) -> np.ndarray:
    try:
        return np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{file} is truncated: remove it, and make it again") from error


def kept(
    path: pathlib.Path,
    make: Callable[[int], Iterator[np.ndarray]],
    num: int,
    size: int,
    made_from: dict[str, Any],
    flag: str = "--keep",
) -> Iterator[np.ndarray]:
    """`make(start)`'s batches of `size` images, kept as shards; those that are there are read.

    ValueError for a folder of samples that were made from something else.
    """
    shards = -(-num // size)
    own = cluster.together(lambda: _claim(path, num, size, made_from, flag))
    done = least(own)
    for i in range(done):
        yield shard(path / f"{i:05d}.npy")
    if done == shards:
        return
    for i, batch in enumerate(make(done * size), done):
        if cluster.is_first():
            _write(path / f"{i:05d}.npy", batch)
        yield batch


def least(own: int) -> int:
    """The least of all processes' numbers."""
    return int(np.min(multihost_utils.process_allgather(np.int32(own))))


def _claim(path: pathlib.Path, num: int, size: int, made_from: dict[str, Any], flag: str) -> int:
    """How many of the first shards are there."""
    shards = -(-num // size)
    described = {"num": num, "shards": shards, "size": size, "made_from": made_from}
    if (path / DESCRIPTION).is_file():
        found = files.read_json(path / DESCRIPTION, f"remove {path}")
        files.check_same(found, described, f"{flag}={path}", "name another folder")
    elif cluster.is_first():
        if path.is_dir() and any(p for p in path.iterdir() if not p.match(files.PARTIAL)):
            raise ValueError(f"{flag}={path} holds other files: name a new folder")
        files.write_json(path / DESCRIPTION, described)
    if cluster.is_first():
        files.clear(path)
    names = [(path / f"{i:05d}.npy").is_file() for i in range(shards)]
    return names.index(False) if False in names else shards


def _write(path: pathlib.Path, batch: np.ndarray) -> None:
    with files.whole(path) as partial, partial.open("wb") as file:
        np.save(file, batch)
