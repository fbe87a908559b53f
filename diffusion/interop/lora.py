"""Low-rank updates in Diffusers' file format, `pytorch_lora_weights.safetensors`, both ways.

A layer NAME of network NET has two tensors, A^T (rank, in) and B^T (out, rank) of
`models/lora.py`'s eq. 1, and maybe alpha (none: alpha = rank). A convolution's A^T is
(rank, in, *window), as in LoCon and LCM-LoRA, or has its window in a third tensor, lora_mid:

    NET.NAME.lora_A.weight, NET.NAME.lora_B.weight           Diffusers from 0.22 on; written
    NET.NAME.lora.down.weight, NET.NAME.lora.up.weight       before
    NET....processor.to_q_lora.down.weight, ...              the first ones
    lora_unet_NA_ME.lora_down.weight, ...lora_up.weight      kohya-ss/sd-scripts, with alpha; of
                                                             SDXL, NA_ME is CompVis's
    diffusion_model.NAME.lora_down.weight, ...               ComfyUI; NAME is CompVis's

DoRA adds a magnitude, lora_magnitude_vector or, in kohya's and LyCORIS' files, dora_scale.

NET is "unet", "text_encoder" or "text_encoder_2"; `unet.save_lora_adapter` leaves it out.
Diffusers from 0.35 on puts PEFT's config, and with it alpha, into the file's header and no longer
beside the tensors. What is read has alpha / rank multiplied into B: it is merged with scale 1.
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
from diffusion.interop import compvis_ldm, files, text_encoder, unet
from diffusion.interop.weight_files import read_tensors
from diffusion.models.unet import UNet

FILE, OLD_FILE = "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"
HEADER = "lora_adapter_metadata"
RULES: Mapping[str, files.Rules] = {
    "unet": unet.RULES,
    "text_encoder": text_encoder.RULES,
    "text_encoder_2": text_encoder.RULES,
}
# Prefixes of each network's layers, with "." and, in kohya's files, with "_".
DOTTED = {
    "unet": ("unet.", ""),
    "text_encoder": ("text_encoder.text_model.", "text_encoder."),
    "text_encoder_2": ("text_encoder_2.text_model.", "text_encoder_2."),
}
JOINED: Mapping[str, tuple[str, ...]] = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_text_model_", "lora_te1_text_model_"),
    "text_encoder_2": ("lora_te2_text_model_",),
}

OLD_NAMES: files.Rules = (
    (r"\.self_attn\.to_(q|k|v)_lora\.", r".self_attn.\1_proj.lora."),
    (r"\.self_attn\.to_out_lora\.", ".self_attn.out_proj.lora."),
    (r"\.processor\.(to_\w+?)_lora\.(down|up)\.weight$", r".\1.lora.\2.weight"),
    (r"\.lora(_linear_layer)?\.down\.weight$", ".lora_A.weight"),
    (r"\.lora(_linear_layer)?\.up\.weight$", ".lora_B.weight"),
    (r"\.lora_down\.weight$", ".lora_A.weight"),
    (r"\.lora_up\.weight$", ".lora_B.weight"),
    (r"\.lora_magnitude_vector(\.weight)?$", ".magnitude"),
    (r"\.to_out\.(lora_|magnitude)", r".to_out.0.\1"),
)

SECOND = r"^(lora_te2_|text_encoder_2\.)"
# What is left over where a file holds more than B A, or is for more networks than there are.
REFUSED = {
    r"\.hada_": "an update of the kind LoHa, which is not read: give one of the kind LoRA",
    r"\.lokr_": "an update of the kind LoKr, which is not read: give one of the kind LoRA",
    r"\.(oft_|boft_)": "an update of the kind OFT, which is not read: give one of the kind LoRA",
    r"\.(on_input|a1\.weight|b1\.weight)$": "an update of the kind IA3 or GLoRA, which is not "
    "read: give one of the kind LoRA",
    r"^base_model\.|\.lora_[AB]\.\w+\.weight$": "as PEFT names it, whose alpha stands in "
    "adapter_config.json: save it by Diffusers' save_lora_weights",
    r"\.lora_B\.weight$": "without the lora_A that belongs to it: fetch it again",
    r"text_projection\.": "an update of the text projection, which is not read: leave it out",
    r"^bundle_emb\.": "a learned word beside the updates: save it as a file of its own, for "
    "--embedding",
    r"\.(diff|diff_b|w_norm|b_norm|bias)$": "an update of whole weights or biases, "
    "which is not read: give a file of low-rank updates alone",
    SECOND: "for a second text encoder (Stable Diffusion XL's), which "
    "these networks have not: give a file made for them",
    "": "for which the networks have no place: it was made for others",
}


def load_lora(
    path: str | os.PathLike, params: Mapping[str, Any], module: Any = None
) -> dict[str, Any]:
    """Trees of updates by network, for the networks of `params` ("unet", "text_encoder",
    "text_encoder_2").

    `path`: the file, or a directory that holds FILE. `module`: the U-Net, by whose blocks CompVis's
    names count; without it they are not known. ValueError naming the file for one that is
    broken, that updates layers the networks lack, or with other shapes.
    """
    path = Path(path)
    if path.is_dir():
        path = next((p for p in (path / FILE, path / OLD_FILE) if p.is_file()), path / FILE)
    tensors = {_rename(k): v for k, v in read_tensors(path).items()}
    header = _header(path) if path.suffix == ".safetensors" else {}
    found: dict[str, Any] = {}
    for network in RULES:
        own = module if network == "unet" and isinstance(module, UNet) else None
        layers = _layers(network, params[network], own) if network in params else []
        flat: dict[tuple[str, ...], Any] = {}
        for module_path, shape, names in layers:
            held = [name for name in names if f"{name}.lora_A.weight" in tensors]
            if len(held) > 1:
                raise ValueError(f"{path} updates one layer as {' and as '.join(held)}: leave one")
            if held:
                with files.naming(path):
                    alpha = _alpha(header, network, names[0].removeprefix(DOTTED[network][0]))
                    update = _take(tensors, held[0], shape, path, alpha)
                flat |= {(*module_path, key): value for key, value in update.items()}
        if flat:
            found[network] = unflatten_dict(flat)
    if tensors:
        odd = min(tensors)
        known = {k: v for k, v in REFUSED.items() if k != SECOND or "text_encoder_2" not in params}
        why = next(text for pattern, text in known.items() if re.search(pattern, odd))
        raise ValueError(f"{path} updates {odd}, {why}")
    if not found:
        raise ValueError(f"{path} holds no update of a layer: it was made for others")
    return found


def save_lora(path: str | os.PathLike, tree: Mapping[str, Any], scale: float = 1.0) -> None:
    """Writes updates of the U-Net as a file that Diffusers loads, `scale` multiplied into B."""
    tensors: dict[str, np.ndarray] = {}
    for module_path, pair in _pairs(tree).items():
        name = "unet." + _module_name((*module_path, "kernel"), RULES["unet"])
        down, up = np.moveaxis(pair["down"], (-1, -2), (0, 1)), pair["up"].T * np.float32(scale)
        tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(down)
        up = up.reshape(*up.shape, *(1 for _ in down.shape[2:]))
        tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(up)
        if "magnitude" in pair:
            tensors[f"{name}.lora_magnitude_vector"] = pair["magnitude"]
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


def _layers(
    network: str, params: Any, module: UNet | None
) -> list[tuple[tuple[str, ...], tuple[int, ...], list[str]]]:
    """(path, kernel's shape, names it may have) of every dense layer and convolution."""
    compvis = () if module is None else compvis_ldm.unet_rules(module)
    flat: dict[Any, Any] = flatten_dict(params)  # pyright: ignore[reportAssignmentType]
    found = []
    for path, leaf in flat.items():
        if path[-1] == "kernel":
            name = _module_name(path, RULES[network])
            names = [prefix + name for prefix in DOTTED[network]]
            joined = [name, _module_name(path, compvis)] if module else [name]
            names += ["diffusion_model." + one for one in joined[1:]]
            joined = [one.replace(".", "_") for one in joined]
            names += [prefix + one for prefix in JOINED[network] for one in joined]
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
    try:
        for pattern, other in (said("alpha_pattern") or {}).items():
            value = other if re.match(rf"(.*\.)?({pattern})$", layer) else value
    except re.error as error:
        raise ValueError(f"{HEADER} has a broken alpha_pattern ({error})") from error
    # Rank-stabilised LoRA (arXiv:2312.03732) divides alpha by the rank's root.
    return lambda rank: float(value) * (math.sqrt(rank) if said("use_rslora") else 1.0)


def _take(
    tensors: dict[str, np.ndarray],
    name: str,
    shape: tuple[int, ...],
    path: Path,
    said: Callable[[int], float] | None,
) -> dict[str, Any]:
    """A, B and maybe the magnitude of one layer whose kernel has `shape` (*window, in, out).

    Taken out of `tensors`, alpha in B: the one beside them, or as said.
    """
    down = np.asarray(tensors.pop(f"{name}.lora_A.weight"), np.float32)
    up = tensors.pop(f"{name}.lora_B.weight", None)
    if up is None:
        raise ValueError(f"{path} has {name}.lora_A but no lora_B: fetch it again")
    alpha = tensors.pop(f"{name}.alpha", None)
    up = np.asarray(up, np.float32)
    mid = tensors.pop(f"{name}.lora_mid.weight", None)
    if mid is not None:  # (rank, rank, *window), after a convolution of 1x1
        if mid.shape[:2] != down.shape[:1] * 2 or down.size != math.prod(down.shape[:2]):
            raise ValueError(
                f"{path}: {name}.lora_mid has shape {mid.shape}, which does not fit lora_down's "
                f"{down.shape}: fetch it again"
            )
        down = np.einsum("rs...,si->ri...", np.float32(mid), down.reshape(down.shape[:2]))
    *window, width, out = shape
    rank = len(down)
    if not rank or not (np.isfinite(down).all() and np.isfinite(up).all()):
        raise ValueError(f"{path}: {name} is of rank {rank}, or not finite: fetch it again")
    wide = (rank, width, *window)
    fits = up.size == out * rank and up.shape[:2] == (out, rank)
    if down.shape[:2] != wide[:2] or down.size != math.prod(wide) or not fits:
        raise ValueError(
            f"{path}: {name} has updates of shapes {down.shape} and {up.shape}, but the layer has "
            f"{width} inputs, {out} outputs and a window of {tuple(window)}: it was made for "
            "another network"
        )
    if alpha is None and said is not None:
        alpha = said(rank)
    factor = _number(alpha, f"{path}: {name}.alpha") / rank if alpha is not None else 1.0
    found = {
        "down": jnp.asarray(np.moveaxis(down.reshape(wide), (0, 1), (-1, -2))),
        "up": jnp.asarray(up.reshape(out, rank).T * np.float32(factor)),
    }
    return found | _magnitude(tensors, name, out, path)


def _number(value: Any, what: str) -> float:
    if np.size(value) != 1:
        raise ValueError(f"{what} has {np.size(value)} values, not one: fetch it again")
    if not math.isfinite(number := np.asarray(value, np.float32).item()):
        raise ValueError(f"{what}={number} is not finite: fetch it again")
    return number


def _magnitude(
    tensors: dict[str, np.ndarray], name: str, out: int, path: Path
) -> dict[str, jnp.ndarray]:
    """DoRA's, (out,); {} where there is none. LyCORIS' per input has another shape."""
    for key in (f"{name}.magnitude", f"{name}.dora_scale"):
        held = tensors.pop(key, None)
        if held is None:
            continue
        theirs = (1, out) if key.endswith("magnitude") and held.ndim > 2 else (out, 1)
        if held.size != out or held.shape[:2] not in ((out,), theirs):
            raise ValueError(
                f"{path}: {key} has shape {held.shape}, but only one magnitude an output, here "
                f"{out}, is supported: LyCORIS writes it with wd_on_output=True"
            )
        return {"magnitude": jnp.asarray(held.reshape(out), jnp.float32)}
    return {}
