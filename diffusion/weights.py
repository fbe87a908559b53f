"""One network's weights as `weights.safetensors`, with its config beside them: frozen networks.

A nested dict of arrays becomes flat names joined by "/". No code is stored and none is executed.
"""

import hashlib
import json
import os
import pathlib
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from diffusion.data.provenance import hash_file

WEIGHTS, CONFIG = "weights.safetensors", "config.json"


def save_weights(directory: pathlib.Path, params: Any, config: dict[str, Any]) -> str:
    """Writes both files, the weights last; returns the weights' SHA-256."""
    import safetensors.numpy

    directory.mkdir(parents=True, exist_ok=True)
    flat = flax.traverse_util.flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    temporary = directory / f".{WEIGHTS}.partial"
    safetensors.numpy.save_file(dict(sorted(flat.items())), temporary)
    os.replace(temporary, directory / WEIGHTS)
    return hash_file(directory / WEIGHTS)


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

    path = directory / WEIGHTS
    for needed in (path, directory / CONFIG):
        if not needed.is_file():
            raise ValueError(f"{needed} is missing: run the command that wrote {directory} again")
    try:
        flat = safetensors.numpy.load_file(path)
        config = json.loads((directory / CONFIG).read_text())
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{directory} cannot be read ({error}): restore it from a copy") from error
    return flax.traverse_util.unflatten_dict(flat, sep="/"), config, hash_file(path)
