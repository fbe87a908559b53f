"""What a denoiser is told besides x_t and t, and what of each picture of the data it is made of."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diffusion.data import degrade, layouts, loader, masks
from diffusion.models.embedders import SpatialRescaler
from diffusion.models.text_encoder import TextPair
from diffusion.training import conditions
from diffusion.training.sized_text import PooledText, SizedText
from experiments.run import build, data


def told(config: ConfigDict, null_tokens: tuple[int, ...] = ()) -> dict[str, conditions.Condition]:
    """What a denoiser is told besides x_t and t, by name."""
    found: dict[str, conditions.Condition] = {"hint": conditions.Hints()}
    if "text_encoder" in config.model:
        found["text"] = text(config, null_tokens)
    if (null := build.null_label(config)) is not None:
        known = config.conditioning.null_label
        if not known and config.conditioning.drop:
            raise ValueError(
                f"conditioning.drop={config.conditioning.drop} needs a null class, which "
                "conditioning.null_label=False says there is not: set drop to 0"
            )
        found["label"] = conditions.Label(null, build.class_embedder(config), known)
    if numbers := getattr(build.denoiser_network(config), "augment_dim", 0):
        found["augment"] = conditions.Augmented(numbers)
    if config.conditioning.concat == "past":
        shape = build.sample_shape(config)
        found["past"] = conditions.Past(shape[0], past_channels(config, shape))
    elif config.conditioning.concat:
        found["concat"] = concat(config)
    return found


def text(config: ConfigDict, null_tokens: tuple[int, ...] = ()) -> conditions.Text:
    """What a text encoder reads; without the tokens of no caption for shapes alone."""
    told, encoder = config.conditioning, config.model.text_encoder
    if told.layout:
        with build.naming("model.text_encoder"):
            layouts.objects(encoder.max_length)
        none = layouts.tokens(np.zeros((1, 0, 5)), encoder.max_length, encoder.vocab_size)
        null_tokens = tuple(none[0].tolist())
    null_tokens = null_tokens or (0,) * build.caption_length(config)
    made, new = build.text_encoder(config), build.words(config)
    if not isinstance(made, TextPair):
        if made is not None and new is not None:
            made = made.clone(vocab_size=made.vocab_size + new.vectors)
        if told.zero_null:
            raise ValueError(
                "conditioning.zero_null=True is of two text encoders, but there is no "
                "model.text_encoder_2: set it to False"
            )
        return conditions.Text(made, null_tokens, told.mask_padding, told.layout)
    if told.mask_padding or told.layout or new is not None:
        raise ValueError(
            "conditioning.mask_padding, conditioning.layout and model.words are of one text "
            "encoder, but model.text_encoder_2 is there: set them to False and 0, and no words"
        )
    null_tokens = (-1,) * len(null_tokens) if told.zero_null else null_tokens
    if made.third is not None:
        return PooledText(made, null_tokens)
    height, width, _ = build.image_shape(config)
    sizes = {"size": (height, width), "size_dim": told.size_dim}
    return SizedText(made, null_tokens, **sizes)


def past_channels(config: ConfigDict, shape: tuple[int, ...]) -> int:
    """How many channels the past of a window becomes."""
    if len(shape) != 2 or config.data.past < 1 or config.data.past % shape[0]:
        raise ValueError(
            f"conditioning.concat='past' is of series whose past is some windows long, but "
            f"data.past={config.data.past} and data.image_size={config.data.image_size}: give a "
            "multiple of the window"
        )
    return config.data.past // shape[0] * shape[-1]


def concat(config: ConfigDict) -> conditions.Concat:
    """What joins x_t's channels."""
    kind, shape = config.conditioning.concat, build.sample_shape(config)
    channels = {
        "inpaint": 1 + shape[-1],
        "inpaint_ldm": 1 + shape[-1],
        "edit": shape[-1],
        "low_resolution": config.data.channels,
        "semantic": config.model.rescaler.channels if "rescaler" in config.model else 0,
    }
    joined = (*shape[:-1], build.choose(channels, kind, "conditioning.concat"))
    _check_rescaler(config)
    if kind != "semantic":
        enlarge = config.conditioning.enlarge
        build.choose({"cubic": 0, "linear": 0}, enlarge, "conditioning.enlarge")
        factor = shape[0] // small_size(config)
        return conditions.Concat(kind, joined, factor, enlarge=enlarge)
    rescaler = build.construct(SpatialRescaler, config.model.rescaler, "model.rescaler")
    if 2**rescaler.halvings * shape[0] != build.image_shape(config)[0]:
        raise ValueError(
            f"model.rescaler.halvings={rescaler.halvings} of data.image_size="
            f"{config.data.image_size} does not give the {shape[0]} places of x_t: change one"
        )
    return conditions.Concat(kind, joined, rescaler=rescaler)


def _check_rescaler(config: ConfigDict) -> None:
    kind = config.conditioning.concat
    if ("rescaler" in config.model) != (kind == "semantic"):
        raise ValueError(
            f"conditioning.concat={kind!r} and model.rescaler belong together where it is "
            "'semantic': give both, or neither"
        )


def small_size(config: ConfigDict) -> int:
    """Pixels a side of the small picture of "low_resolution"; for other kinds x_t's."""
    by, places = config.conditioning.downscale, build.sample_shape(config)[0]
    if config.conditioning.concat != "low_resolution" or not by:
        return places
    side = build.image_shape(config)[0]
    if by < 1 or side % by or places % (side // by):
        raise ValueError(
            f"conditioning.downscale={by} of data.image_size={config.data.image_size} gives no "
            f"picture that fills the {places} places of x_t a whole number of times: change one"
        )
    return side // by


def reads(config: ConfigDict) -> bool:
    """Whether it is given more than x_t, captions and classes."""
    told = config.conditioning
    return told.concat not in ("", "past") or told.layout > 0


def joined(config: ConfigDict) -> list:
    """The transforms that add to images what joins x_t's channels (`conditions.Concat`), and the
    tokens of boxes."""
    told, found = config.conditioning, []
    if told.layout:
        encoder = config.model.text_encoder
        found = [layouts.Tokens(encoder.max_length, encoder.vocab_size, config.seed)]
    if told.concat == "semantic":
        _check_rescaler(config)
    if told.concat == "edit":
        raise ValueError(
            "conditioning.concat='edit' (InstructPix2Pix's) is sampled from, not trained: no data "
            "here has pictures before and after; leave it out"
        )
    with build.naming("conditioning"):
        if told.concat == "semantic":
            found.append(layouts.CheckSegments(config.model.rescaler.classes))
        elif told.concat == "low_resolution":
            factor = build.image_shape(config)[0] // small_size(config)
            found.append(degrade.Degrade(told.degradation, factor, config.seed))
        elif told.concat.startswith("inpaint"):
            found.append(masks.Hide(told.masks, config.seed))
    return found


def columns(config: ConfigDict, num: int, epoch: int) -> dict[str, Any]:
    """`num` images of the evaluation split, and what a denoiser is given of each (`joined`)."""
    source, steps = data.open_images(config, config.data.eval_split)
    if num > len(source):
        raise ValueError(
            f"--num={num}, but the split {config.data.eval_split!r} has {len(source)} pictures to "
            "be given: ask for as many"
        )
    index = np.arange(num)
    batch = loader.fetch(source, index, np.full_like(index, epoch), index, steps)
    for step in joined(config):
        batch = step({**batch, "epoch": np.full_like(index, epoch)})
    return batch
