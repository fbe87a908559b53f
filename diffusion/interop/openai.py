"""U-Nets of OpenAI's improved-diffusion and guided-diffusion (ADM), `.pt` files of one state dict.

Their names are those of CompVis's U-Nets (`compvis_ldm.py`), which were made from them, without a
prefix. Widths, levels, attention, classes and resampling follow from the tensors; not told are the
heads, the noise, and the order of rows in qkv: "legacy", a head's q, k and v after each other, or
"new" (use_new_attention_order), all heads' q, then all k, all v. `PUBLISHED` has them of the files
that were published (flags in the READMEs of openai/improved-diffusion and openai/guided-diffusion).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diffusion.interop import compvis_ldm
from diffusion.interop.files import Weights
from diffusion.models.unet import UNet

ORDERS = ("legacy", "new")


@dataclass(frozen=True)
class Published:
    """What a file does not say. `heads`, `head_dim`: one of them; `schedule` as in configs."""

    name: str
    size: int
    heads: int | None
    head_dim: int | None
    schedule: Mapping[str, Any]
    order: str = "legacy"


LINEAR = {"name": "ddpm_linear", "num_steps": 1000}
QUICK = {"name": "cosine", "num_steps": 4000, "time_scale": 0.25}  # rescale_timesteps, the default
SLOW = {"name": "cosine", "num_steps": 4000}
NO, YES = False, True
# By channels, multipliers, blocks, levels with attention, classes, residual blocks that resample.
PUBLISHED = {
    (128, (1, 2, 2, 2), 3, (NO, YES, YES, NO), None, NO): Published(
        "improved-diffusion's cifar10_uncond", 32, 4, None, QUICK
    ),
    (128, (1, 2, 3, 4), 3, (NO, NO, YES, YES), None, NO): Published(
        "improved-diffusion's imagenet64_uncond", 64, 4, None, QUICK
    ),
    (192, (1, 2, 3, 4), 3, (NO, NO, YES, YES), 1000, NO): Published(
        "improved-diffusion's imagenet64_cond", 64, 4, None, SLOW
    ),
    (128, (1, 1, 2, 2, 4, 4), 2, (NO, NO, NO, NO, YES, NO), None, NO): Published(
        "improved-diffusion's lsun_uncond", 256, 1, None, LINEAR
    ),
    (192, (1, 2, 3, 4), 3, (NO, YES, YES, YES), 1000, YES): Published(
        "guided-diffusion's 64x64_diffusion", 64, None, 64, LINEAR | {"name": "cosine"}, "new"
    ),
    (256, (1, 1, 2, 3, 4), 2, (NO, NO, YES, YES, YES), 1000, YES): Published(
        "guided-diffusion's 128x128_diffusion", 128, 4, None, LINEAR
    ),
    (256, (1, 1, 2, 2, 4, 4), 2, (NO, NO, NO, YES, YES, YES), 1000, YES): Published(
        "guided-diffusion's 256x256_diffusion", 256, None, 64, LINEAR
    ),
    (256, (1, 1, 2, 2, 4, 4), 2, (NO, NO, NO, YES, YES, YES), None, YES): Published(
        "guided-diffusion's 256x256_diffusion_uncond or LSUN", 256, None, 64, LINEAR
    ),
}


def published(module: UNet) -> Published | None:
    """The published file of this architecture; None: there is none."""
    shape = (module.channels, module.multipliers, module.blocks, module.attention)
    return PUBLISHED.get((*shape, module.num_classes, module.resblock_updown))


def infer_unet(weights: Weights, source: object) -> UNet:
    """The U-Net of these tensors, with one head. ValueError for what is none, or not ours."""
    tensors = weights.tensors
    if "input_blocks.0.0.weight" not in tensors or "out.2.weight" not in tensors:
        kind = "a classifier's half" if "input_blocks.0.0.weight" in tensors else "no U-Net"
        raise ValueError(
            f"{source} holds {kind} (no out.2.weight): give a diffusion model's file of OpenAI's"
        )
    levels = _levels(tensors)
    channels = tensors["time_embed.0.weight"].shape[1]
    first, read = tensors["input_blocks.0.0.weight"].shape[:2]
    widths = [width for width, _, _ in levels]
    blocks = {count for _, count, _ in levels}
    wrong = ""
    if first != channels:
        wrong = f"its first level has {first} channels and its time embedding is of {channels}"
    elif len(blocks) > 1 or any(width % channels for width in widths):
        wrong = f"levels of widths {widths} and blocks {sorted(blocks)} are not those of one U-Net"
    elif read not in (1, 3):
        wrong = f"it reads {read} channels, as an upsampler does that is told a small picture"
    if wrong:
        raise ValueError(f"{source} is not supported: {wrong}")
    time = tensors["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    resampling = any(re.match(r"input_blocks\.\d+\.0\.op\.", name) for name in tensors)
    label = tensors.get("label_emb.weight")
    return UNet(
        out_channels=tensors["out.2.weight"].shape[0],
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        blocks=blocks.pop() - 1,
        attention=tuple(attends for _, _, attends in levels),
        num_classes=None if label is None else label.shape[0],
        epsilon=1e-5,
        scale_shift=time == 2 * widths[0],
        resblock_updown=not resampling and len(levels) > 1,
        downsample_padding=1,
        flip_sin_to_cos=True,
        freq_shift=0,
    )


def _levels(tensors: Mapping[str, Any]) -> list[tuple[int, int, bool]]:
    """(width, blocks on the way up, attention) of each level, the finest first."""
    levels: list[tuple[int, int, bool]] = []
    count, attends, n = 0, False, 0
    last = "0.out_layers.3.weight"
    while f"output_blocks.{n}.{last}" in tensors:
        stem, count, n = f"output_blocks.{n}.", count + 1, n + 1
        attends = attends or stem + "1.qkv.weight" in tensors
        up = [f"{stem}{i}.{end}" for i in (1, 2) for end in ("conv.weight", "in_layers.2.weight")]
        if any(name in tensors for name in up) or f"output_blocks.{n}.{last}" not in tensors:
            levels.insert(0, (tensors[stem + last].shape[0], count, attends))
            count, attends = 0, False
    return levels


def read_unet(weights: Weights, module: UNet, order: str = "legacy") -> dict[str, Any]:
    """The parameters of `module`, whose heads are right. ValueError as `compvis_ldm.read_unet`."""
    if order not in ORDERS:
        raise ValueError(f"order={order!r} of qkv is unknown: use one of {', '.join(ORDERS)}")
    tensors = dict(weights.tensors)
    for name, tensor in tensors.items():
        if order == "new" and re.search(r"\.qkv\.(weight|bias)$", name):
            heads = compvis_ldm.heads_of(module, len(tensor) // 3)
            parts = tensor.reshape(3, heads, -1, *tensor.shape[1:])
            tensors[name] = np.swapaxes(parts, 0, 1).reshape(tensor.shape)
    prefix = compvis_ldm.UNET
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    files = {prefix + name: file for name, file in weights.files.items()}
    return compvis_ldm.read_unet(Weights(named, files, weights.directory), module)


def with_heads(module: UNet, heads: int | None, head_dim: int | None) -> UNet:
    return replace(module, heads=heads, head_dim=head_dim)
