"""U-Nets of OpenAI's improved-diffusion and guided-diffusion (ADM), upsamplers and classifiers of
noised pictures among them: `.pt` files of one state dict.

Their names are those of CompVis's U-Nets (`compvis_ldm.py`), which were made from them, without a
prefix. Widths, levels, attention, classes and resampling follow from the tensors; not told are the
heads, the noise, and the order of rows in qkv: "legacy", a head's q, k and v after each other, or
"new" (use_new_attention_order), all heads' q, then all k, all v. `PUBLISHED` has them of the files
that were published (flags in the READMEs of openai/improved-diffusion and openai/guided-diffusion).
A classifier's pooling has the new order always.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.interop import compvis_ldm
from diffusion.interop.files import Weights, to_params
from diffusion.models.noisy_classifier import NoisyClassifier
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
    small: int = 0  # pixels of the picture that an upsampler is told; 0: it is none


LINEAR = {"name": "ddpm_linear", "num_steps": 1000}
QUICK = {"name": "cosine", "num_steps": 4000, "time_scale": 0.25}  # rescale_timesteps, the default
SLOW = {"name": "cosine", "num_steps": 4000}
LONG = {"name": "ddpm_linear", "num_steps": 4000, "beta_start": 0.1 / 4000, "beta_end": 20 / 4000}
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
    (192, (1, 1, 2, 2, 4, 4), 2, (NO, NO, NO, NO, YES, YES), 1000, NO): Published(
        "improved-diffusion's upsample_cond", 256, 4, None, LONG, small=64
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
    (256, (0.5, 1, 1, 2, 2, 4, 4), 2, (NO, NO, NO, NO, YES, YES, YES), 1000, YES): Published(
        "guided-diffusion's 512x512_diffusion", 512, None, 64, LINEAR
    ),
    (192, (1, 1, 2, 2, 4, 4), 2, (NO, NO, NO, YES, YES, YES), 1000, YES): Published(
        "guided-diffusion's 64_256_upsampler", 256, 4, None, LINEAR, small=64
    ),
    (192, (1, 1, 2, 2, 4, 4), 2, (NO, NO, NO, NO, YES, YES), 1000, YES): Published(
        "guided-diffusion's 128_512_upsampler", 512, None, 64, LINEAR, small=128
    ),
}
# The sizes of the published classifiers by their number of input blocks.
CLASSIFIERS = {20: 64, 15: 128, 18: 256, 21: 512}


def published(module: UNet) -> Published | None:
    """The published file of this architecture; None: there is none."""
    shape = (module.channels, module.multipliers, module.blocks, module.attention)
    return PUBLISHED.get((*shape, module.num_classes, module.resblock_updown))


def infer_unet(weights: Weights, source: object) -> UNet:
    """The U-Net of these tensors, with one head. ValueError for what is none, or not ours."""
    tensors = weights.tensors
    if "input_blocks.0.0.weight" not in tensors or "out.2.weight" not in tensors:
        kind = "half a U-Net" if "input_blocks.0.0.weight" in tensors else "no U-Net"
        raise ValueError(
            f"{source} holds {kind} (no out.2.weight): give a diffusion model's file of OpenAI's"
        )
    levels = _levels(tensors)
    wide, channels = tensors["time_embed.0.weight"].shape
    first, read = tensors["input_blocks.0.0.weight"].shape[:2]
    widths = [width for width, _, _ in levels]
    blocks = {count for _, count, _ in levels}
    wrong = ""
    if first != min(channels, widths[0]) or wide != 4 * channels:
        wrong = f"its first level has {first} channels and its time embedding is of {channels}"
    elif len(blocks) > 1 or any(2 * width % channels for width in widths):
        wrong = f"levels of widths {widths} and blocks {sorted(blocks)} are not those of one U-Net"
    elif read not in (1, 3, 6):  # 6: an upsampler's
        wrong = f"it reads {read} channels, and of pictures one or three are read, or a pair's six"
    if wrong:
        raise ValueError(f"{source} is not supported: {wrong}")
    time = tensors["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    resampling = any(re.match(r"input_blocks\.\d+\.0\.op\.", name) for name in tensors)
    label = tensors.get("label_emb.weight")
    return UNet(
        out_channels=tensors["out.2.weight"].shape[0],
        channels=channels,
        multipliers=tuple(_whole(width / channels) for width in widths),
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


def _whole(number: float) -> int | float:
    return int(number) if number == int(number) else number


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


# -- classifiers ----------------------------------------------------------------------------------

POOL = "out.2."


def is_classifier(weights: Weights) -> bool:
    return f"{POOL}qkv_proj.weight" in weights.tensors


def classifier_size(weights: Weights, source: object) -> int:
    """Pixels a side of a published classifier's pictures. ValueError for one that is none."""
    blocks = {name.split(".")[1] for name in weights.tensors if name.startswith("input_blocks.")}
    if len(blocks) not in CLASSIFIERS:
        raise ValueError(
            f"{source} is a classifier of {len(blocks)} input blocks, as none that OpenAI "
            "published: give its config, --config=configs/adm_classifier.py:SIZE with its fields"
        )
    return CLASSIFIERS[len(blocks)]


def read_classifier(weights: Weights, module: NoisyClassifier, side: int) -> dict[str, Any]:
    """The parameters of `module`, for pictures of `side` pixels. ValueError as `read_unet`."""
    tensors, files = dict(weights.tensors), dict(weights.files)
    for name in [name for name in tensors if name.startswith(POOL)]:
        tensor, file = tensors.pop(name), files.pop(name)
        kind = name.rpartition(".")[2]
        found = {f"pool.to_out.0.{kind}": tensor}
        if "qkv_proj" in name:
            keys = ("to_q", "to_k", "to_v")
            found = {f"pool.{k}.{kind}": part for k, part in zip(keys, np.split(tensor, 3))}
        elif name == f"{POOL}positional_embedding":
            found = {"positions": np.transpose(tensor)}
        tensors, files = tensors | found, files | dict.fromkeys(found, file)
    held = compvis_ldm.split_qkv(Weights(tensors, files, weights.directory), module)
    return to_params(held, classifier_shapes(module, side), compvis_ldm.unet_rules(module))


def classifier_shapes(module: NoisyClassifier, side: int) -> Any:
    x, t = jnp.zeros((1, side, side, 3)), jnp.zeros(1)
    return jax.eval_shape(lambda: module.init(jax.random.key(0), x, t))["params"]


def with_heads(module: UNet, heads: int | None, head_dim: int | None) -> UNet:
    return replace(module, heads=heads, head_dim=head_dim)
