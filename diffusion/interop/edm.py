"""EDM's networks (NVlabs/edm: training/networks.py): DDPM++, NCSN++ and ADM, by their names.

Blocks are named by their resolution r x r:

    theirs                              here
    enc.RxR_conv                        conv_in
    enc.rxr_block{j}, rxr_down          down_i_res_j with down_i_attn_j, down_i_sample
    enc.rxr_aux_residual                picture_i
    dec.rxr_in0, rxr_in1                mid_res_0 with mid_attn, mid_res_1
    dec.rxr_block{j}, rxr_up            up_i_res_j with up_i_attn_j, up_i_sample
    dec.RxR_aux_norm, RxR_aux_conv      norm_out, conv_out (ADM: out_norm, out_conv)
    norm0, conv0, affine, norm1, conv1  norm1, conv1, time_emb_proj, norm2, conv2
    skip, norm2, qkv, proj              conv_shortcut, group_norm, to_q to_k to_v, to_out
    map_layer0, map_layer1, map_label   time_1, time_2, label (ADM: class_embedding)
    map_augment, map_noise.freqs        augment, fourier

Rows of qkv are a channel's q, k and v after each other, a head's channels together.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.interop.files import Rules, Weights, refuse_unknown, require, to_params, to_tensors
from diffusion.interop.persistent import Network, read_network
from diffusion.models.song import SongUNet
from diffusion.models.unet import UNet

# What the classes are made of by themselves, for arguments that a file does not give.
SHARED: dict[str, Any] = {"label_dim": 0, "augment_dim": 0, "dropout": 0.1}
SONG = SHARED | {"model_channels": 128, "channel_mult": [1, 2, 2, 2], "num_blocks": 4}
SONG |= {"attn_resolutions": [16]}
ADM = SHARED | {"model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3}
ADM |= {"attn_resolutions": [32, 16, 8]}
# What is supported; the first is the class's default.
FIXED = {"channel_mult_emb": (4,), "label_dropout": (0,)}
KINDS = {
    "ncsnpp": {
        "embedding_type": ("positional", "fourier"),
        "channel_mult_noise": (1, 2),
        "encoder_type": ("standard", "residual"),
        "resample_filter": ((1, 1), (1, 3, 3, 1)),
    }
}


def load_edm(path: Path) -> tuple[UNet, dict[str, Any], Network]:
    """(module, parameters, what the file says) of an EDM `.pkl`, none of whose code is run.

    ValueError naming the file for another network's, or what the modules cannot express.
    """
    found = read_network(path)
    inner = found.inner.get("model")
    read = inner is not None and inner.name in ("SongUNet", "DhariwalUNet")
    if found.name != "EDMPrecond" or inner is None or not read:
        kind = found.name if inner is None else f"{found.name} of {inner.name}"
        raise ValueError(
            f"{path} holds a {kind}, and what is read is EDM's EDMPrecond of SongUNet or "
            "DhariwalUNet: give such a file (EDM2's magnitude-preserving networks, and the "
            "baselines' preconditioning, are not here)"
        )
    known = {*_OTHERS, *SONG, *FIXED, *KINDS["ncsnpp"], "img_channels", "model_type"}
    known |= {"use_fp16", "sigma_min", "sigma_max", "sigma_data"}  # fp16: of what it computes in
    refuse_unknown(found.settings, known, path)
    module = describe(inner, path)
    tensors = {k.removeprefix("model."): v for k, v in found.tensors().items()}
    side, channels = (found.settings[k] for k in ("img_resolution", "img_channels"))
    held = Weights(tensors, dict.fromkeys(tensors, path), path.parent)
    return module, read_unet(held, module, side, channels), found


def describe(inner: Network, path: Path) -> UNet:
    """The module that a network's arguments speak of."""
    song = inner.name == "SongUNet"
    given = dict(inner.settings)
    refuse_unknown(given, {*SONG, *FIXED, *_OTHERS, *(KINDS["ncsnpp"] if song else ())}, path)
    require(given, FIXED | ({"decoder_type": ("standard",)} if song else {}), path)
    said = (SONG if song else ADM) | given
    channels, mult = said["model_channels"], tuple(said["channel_mult"])
    sides = [said["img_resolution"] >> level for level in range(len(mult))]
    if channels * min(mult) < 128 or channels % 32 or (not song and mult[0] != 1):
        raise ValueError(
            f"{path}: model_channels={channels} with channel_mult={list(mult)} is not supported: "
            "every level needs 128 channels or more in whole 32s, and ADM's first the multiplier 1"
        )
    shared: dict[str, Any] = {
        "out_channels": said["out_channels"],
        "channels": channels,
        "multipliers": mult,
        "blocks": said["num_blocks"],
        "attention": tuple(side in said["attn_resolutions"] for side in sides),
        "num_classes": said["label_dim"] or None,
        "dropout": float(said["dropout"]),
    }
    if song:
        augment = said["augment_dim"]
        return SongUNet(**shared, augment_dim=augment, ncsnpp=_is_ncsnpp(given, path))
    require(given, {"augment_dim": (0,)}, path)
    return UNet(
        **shared,
        heads=None,
        head_dim=64,
        epsilon=1e-5,
        scale_shift=True,
        resblock_updown=True,
        flip_sin_to_cos=True,
        freq_shift=0,
    )


_OTHERS = ("img_resolution", "in_channels", "out_channels", "decoder_type")


def _is_ncsnpp(given: Mapping[str, Any], path: Path) -> bool:
    """Whether it is NCSN++ rather than DDPM++. ValueError for what is neither."""
    table = KINDS["ncsnpp"]
    require(given, table, path)
    values = {key: given.get(key, values[0]) for key, values in table.items()}
    values["resample_filter"] = tuple(values["resample_filter"])
    found = {key: table[key].index(value) for key, value in values.items()}
    if len(set(found.values())) > 1:
        raise ValueError(
            f"{path}: {values} is neither DDPM++ (the first of each of {table}) nor NCSN++ (the "
            "second), which alone are supported"
        )
    return bool(found["encoder_type"])


def rules(module: UNet, side: int) -> Rules:
    """`files.torch_name`'s rules of this network, for pictures of `side` pixels."""
    song, last = isinstance(module, SongUNet), module.levels - 1
    at = [f"{side >> level}x{side >> level}" for level in range(module.levels)]
    places = {"conv_in": f"enc/{at[0]}_conv", "time_1": "map_layer0", "time_2": "map_layer1"}
    places |= {"label": "map_label", "augment": "map_augment", "class_embedding": "map_label"}
    out = (f"dec/{at[0]}_aux_norm", f"dec/{at[0]}_aux_conv") if song else ("out_norm", "out_conv")
    places |= dict(zip(("norm_out", "conv_out"), out))
    places |= {"mid_res_0": f"dec/{at[last]}_in0", "mid_attn": f"dec/{at[last]}_in0"}
    places["mid_res_1"] = f"dec/{at[last]}_in1"
    for i in range(module.levels):
        level = last - i
        places |= {f"down_{i}_{kind}_(\\d+)": f"enc/{at[i]}_block\\1" for kind in ("res", "attn")}
        places |= {f"up_{i}_{kind}_(\\d+)": f"dec/{at[level]}_block\\1" for kind in ("res", "attn")}
        if i < last:
            places[f"down_{i}_sample"] = f"enc/{at[i + 1]}_down"
            places[f"picture_{i}"] = f"enc/{at[i + 1]}_aux_residual"
            places[f"up_{i}_sample"] = f"dec/{at[level - 1]}_up"
    within = {"norm1": "norm0", "conv1": "conv0", "time_emb_proj": "affine"}
    within |= {"norm2": "norm1", "conv2": "conv1"}
    return (
        *((rf"^/{ours}/", f"/{theirs}/") for ours, theirs in places.items()),
        *((rf"^(/(?:enc|dec)/.*)/{ours}/$", rf"\1/{theirs}/") for ours, theirs in within.items()),
        (r"/conv_shortcut/", "/skip/"),
        (r"/group_norm/", "/norm2/"),
        (r"/attention/to_out/", "/proj/"),
        (r"/attention/", "/"),
    )


def read_unet(weights: Weights, module: UNet, side: int, channels: int) -> dict[str, Any]:
    """The network's parameters. ValueError for a tensor missing, of another shape, or left over."""
    weights = weights.without(r"resample_filter$")
    tensors, files = dict(weights.tensors), dict(weights.files)
    for name in weights.tensors:
        if match := re.match(r"(.*)\.qkv\.(weight|bias)$", name):
            tensor, file = tensors.pop(name), files.pop(name)
            for i, key in enumerate(("to_q", "to_k", "to_v")):
                part = f"{match[1]}.{key}.{match[2]}"
                tensors[part], files[part] = tensor[i::3], file
    if "map_noise.freqs" in tensors:
        tensors["fourier"] = tensors.pop("map_noise.freqs")
        files["fourier"] = files.pop("map_noise.freqs")
    if not isinstance(module, SongUNet) and "map_label.weight" in tensors:
        tensors["map_label.weight"] = np.transpose(tensors["map_label.weight"])
    held = Weights(tensors, files, weights.directory)
    return to_params(held, shapes(module, channels), rules(module, side))


def unet_tensors(module: UNet, params: Any, side: int) -> dict[str, np.ndarray]:
    """`read_unet` backwards: tensors by EDM's names."""
    found = to_tensors(params, rules(module, side))
    for name in list(found):
        if match := re.match(r"(.*)\.to_q\.(weight|bias)$", name):
            parts = [found.pop(f"{match[1]}.{key}.{match[2]}") for key in ("to_q", "to_k", "to_v")]
            joined = np.stack(parts, 1).reshape(-1, *parts[0].shape[1:])
            found[f"{match[1]}.qkv.{match[2]}"] = (
                joined[..., None, None] if joined.ndim == 2 else joined
            )
        elif re.search(r"\.proj\.weight$", name) and found[name].ndim == 2:
            found[name] = found[name][..., None, None]
    if "fourier" in found:
        found["map_noise.freqs"] = found.pop("fourier")
    if not isinstance(module, SongUNet) and "map_label.weight" in found:
        found["map_label.weight"] = np.transpose(found["map_label.weight"])
    return found


def shapes(module: UNet, channels: int) -> Any:
    """The tree of parameter shapes, without computing anything."""
    size = module.size_multiple
    x, t = jnp.zeros((1, size, size, channels)), jnp.zeros(1)
    labels = None if module.num_classes is None else jnp.zeros(1, int)
    return jax.eval_shape(lambda: module.init(jax.random.key(0), x, t, labels=labels))["params"]
