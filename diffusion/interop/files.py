"""What every loader of foreign weights shares: reading, naming, laying out and writing.

A model directory of Diffusers or Transformers is `config.json` beside its weights
(`weight_files.py`). A loader or saver is then three steps each way:

    config = read_config(directory, {"UNet2DModel"})
    module = ...                         # from config; `require` refuses what the module has not
    shapes = jax.eval_shape(module.init, ...)["params"]
    params = to_params(weight_files.read_weights(directory, STEM), shapes, RULES)

    tensors = to_tensors(params, RULES)
    write_directory(directory, config, tensors, STEM)

RULES are pairs (pattern, replacement) of regular expressions, all applied in order to the module
path of a parameter, joined with "/", with "/" at both ends: `("/norm_out/", "/conv_norm_out/")`.
The result, with "." for "/", is the other project's module name; the leaf gives the rest and the
layout:

    kernel (in, out)          -> weight (out, in)
    kernel (*space, in, out)  -> weight (out, in, *space)
    scale, embedding          -> weight, as it is
    anything else             -> its own name, as it is
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion.files import read_json, whole_folder, write_json, write_tensors

Rules = Sequence[tuple[str, str]]

# Diffusers' names of an attention's layers before 0.11, still in published files.
OLD_ATTENTION_NAMES: Rules = (
    (r"\.query\.(weight|bias)$", r".to_q.\1"),
    (r"\.key\.(weight|bias)$", r".to_k.\1"),
    (r"\.value\.(weight|bias)$", r".to_v.\1"),
    (r"\.proj_attn\.(weight|bias)$", r".to_out.0.\1"),
)


@dataclass(frozen=True)
class Weights:
    """Tensors by the other project's name, and the file that each came from (for the errors)."""

    tensors: Mapping[str, np.ndarray]
    files: Mapping[str, Path]
    directory: Path

    def renamed(self, rules: Rules) -> "Weights":
        """The same with every (pattern, replacement) applied to the names, as of old versions."""
        names = {name: _apply(rules, name) for name in self.tensors}
        tensors = {names[name]: tensor for name, tensor in self.tensors.items()}
        files = {names[name]: file for name, file in self.files.items()}
        return Weights(tensors, files, self.directory)

    def without(self, pattern: str) -> "Weights":
        """The same without the tensors whose name the pattern matches anywhere, as buffers."""
        kept = {k: v for k, v in self.tensors.items() if not re.search(pattern, k)}
        return Weights(kept, {k: self.files[k] for k in kept}, self.directory)


def read_config(directory: str | os.PathLike, classes: Iterable[str]) -> dict[str, Any]:
    """`config.json`; its `_class_name` (Diffusers) or `architectures` must be among `classes`.

    Flax's modules count as PyTorch's of the same name. A config that names no class is accepted,
    and any where `classes` is empty. ValueError where it is missing, broken or another's.
    """
    path = Path(directory) / "config.json"
    config = read_json(path, "give a model directory with config.json and weights")
    named = config.get("_class_name") or config.get("architectures") or []
    named = [str(name).removeprefix("Flax") for name in [named] * isinstance(named, str) or named]
    classes = set(classes)
    if classes and named and not set(named) & classes:
        raise ValueError(
            f"{path} describes a {' or '.join(named)}, which is not read here: give a "
            f"directory of {' or '.join(sorted(classes))}"
        )
    if "_class_name" in config:
        config["_class_name"] = named[0]
    return config


def require(
    config: Mapping[str, Any], supported: Mapping[str, Sequence[Any]], source: object
) -> None:
    """ValueError naming the first key whose value is not among the supported ones."""
    for key, values in supported.items():
        value = config.get(key, values[0])
        value = tuple(value) if isinstance(value, list) else value
        if value not in values:
            raise ValueError(
                f"{source}: {key}={value!r} is not supported: only "
                f"{' or '.join(repr(v) for v in values)} is"
            )


def refuse_unknown(config: Mapping[str, Any], known: Iterable[str], source: object) -> None:
    """ValueError naming a key that is not read here, nor is known to change nothing."""
    odd = sorted(key for key in config.keys() - set(known) if not key.startswith("_"))
    if odd:
        raise ValueError(
            f"{source}: {odd[0]}={config[odd[0]]!r} is not a key that is known here: remove it if "
            "it changes nothing"
        )


def whole_numbers(config: Mapping[str, Any], keys: Iterable[str], source: object) -> None:
    """ValueError naming a size that is none, as `true` and 8.5 are; what is left out is."""
    for key in keys:
        if type(value := config.get(key, 1)) is not int or value < 1:
            raise ValueError(
                f"{source}: {key}={value!r} must be a whole number of at least 1: fetch it again"
            )


@contextlib.contextmanager
def naming(source: object) -> Iterator[None]:
    """What goes wrong with a config's values, as a ValueError that names its file."""
    try:
        yield
    except ValueError as error:
        if str(source) in str(error):
            raise
        raise ValueError(f"{source}: {error}") from error
    except (TypeError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        raise ValueError(
            f"{source} has a value of another type or size than its class takes ({error}): fetch "
            "it again"
        ) from error


def torch_name(path: Sequence[str], rules: Rules) -> str:
    """The other project's name of the parameter at a Flax path."""
    *modules, leaf = path
    prefix = _apply(rules, "/" + "".join(f"{m}/" for m in modules)).strip("/").replace("/", ".")
    leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    return f"{prefix}.{leaf}" if prefix else leaf


def _apply(rules: Rules, name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def to_params(weights: Weights, shapes: Any, rules: Rules) -> dict[str, Any]:
    """Parameters of the structure of `shapes` (a tree from `jax.eval_shape`), in its dtypes.

    A stored 1x1 convolution is taken where a dense layer is wanted, and the other way round.
    ValueError for a tensor missing, of another shape, or left over.
    """
    wanted = {path: torch_name(path, rules) for path in flatten_dict(shapes)}
    spare = sorted(weights.tensors.keys() - set(wanted.values()))
    if spare:
        raise ValueError(
            f"{weights.files[spare[0]]} holds {spare[0]} ({len(spare)} such), for which the config "
            "has no place: config and weights do not belong together"
        )
    flat = {
        path: _convert(weights, wanted[path], path[-1], shape)
        for path, shape in flatten_dict(shapes).items()
    }
    return unflatten_dict(flat)


def _convert(weights: Weights, name: str, leaf: str, wanted: Any) -> jax.Array:
    if name not in weights.tensors:
        raise ValueError(
            f"{weights.directory} has no tensor {name} in its weights, which its config needs: "
            "fetch it again"
        )
    tensor = weights.tensors[name]
    shape = _from_flax(np.broadcast_to(np.int8(0), wanted.shape), leaf).shape
    if leaf == "kernel" and _without_ones(tensor.shape) == _without_ones(shape):
        tensor = tensor.reshape(shape)
    if tensor.shape != shape:
        raise ValueError(
            f"{weights.files[name]}: {name} has shape {tuple(tensor.shape)}, but the config needs "
            f"{tuple(shape)}: config and weights do not belong together"
        )
    return jnp.asarray(np.ascontiguousarray(_to_flax(tensor, leaf)), wanted.dtype)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(out, in) and (out, in, 1, 1) are the same; nothing else is."""
    return shape[:2] if all(n == 1 for n in shape[2:]) else shape


def to_tensors(params: Any, rules: Rules) -> dict[str, np.ndarray]:
    """`to_params` backwards: contiguous float32 tensors by the other project's names."""
    return {
        torch_name(path, rules): np.ascontiguousarray(
            _from_flax(np.asarray(value, np.float32), path[-1])
        )
        for path, value in flatten_dict(params).items()
    }


def _to_flax(tensor: np.ndarray, leaf: str) -> np.ndarray:
    """(out, in, *space) -> (*space, in, out) for a kernel."""
    return np.moveaxis(tensor, (0, 1), (-1, -2)) if leaf == "kernel" else tensor


def _from_flax(array: np.ndarray, leaf: str) -> np.ndarray:
    """(*space, in, out) -> (out, in, *space) for a kernel."""
    return np.moveaxis(array, (-1, -2), (0, 1)) if leaf == "kernel" else array


def write_directory(
    directory: str | os.PathLike,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    stem: str,
) -> None:
    """Writes `config.json` and `STEM.safetensors`, whole or not at all.

    A directory that is there already is replaced if it holds nothing but these two files; otherwise
    a ValueError.
    """
    names = ("config.json", f"{stem}.safetensors")
    with whole_folder(directory, names) as folder:
        write_json(folder / names[0], dict(config), sort_keys=True)
        # Diffusers and Transformers refuse a file that does not say it is theirs.
        write_tensors(folder / names[1], tensors, format="pt")
