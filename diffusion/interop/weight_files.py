"""Weights of a model's directory, and of one file, whatever they are stored as.

    STEM.safetensors             Diffusers' STEM is diffusion_pytorch_model, Transformers' is model
    STEM.bin                     PyTorch's pickle, read without running it (`pickled.py`);
                                 Transformers' is pytorch_model.bin
    FLAX.msgpack                 trees of Diffusers' (until 0.39; diffusion_flax_model) and of
                                 Transformers' (until 4; flax_model) Flax modules

each whole, or in shards that FILE.index.json lists, or as its one variant: STEM.fp16.safetensors,
STEM.safetensors.index.fp16.json. What is whole precision goes before variants, the upper before the
lower.
"""

import os
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from diffusion.files import read_json
from diffusion.interop import pickled
from diffusion.interop.files import Rules, Weights, to_tensors

STEMS = {
    ".safetensors": {},
    ".bin": {"model": "pytorch_model"},
    ".msgpack": {"model": "flax_model", "diffusion_pytorch_model": "diffusion_flax_model"},
}
FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
# Flax modules in lists: down_blocks_0 is PyTorch's down_blocks.0.
_LISTS = "down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers"
FLAX: Rules = ((rf"/({_LISTS}|to_out|net|blocks|controlnet_down_blocks)_(\d+)(?=/)", r"/\1/\2"),)


def read_weights(directory: str | os.PathLike, stem: str) -> Weights:
    """All tensors of a model's directory, by PyTorch's names and in its layouts, as stored.

    ValueError naming the file where one is missing, truncated, would run code, or lacks a tensor
    that its index promises.
    """
    directory = Path(directory)
    tensors: dict[str, np.ndarray] = {}
    files: dict[str, Path] = {}
    chosen = _chosen(directory, stem)
    for path, promised in _shards(chosen) if chosen.suffix == ".json" else [(chosen, set())]:
        found = read_tensors(path)
        absent = sorted(promised - found.keys())
        if absent:
            raise ValueError(f"{path} lacks {absent[0]}, which its index promises: fetch it again")
        tensors |= found
        files |= dict.fromkeys(found, path)
    return Weights(tensors, files, directory)


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Every tensor of one `.safetensors`, `.msgpack`, or `.pth`, `.pt`, `.bin` or `.ckpt`."""
    readers = {".safetensors": read_safetensors, ".msgpack": read_flax}
    return readers.get(Path(path).suffix, pickled.read)(path)


def _chosen(directory: Path, stem: str) -> Path:
    """The file, or index of shards, to read."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is missing: fetch it, or name a model's directory")
    found: dict[tuple[bool, int, bool], list[Path]] = {}
    for rank, (suffix, stems) in enumerate(STEMS.items()):
        name = re.escape(stems.get(stem, stem))
        file = rf"{name}(\.\w+)?{re.escape(suffix)}((?:\.\w+)?\.index(?:\.\w+)?\.json)?"
        for path in sorted(directory.iterdir()):
            if match := re.fullmatch(file, path.name):
                index = match[2] or ""
                variant = bool(match[1]) or index not in ("", ".index.json")
                found.setdefault((variant, rank, bool(index)), []).append(path)
    if not found:
        raise ValueError(
            f"{directory / stem}.safetensors is missing, and so are its .bin, .msgpack and index "
            "of shards: fetch the weights"
        )
    best = found[min(found)]
    if len(best) > 1:
        names = ", ".join(path.name for path in best)
        raise ValueError(f"{directory} holds {names}: leave the one that is meant")
    return best[0]


def _shards(index: Path) -> list[tuple[Path, set[str]]]:
    """The files to read, each with the names that the index promises of it."""
    try:
        weight_map = read_json(index, "fetch it again")["weight_map"]
        shards = {name: Path(shard).name for name, shard in weight_map.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards ({error!r}): fetch it again") from error
    # An index of Flax's names the leaves of a tree, by "/": what is missing is found later.
    flax = any(name.endswith(".msgpack") for name in shards.values())
    return [
        (index.parent / shard, {name for name, s in shards.items() if s == shard and not flax})
        for shard in sorted(set(shards.values()))
    ]


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Every tensor of one file as it is stored, float8 too. ValueError names the file."""
    from safetensors import SafetensorError, deserialize, safe_open

    if not Path(path).is_file():
        raise ValueError(f"{path} is missing: fetch it again")
    try:
        with safe_open(path, framework="np") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}
            found = {n: file.get_tensor(n) for n, kind in kinds.items() if kind not in FLOAT8}
        if FLOAT8.keys() & set(kinds.values()):  # which safetensors' NumPy half does not know
            for name, held in deserialize(Path(path).read_bytes()):
                if dtype := FLOAT8.get(held["dtype"]):
                    found[name] = np.frombuffer(held["data"], dtype).reshape(held["shape"])
        return found
    except AttributeError as error:  # of a kind that NumPy has no name for, as F8_E8M0
        raise ValueError(
            f"{path} holds tensors of {', '.join(sorted(set(kinds.values())))}, of which one is "
            "not read here: fetch it in another precision"
        ) from error
    except (SafetensorError, OSError, TypeError) as error:
        raise ValueError(
            f"{path} is truncated or no safetensors file ({error}): fetch it again"
        ) from error


def read_flax(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """A tree of Flax's Diffusers or Transformers, as PyTorch's modules would hold it, float32."""
    from flax.serialization import msgpack_restore

    if not Path(path).is_file():
        raise ValueError(f"{path} is missing: fetch it again")
    try:
        tree: Any = msgpack_restore(Path(path).read_bytes())
        return to_tensors(tree.get("params", tree), FLAX)
    except Exception as error:  # whatever a broken file makes msgpack raise
        why = str(error) or type(error).__name__
        raise ValueError(
            f"{path} is truncated or no tree of Flax's ({why:.120}): fetch it again"
        ) from error
