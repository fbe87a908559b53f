"""How a config's pictures are fitted to its `data.image_size`."""

from typing import Any

from ml_collections import ConfigDict

from diffusion.data import fitting
from diffusion.data import transforms as ts
from experiments.run import build


def side(config: ConfigDict) -> int:
    height, width = build.image_shape(config)[:-1]
    if height != width:
        raise ValueError(
            f"data.image_size={config.data.image_size} is no square, which data.name="
            f"{config.data.name!r} is made: give one number"
        )
    return height


PLAIN = {"resize": "bicubic", "crop": "centre", "shorter_side": 0}  # configs/common.py's


def changed(config: ConfigDict) -> dict[str, Any]:
    """What a config says of it that is not the default: part of what latents are made from."""
    return {key: config.data[key] for key, plain in PLAIN.items() if config.data[key] != plain}


def centred(config: ConfigDict) -> ConfigDict:
    """The config with no crop drawn: of pictures that samples are compared with."""
    found = ConfigDict(config.to_dict())
    found.data.crop = "centre"
    return found.lock()


def check(config: ConfigDict, fitted: bool) -> None:
    """ValueError where it has no effect: on data that are made, or padded."""
    if (fitted and config.data.fit == "crop") or not changed(config):
        return
    (key, value), *_ = changed(config).items()
    raise ValueError(
        f"data.{key}={value!r} is of pictures that are cropped, but data.name={config.data.name!r}"
        f" with data.fit={config.data.fit!r} is not: set it to {PLAIN[key]!r}"
    )


def sized(config: ConfigDict) -> bool:
    """Whether what reads captions is Stable Diffusion XL's, which is told of pictures' sizes."""
    return "text_encoder_2" in config.model and "text_encoder_3" not in config.model


def how(config: ConfigDict, split: str) -> fitting.How:
    """Crops are drawn of the training split alone. ValueError for what cannot be."""
    data = config.data
    drawn = build.choose({"centre": False, "random": True}, data.crop, "data.crop")
    if data.fit == "pad":
        return fitting.CENTRE
    whole = drawn and split == "train"
    found = fitting.How(data.resize, data.shorter_side, whole, sized(config))
    found.side(side(config))
    if found.sized and drawn and data.flip:
        raise ValueError(
            "data.flip=True mirrors a picture once its crop is drawn, whose place Stable Diffusion "
            "XL is told of: set data.flip=False, or data.crop='centre'"
        )
    if (drawn or data.shorter_side) and (data.boxes or data.segments):
        raise ValueError(
            f"data.crop={data.crop!r} with data.shorter_side={data.shorter_side} would not crop "
            "data.boxes and data.segments with it: set them to 'centre' and 0"
        )
    return found


def cropped(config: ConfigDict, source: Any) -> list:
    """The transforms that come first: the crop, where it is drawn."""
    drawn = getattr(source, "how", fitting.CENTRE).whole
    return [ts.RandomCrop(side(config), config.seed)] if drawn else []
