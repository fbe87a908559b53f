"""Low-rank updates in Diffusers' file format, `pytorch_lora_weights.safetensors`, both ways.

A layer NAME of network NET has two tensors, A^T (rank, in) and B^T (out, rank) of
`models/lora.py`'s eq. 1, and maybe alpha (none: alpha = rank):

    NET.NAME.lora_A.weight, NET.NAME.lora_B.weight           Diffusers from 0.22 on; written
    NET.NAME.lora.down.weight, NET.NAME.lora.up.weight       before
    NET....processor.to_q_lora.down.weight, ...              the first ones
    lora_unet_NA_ME.lora_down.weight, ...lora_up.weight      kohya-ss/sd-scripts, with alpha

NET is "unet" or "text_encoder"; a file of `unet.save_lora_adapter` leaves it out. Diffusers from
0.35 on puts PEFT's config, and with it alpha, into the file's header and no longer beside the
tensors. What is read has alpha / rank multiplied into B, so that it is merged with scale 1.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion.files import write_tensors
from diffusion.interop import files, text_encoder, unet

FILE = "pytorch_lora_weights.safetensors"
HEADER = "lora_adapter_metadata"
RULES: Mapping[str, files.Rules] = {"unet": unet.RULES, "text_encoder": text_encoder.RULES}
# Prefixes of each network's layers, with "." and, in kohya's files, with "_".
DOTTED = {"unet": ("unet.", ""), "text_encoder": ("text_encoder.text_model.", "text_encoder.")}
JOINED = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_text_model_",)}

OLD_NAMES: files.Rules = (
    (r"\.processor\.(to_\w+?)_lora\.(down|up)\.weight$", r".\1.lora.\2.weight"),
    (r"\.lora(_linear_layer)?\.down\.weight$", ".lora_A.weight"),
    (r"\.lora(_linear_layer)?\.up\.weight$", ".lora_B.weight"),
    (r"\.lora_down\.weight$", ".lora_A.weight"),
    (r"\.lora_up\.weight$", ".lora_B.weight"),
    (r"\.to_out\.lora_", ".to_out.0.lora_"),
)


def load_lora(path: str | os.PathLike, params: Mapping[str, Any]) -> dict[str, Any]:
    """Trees of updates by network, for the networks of `params` ("unet", "text_encoder").

    `path`: the file, or a directory that holds FILE. ValueError naming the file for one that is
    broken, that updates layers the networks lack, or with other shapes.
    """
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    tensors = {_rename(k): v for k, v in files.read_safetensors(path).items()}
    header = _header(path)
    found: dict[str, Any] = {}
    for network in RULES:
        layers = _layers(network, params[network]) if network in params else {}
        flat: dict[tuple[str, ...], Any] = {}
        for module_path, shape, names in layers:
            name = next((n for n in names if f"{n}.lora_A.weight" in tensors), None)
            if name is not None:
                alpha = _alpha(header, network, names[0].removeprefix(DOTTED[network][0]))
                down, up = _take(tensors, name, shape, path, alpha)
                flat[*module_path, "down"], flat[*module_path, "up"] = down, up
        if flat:
            found[network] = unflatten_dict(flat)
    if tensors or not found:
        odd = f"updates {min(tensors)}" if tensors else "holds no update of a dense layer"
        raise ValueError(
            f"{path} {odd}, for which the networks have no place: it was made for others"
        )
    return found


def save_lora(path: str | os.PathLike, tree: Mapping[str, Any], scale: float = 1.0) -> None:
    """Writes updates of the U-Net as a file that Diffusers loads, `scale` multiplied into B."""
    tensors: dict[str, np.ndarray] = {}
    for module_path, pair in _pairs(tree).items():
        name = "unet." + _module_name((*module_path, "kernel"), RULES["unet"])
        tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(pair["down"].T)
        tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(pair["up"].T * np.float32(scale))
    write_tensors(path, tensors, format="pt")


def _pairs(tree: Mapping[str, Any]) -> dict[tuple[str, ...], dict[str, np.ndarray]]:
    pairs: dict[tuple[str, ...], dict[str, np.ndarray]] = {}
    flat: dict[Any, Any] = flatten_dict(dict(tree))  # pyright: ignore[reportAssignmentType]
    for path, leaf in flat.items():
        pairs.setdefault(path[:-1], {})[path[-1]] = np.asarray(leaf, np.float32)
    return pairs


def _rename(name: str) -> str:
    for pattern, replacement in OLD_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _module_name(path: tuple[str, ...], rules: files.Rules) -> str:
    return files.torch_name(path, rules).removesuffix(".weight")


def _layers(network: str, params: Any) -> list[tuple[tuple[str, ...], tuple[int, ...], list[str]]]:
    """(path, kernel's shape, names it may have) of every dense layer."""
    flat: dict[Any, Any] = flatten_dict(params)  # pyright: ignore[reportAssignmentType]
    found = []
    for path, leaf in flat.items():
        if path[-1] == "kernel" and len(leaf.shape) == 2:
            name = _module_name(path, RULES[network])
            names = [prefix + name for prefix in DOTTED[network]]
            names += [prefix + name.replace(".", "_") for prefix in JOINED[network]]
            found.append((path[:-1], tuple(leaf.shape), names))
    return found


def _header(path: Path) -> dict[str, Any]:
    """PEFT's config as Diffusers stores it, its keys maybe with the network before them; or {}."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        text = (file.metadata() or {}).get(HEADER, "{}")
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} has a broken {HEADER} ({error}): fetch it again") from error


def _alpha(header: Mapping[str, Any], network: str, layer: str) -> Callable[[int], float] | None:
    """alpha of a layer as a function of its rank; None where the header does not say."""

    def said(key: str) -> Any:
        return header.get(f"{network}.{key}", header.get(key))

    value = said("lora_alpha")
    if value is None:
        return None
    for pattern, other in (said("alpha_pattern") or {}).items():
        value = other if re.match(rf"(.*\.)?({pattern})$", layer) else value
    # Rank-stabilised LoRA (arXiv:2312.03732) divides alpha by the rank's root.
    return lambda rank: float(value) * (math.sqrt(rank) if said("use_rslora") else 1.0)


def _take(
    tensors: dict[str, np.ndarray],
    name: str,
    shape: tuple[int, ...],
    path: Path,
    said: Callable[[int], float] | None,
) -> tuple[Any, Any]:
    """A and B of one layer, taken out of `tensors`, alpha in B: the one beside them, or as said."""
    down = tensors.pop(f"{name}.lora_A.weight")
    up = tensors.pop(f"{name}.lora_B.weight", None)
    if up is None:
        raise ValueError(f"{path} has {name}.lora_A but no lora_B: fetch it again")
    alpha = tensors.pop(f"{name}.alpha", None)
    down, up = (np.asarray(t, np.float32).reshape(t.shape[:2]) for t in (down, up))
    rank = len(down)
    if down.shape != (rank, shape[0]) or up.shape != (shape[1], rank):
        raise ValueError(
            f"{path}: {name} has updates of shapes {down.shape} and {up.shape}, but the layer has "
            f"{shape[0]} inputs and {shape[1]} outputs: it was made for another network"
        )
    if alpha is None and said is not None:
        alpha = said(rank)
    factor = 1.0 if alpha is None else float(alpha) / rank
    return jnp.asarray(down.T), jnp.asarray(up.T * np.float32(factor))
