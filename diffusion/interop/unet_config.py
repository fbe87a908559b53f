"""The configs of Diffusers' two U-Net classes, translated to our `UNet` and back.

`attention_head_dim` is the width of a head in UNet2DModel (null: one), and the number of heads in
UNet2DConditionModel.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion.interop.files import refuse_unknown, require, whole_numbers
from diffusion.models.unet import UNet

PLAIN, CONDITIONAL = "UNet2DModel", "UNet2DConditionModel"
# (attention, resampling) of a level by its block's name; None: as `downsample_type` says.
BLOCKS = {
    "DownBlock2D": ("none", "conv"),
    "ResnetDownsampleBlock2D": ("none", "resnet"),
    "AttnDownBlock2D": ("self", None),
    "CrossAttnDownBlock2D": ("cross", "conv"),
    "UpBlock2D": ("none", "conv"),
    "ResnetUpsampleBlock2D": ("none", "resnet"),
    "AttnUpBlock2D": ("self", None),
    "CrossAttnUpBlock2D": ("cross", "conv"),
}
NAMES = {
    ("none", "conv"): ("DownBlock2D", "UpBlock2D"),
    ("none", "resnet"): ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
    **dict.fromkeys((("self", "conv"), ("self", "resnet")), ("AttnDownBlock2D", "AttnUpBlock2D")),
    ("cross", "conv"): ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"),
}

# What the module can do of each option; the first is Diffusers' default.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    **dict.fromkeys(("downsample_type", "upsample_type"), ("conv", "resnet")),
    "downsample_padding": (1, 0),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "mid_block_only_cross_attention": (None, False),
    **dict.fromkeys(("mid_block_scale_factor", "resnet_out_scale_factor"), (1,)),
    "attention_type": ("default",),
    **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), (3,)),
    **dict.fromkeys(("only_cross_attention", "dual_cross_attention"), (False,)),
    **dict.fromkeys(("resnet_skip_time_act", "class_embeddings_concat"), (False,)),
    **dict.fromkeys(("class_embed_type", "addition_embed_type", "encoder_hid_dim"), (None,)),
    **dict.fromkeys(("num_attention_heads", "cross_attention_norm"), (None,)),
    **dict.fromkeys(("time_embedding_act_fn", "timestep_post_act"), (None,)),
    **dict.fromkeys(("encoder_hid_dim_type", "reverse_transformer_layers_per_block"), (None,)),
}

# Read below, or of no effect: on other keys' options, on float32, or (Flax's two) on values.
OTHERS = {
    *("use_memory_efficient_attention", "split_head_dim"),
    *("cross_attention_dim", "use_linear_projection", "num_class_embeds", "time_embedding_dim"),
    *("attn_norm_num_groups", "sample_size", "upcast_attention", "num_train_timesteps"),
    *("addition_time_embed_dim", "addition_embed_type_num_heads", "time_cond_proj_dim"),
    "projection_class_embeddings_input_dim",
}
PLAIN_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("in_channels", "out_channels"), 3),
    "block_out_channels": (224, 448, 672, 896),
    "down_block_types": ("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
    "up_block_types": ("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
    "mid_block_type": "UNetMidBlock2D",
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "add_attention": True,
}
CONDITIONAL_DEFAULTS: dict[str, Any] = PLAIN_DEFAULTS | {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "transformer_layers_per_block": 1,
}


def read_unet_config(config: Mapping[str, Any], source: Path) -> tuple[UNet, int, int | None]:
    """(module, channels of its input, width of its context or None).

    ValueError naming `source` and the key for what the module cannot express.
    """
    named = config.get("_class_name")
    conditional = named == CONDITIONAL if named else "cross_attention_dim" in config
    require(config, SUPPORTED, source)
    refuse_unknown(config, SUPPORTED.keys() | CONDITIONAL_DEFAULTS.keys() | OTHERS, source)
    config = {**(CONDITIONAL_DEFAULTS if conditional else PLAIN_DEFAULTS), **config}
    width = _per_level(config.get("cross_attention_dim", 1280), len(config["block_out_channels"]))
    if conditional and not isinstance(width, int):
        raise ValueError(f"{source}: cross_attention_dim={width} must be one number")
    module = _module(config, conditional, source)
    return module, config["in_channels"], width if conditional else None


def _module(config: Mapping[str, Any], conditional: bool, source: Path) -> UNet:
    attention, resampling = _levels(config, "cross" if conditional else "self", source)
    _check_rest(config, conditional, source)
    widths = config["block_out_channels"]
    levels = len(widths)
    depth = _per_level(config["transformer_layers_per_block"], levels) if conditional else 0
    return UNet(
        out_channels=config["out_channels"],
        channels=widths[0],
        multipliers=tuple(w // widths[0] if w % widths[0] == 0 else w / widths[0] for w in widths),
        blocks=_per_level(config["layers_per_block"], levels),
        attention=tuple(kind != "none" for kind in attention),
        mid_attention=conditional or config["add_attention"],
        **_heads(_per_level(config["attention_head_dim"], levels), conditional),
        transformer_depth=depth,
        linear_projection=config.get("use_linear_projection", False),
        num_classes=config.get("num_class_embeds"),
        groups=config["norm_num_groups"],
        epsilon=config["norm_eps"],
        dropout=config["dropout"],
        scale_shift=config.get("resnet_time_scale_shift") == "scale_shift",
        resblock_updown=resampling == "resnet",
        downsample_padding=(0, 1) if config.get("downsample_padding") == 0 else 1,
        flip_sin_to_cos=config["flip_sin_to_cos"],
        freq_shift=config["freq_shift"],
        guidance_width=config.get("time_cond_proj_dim") or 0,
    )


def _heads(value: Any, conditional: bool) -> dict[str, Any]:
    if value is None:
        return {"heads": 1, "head_dim": None}
    return {"heads": value, "head_dim": None} if conditional else {"heads": None, "head_dim": value}


def _per_level(value: Any, levels: int) -> Any:
    """One value where all levels have the same, else a tuple (config lists are not hashable)."""
    if not isinstance(value, list | tuple):
        return value
    return value[0] if len(value) == levels and len(set(value)) == 1 else tuple(value)


def _levels(config: Mapping[str, Any], kind: str, source: Path) -> tuple[list[str], str]:
    """Attention per level and the one way of resampling. ValueError if up is not down mirrored."""
    down, up = (
        [
            _block(name, config.get(f"{way}sample_type", "conv"), source)
            for name in config[f"{way}_block_types"]
        ]
        for way in ("down", "up")
    )
    attention = [a for a, _ in down]
    if attention != [a for a, _ in reversed(up)]:
        raise ValueError(
            f"{source}: up_block_types={config['up_block_types']} is not down_block_types="
            f"{config['down_block_types']} mirrored: only such U-Nets are supported"
        )
    if len(down) != len(config["block_out_channels"]):
        raise ValueError(
            f"{source}: {len(down)} down_block_types for {len(config['block_out_channels'])} "
            "block_out_channels: give one entry a level"
        )
    if not set(attention) <= {"none", kind}:
        raise ValueError(
            f"{source}: down_block_types={config['down_block_types']} has attention of a kind not "
            f"supported in this class: only {kind}-attention is"
        )
    ways = {way for _, way in down[:-1] + up[:-1]} or {"conv"}
    if len(ways) > 1:
        raise ValueError(f"{source}: levels that resample in different ways are not supported")
    return attention, ways.pop()


def _block(name: str, resampling: str, source: Path) -> tuple[str, str]:
    name = name.removeprefix("UNetRes")
    if name not in BLOCKS:
        raise ValueError(f"{source}: block type {name} is not one of {', '.join(BLOCKS)}")
    attention, way = BLOCKS[name]
    return attention, way or resampling


def _check_rest(config: Mapping[str, Any], conditional: bool, source: Path) -> None:
    """What depends on other keys."""
    groups, width = config["norm_num_groups"], 4 * config["block_out_channels"][0]
    # Without attn_norm_num_groups a scale-shift U-Net has no norm before the middle's attention.
    shifted = not conditional and config.get("resnet_time_scale_shift") == "scale_shift"
    supported = {
        "mid_block_type": ("UNetMidBlock2D" + "CrossAttn" * conditional,),
        "time_embedding_dim": (None, width),
        "attn_norm_num_groups": (None, groups)[shifted and config["add_attention"] :],
    }
    require({"attn_norm_num_groups": None, **config}, supported, source)
    last = {k: v[-1] if isinstance(v, list) and v else v for k, v in config.items()}  # the middle's
    keys = ("attention_head_dim", "transformer_layers_per_block") * conditional
    whole_numbers(last, ("in_channels", "out_channels", *keys), source)


def unet_config(module: UNet, params: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a U-Net. ValueError naming the field that Diffusers cannot express."""
    levels = range(module.levels)
    depths = [module.per_level(module.transformer_depth)[i] for i in levels]
    cross = depths[-1] > 0
    _check_expressible(module, params, depths, cross)
    kind = "cross" if cross else "self"
    way = "resnet" if module.resblock_updown else "conv"
    names = [NAMES[kind if module.attention[i] else "none", way] for i in levels]
    config = {
        "_class_name": CONDITIONAL if cross else PLAIN,
        "in_channels": params["conv_in"]["kernel"].shape[-2],
        "out_channels": module.out_channels,
        "block_out_channels": [module.width(i) for i in levels],
        "layers_per_block": _blocks(module, cross),
        "down_block_types": [down for down, _ in names],
        "up_block_types": [up for _, up in reversed(names)],
        "act_fn": "silu",
        "center_input_sample": False,
        "downsample_padding": 1 if module.downsample_padding in (1, (1, 1), None) else 0,
        "dropout": module.dropout,
        "flip_sin_to_cos": module.flip_sin_to_cos,
        "freq_shift": module.freq_shift,
        "mid_block_scale_factor": 1,
        "norm_eps": module.epsilon,
        "norm_num_groups": module.groups,
        "num_class_embeds": module.num_classes,
        "resnet_time_scale_shift": "scale_shift" if module.scale_shift else "default",
        "time_embedding_type": "positional",
    }
    return config | (_conditional(module, params, depths) if cross else _plain(module, way))


def _plain(module: UNet, way: str) -> dict[str, Any]:
    return {
        "add_attention": module.mid_attention,
        "attention_head_dim": _head_dim(module),
        "attn_norm_num_groups": module.groups if module.scale_shift else None,
        "downsample_type": way,
        "upsample_type": way,
    }


def _conditional(module: UNet, params: Mapping[str, Any], depths: list[int]) -> dict[str, Any]:
    heads = [module.head_shape(i)[0] if a else 1 for i, a in enumerate(module.attention)]
    heads[-1] = module.head_shape(module.levels - 1)[0]  # the middle's
    return {
        "attention_head_dim": _per_level(heads, module.levels),
        "cross_attention_dim": params["mid_attn"]["blocks_0"]["attn2"]["to_k"]["kernel"].shape[0],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "time_cond_proj_dim": module.guidance_width or None,
        "transformer_layers_per_block": _per_level(depths, module.levels),
        "use_linear_projection": module.linear_projection,
    }


def _blocks(module: UNet, cross: bool) -> Any:
    blocks = _per_level(list(module.per_level(module.blocks)), module.levels)
    if isinstance(blocks, tuple) and not cross:
        _refuse("blocks", blocks, "UNet2DModel has one number for all levels")
    return blocks


def _head_dim(module: UNet) -> int | None:
    """The one width of all heads, or None: one head a level."""
    used = {i for i, a in enumerate(module.attention) if a}
    used |= {module.levels - 1} if module.mid_attention else set()
    shapes = {module.head_shape(i) for i in used}
    if all(heads == 1 for heads, _ in shapes):
        return None
    if len({width for _, width in shapes}) > 1:
        _refuse("heads", module.heads, "UNet2DModel has heads of one width only: use head_dim")
    return shapes.pop()[1]


def _check_expressible(module: UNet, params: Mapping[str, Any], depths: list[int], cross) -> None:
    rank = params["conv_in"]["kernel"].ndim - 2
    if rank != 2:
        _refuse("spatial axes", rank, "its U-Nets have two")
    if module.multipliers[0] != 1:
        _refuse("multipliers", module.multipliers, "the first level has the width of conv_in, so 1")
    for key in ("pool_context", "second_time", "vector"):
        if getattr(module, key):
            _refuse(key, True, "it has no such projection")
    if module.guidance_width and not cross:
        _refuse("guidance_width", module.guidance_width, "U-Nets without cross-attention have none")
    if module.downsample_padding not in (1, (1, 1), None, (0, 1)):
        _refuse("downsample_padding", module.downsample_padding, "only 1 and (0, 1) are")
    if cross and (module.resblock_updown or not module.mid_attention):
        both = module.resblock_updown, module.mid_attention
        rule = "cross-attention goes with convolutions between levels and a middle"
        _refuse("resblock_updown, mid_attention", both, rule)
    if not cross and any(d for d, a in zip(depths, module.attention) if a):
        _refuse("transformer_depth", depths, "the last level's is the middle's, so not 0")
    if cross and not all(d for d, a in zip(depths, module.attention) if a):
        _refuse("transformer_depth", depths, "levels with attention all have a transformer")


def _refuse(key: str, value: Any, rule: str) -> None:
    raise ValueError(f"{key}={value!r} cannot be written for Diffusers: {rule}")
