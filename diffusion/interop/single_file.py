"""Weights in one file that the user names: safetensors, or a pickle read without running it."""

import os
import re
from pathlib import Path

from diffusion.files import hash_file
from diffusion.interop.files import Weights
from diffusion.interop.weight_files import read_tensors

# PyTorch's hub puts the first digits of the SHA-256 into the name: vgg16-397923af.pth.
_DIGITS = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")


def read_file(path: str | os.PathLike) -> Weights:
    """Every tensor of the file (`weight_files.py`).

    ValueError naming the file where it is missing, truncated, corrupt or would run code.
    """
    path = Path(path)
    tensors = read_tensors(path)
    return Weights(tensors, dict.fromkeys(tensors, path), path.parent)


def read_header(path: str | os.PathLike) -> dict[str, str]:
    """What a `.safetensors` says of itself, such as modelspec.resolution; {} for other files."""
    from safetensors import safe_open

    if Path(path).suffix != ".safetensors":
        return {}
    with safe_open(path, framework="np") as file:
        return file.metadata() or {}


def check_hash(path: str | os.PathLike, expected: str = "") -> str:
    """The file's SHA-256. `expected`: all of it or its first digits; "": those of the name, if any.

    ValueError where it is another, or the file is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the file of weights, or fetch it again")
    found = hash_file(path)
    named = _DIGITS.search(path.name)
    wanted = expected.lower() or (named.group(1) if named else "")
    if not found.startswith(wanted):
        raise ValueError(
            f"{path} has the SHA-256 {found}, not {wanted}: it is damaged or another file; fetch "
            "it again"
        )
    return found
