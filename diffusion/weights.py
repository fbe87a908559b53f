"""One network's weights as `weights.safetensors`, with its config beside them: frozen networks.

A nested dict of arrays becomes flat names joined by "/". No code is stored and none is executed.
"""

import hashlib
import pathlib
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from diffusion import files

FILES = WEIGHTS, CONFIG = "weights.safetensors", "config.json"


def save_weights(directory: pathlib.Path, params: Any, config: dict[str, Any]) -> str:
    """Writes both files or neither; returns the weights' SHA-256.

    Raises WriteError, and ValueError where `directory` holds other files.
    """
    flat = flax.traverse_util.flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    with files.whole_folder(directory, FILES) as folder:
        files.write_json(folder / CONFIG, config, sort_keys=True)
        files.write_tensors(folder / WEIGHTS, dict(sorted(flat.items())))
    return files.hash_file(directory / WEIGHTS)


def params_hash(params: Any) -> str:
    """SHA-256 of a network's parameters, wherever they are kept: names, types, shapes, values."""
    digest = hashlib.sha256()
    for name, leaf in sorted(flax.traverse_util.flatten_dict(params, sep="/").items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def load_weights(directory: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """(params, config, SHA-256) as `save_weights` wrote them.

    Raises ValueError naming the file that is missing or unreadable.
    """
    import safetensors
    import safetensors.numpy

    path, remedy = directory / WEIGHTS, f"run the command that wrote {directory} again"
    config = files.read_json(directory / CONFIG, remedy)
    try:
        flat = safetensors.numpy.load_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: {remedy}") from error
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or no weights ({error}): {remedy}") from error
    return flax.traverse_util.unflatten_dict(flat, sep="/"), config, files.hash_file(path)


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    size = np.max(np.abs(a), initial=0.0)
    return np.array_equal(a, b) or bool(np.max(np.abs(a - b), initial=0.0) <= 1e-5 * size)


def check_same(directory: pathlib.Path, params: Any, of: str) -> None:
    """ValueError where `directory` has other weights than `params`, which `of` has now.

    But for rounding: low-rank updates merged on another device have other last bits. One tensor is
    in memory at a time. A folder without weights passes.
    """
    import safetensors

    if not (directory / WEIGHTS).exists():
        return
    flat: Any = flax.traverse_util.flatten_dict(params, sep="/")
    try:
        with safetensors.safe_open(directory / WEIGHTS, "numpy") as kept:
            same = {*kept.keys()} == {*flat} and all(
                _close(kept.get_tensor(name), np.asarray(leaf)) for name, leaf in flat.items()
            )
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{directory / WEIGHTS} is truncated or no weights ({error}): restore it from a copy"
        ) from error
    if not same:
        raise ValueError(
            f"{directory} keeps what the run was begun with, but {of} has other weights now: "
            "give that again, or use another --workdir"
        )
