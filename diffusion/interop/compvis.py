"""CompVis's first stages: `.ckpt` (read without running it) and single-file `.safetensors`.

Latent Diffusion and Stable Diffusion put all networks into one file; its first stage is under
`first_stage_model.`, or at the top where the file holds nothing else. With L levels:

    CompVis (ldm/modules/diffusionmodules/model.py)     here
    encoder.down.i.block.j, .attn.j, .downsample        encoder/down_i_res_j, _attn_j, _sample
    decoder.up.i.block.j, .attn.j, .upsample            decoder/up_(L-1-i)_res_j, ...
    mid.block_1, mid.attn_1, mid.block_2                mid_res_0, mid_attn, mid_res_1
    q, k, v, proj_out (1x1 convolutions), norm          to_q, to_k, to_v, to_out, group_norm
    nin_shortcut                                        conv_shortcut

No config goes with the file: what the network is follows from which tensors there are, and their
shapes.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.interop.files import Rules, Weights, to_params, to_tensors
from diffusion.interop.single_file import read_file
from diffusion.models.autoencoder import AutoencoderKL, VQModel

PREFIX = "first_stage_model."
PARTS = r"^(encoder|decoder|quant_conv|post_quant_conv|quantize)\."


def rules(levels: int) -> Rules:
    """`files.torch_name`'s rules of a network of so many levels."""
    ups = ((rf"/up_{i}_(?=res|attn|sample)", rf"/up/{levels - 1 - i}_") for i in range(levels))
    return (
        *ups,
        (r"/down_(\d+)_(?=res|attn|sample)", r"/down/\1_"),
        (r"/(down|up)/(\d+)_res_(\d+)/", r"/\1/\2/block/\3/"),
        (r"/(down|up)/(\d+)_attn_(\d+)/", r"/\1/\2/attn/\3/"),
        (r"/(down|up)/(\d+)_sample/", r"/\1/\2/\1sample/"),
        (r"/mid_res_0/", r"/mid/block_1/"),
        (r"/mid_res_1/", r"/mid/block_2/"),
        (r"/mid_attn/", r"/mid/attn_1/"),
        (r"/attention/to_(q|k|v)/", r"/\1/"),
        (r"/attention/to_out/", r"/proj_out/"),
        (r"/group_norm/", r"/norm/"),
        (r"/conv_shortcut/", r"/nin_shortcut/"),
        (r"/codebook/", r"/quantize/embedding/"),
    )


def load_compvis_autoencoder(
    path: str | os.PathLike, dtype: Any = None, groups: int = 32
) -> tuple[AutoencoderKL | VQModel, dict[str, Any]]:
    """(module, float32 parameters) of the first stage in one CompVis file.

    `dtype`: what the module computes in. `groups`: of its norms, which no tensor tells; LDM's are
    32. ValueError naming the file where it is broken or would run code, and where it holds no first
    stage of LDM.
    """
    weights = first_stage_tensors(read_file(path), path)
    module = _module(weights.tensors, path, {"dtype": dtype, "groups": groups})
    size = module.downsampling
    image = jnp.zeros((1, size, size, module.image_channels))
    shapes = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
    return module, to_params(weights, shapes, rules(len(module.multipliers)))


def first_stage_tensors(weights: Weights, path: object) -> Weights:
    """Encoder, decoder and bottleneck, without prefix; losses, averages and other networks left."""
    stem = PREFIX if any(name.startswith(PREFIX) for name in weights.tensors) else ""
    kept = {n.removeprefix(stem): t for n, t in weights.tensors.items() if n.startswith(stem)}
    kept = {name: tensor for name, tensor in kept.items() if re.match(PARTS, name)}
    if "encoder.conv_in.weight" not in kept:
        raise ValueError(
            f"{path} holds no first stage (no {PREFIX}encoder.conv_in.weight): give a checkpoint "
            "of CompVis's Latent Diffusion or Stable Diffusion"
        )
    return Weights(kept, {name: weights.files[stem + name] for name in kept}, weights.directory)


def to_compvis_tensors(module: AutoencoderKL | VQModel, params: Any) -> dict[str, Any]:
    """Tensors by CompVis's names, without prefix; attention as 1x1 convolutions."""
    tensors = to_tensors(params, rules(len(module.multipliers)))
    attention = r"\.attn_?\d*\.?\d*\.(q|k|v|proj_out)\.weight$"
    return {
        name: tensor[..., None, None] if re.search(attention, name) else tensor
        for name, tensor in tensors.items()
    }


def _module(
    tensors: Mapping[str, Any], path: object, more: dict[str, Any]
) -> AutoencoderKL | VQModel:
    """The network whose tensors these are."""
    try:
        return _infer(tensors, more)
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(
            f"{path} holds a first stage that is not LDM's ({error}): only its KL and VQ "
            "autoencoders are read"
        ) from error


def _infer(tensors: Mapping[str, Any], more: dict[str, Any]) -> AutoencoderKL | VQModel:
    levels = 1 + _last(tensors, r"^encoder\.down\.(\d+)\.block\.")
    channels, image_channels = tensors["encoder.conv_in.weight"].shape[:2]
    widths = [tensors[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)]
    if any(width % channels for width in widths):
        raise ValueError(f"widths {widths} are no multiples of {channels}")
    embed, z_channels = (tensors["post_quant_conv.weight"].shape[i] for i in (1, 0))
    fields = {
        "image_channels": image_channels,
        "channels": channels,
        "multipliers": tuple(width // channels for width in widths),
        "blocks": 1 + _last(tensors, r"^encoder\.down\.0\.block\.(\d+)\."),
        "attention": tuple(f"encoder.down.{i}.attn.0.q.weight" in tensors for i in range(levels)),
        "mid_attention": "encoder.mid.attn_1.q.weight" in tensors,
        "z_channels": z_channels,
        "embed_channels": None if embed == z_channels else embed,
        **more,
    }
    if "quantize.embedding.weight" in tensors:
        return VQModel(num_codes=tensors["quantize.embedding.weight"].shape[0], **fields)
    return AutoencoderKL(**fields)


def _last(tensors: Mapping[str, Any], pattern: str) -> int:
    found = [int(match.group(1)) for name in tensors if (match := re.match(pattern, name))]
    if not found:
        raise ValueError(f"no tensor is named {pattern}")
    return max(found)
