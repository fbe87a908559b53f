"""Image files to pixels: the one reader of all commands.

A picture is read as a viewer shows it, turned by its EXIF orientation, as 8-bit RGB or grey (ITU-R
601). What has no such pixels of its own is refused with the reason: transparent places, which show
whatever is behind; animations and pages; floats and 32-bit integers, which have no white; Lab.
Sixteen bits become round(v / 257), in three channels their high byte, as Pillow opens them; colour
profiles are not applied, as in the papers' own code.
"""

import io
import pathlib
import struct
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from diffusion.data import fitting

# What Pillow raises for a file that is no image, or one that it takes for a decompression bomb.
NO_IMAGE = (
    *(OSError, ValueError, SyntaxError, TypeError, EOFError, OverflowError, struct.error),
    *(zlib.error, IndexError, KeyError, NotImplementedError, ZeroDivisionError, AttributeError),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError, RuntimeError),
)
MAX_PIXELS = 2**26  # of an image, 67 million: 200 MB as RGB, more than any camera's but the largest
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and values that swap the sides
SIXTEEN_BITS = ("PNG", "PPM")  # formats whose 32-bit mode "I" holds 0..65535
PLAIN = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
GREY = ("1", "L", "I", "I;16", "I;16B", "I;16L", "I;16N", "LA")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")


def open_image(file: Any, channels: int = 3) -> Image.Image:
    """A path or file as an upright "RGB" image, of 1 channel "L". One of `NO_IMAGE`, with the
    reason, for anything else (above) and for more than MAX_PIXELS."""
    with _opened(file) as image:
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: previews
        if frames > 1:
            raise ValueError(f"it has {frames} frames or pages: give one picture a file")
        image.load()
        upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        if np.asarray(upright.convert("RGBA"))[..., 3].min() < 255:
            raise ValueError("it has transparent pixels: put it on a background")
    mode = "L" if channels == 1 else "RGB"
    if upright.mode.startswith("I;16") or (upright.mode == "I" and image.format in SIXTEEN_BITS):
        levels = np.rint(np.asarray(upright).astype(np.float64) / 257).astype(np.uint8)
        return Image.fromarray(levels).convert(mode)
    if upright.mode not in PLAIN:
        raise ValueError(f"its pixels are {upright.mode}: store grey or RGB of 8 or 16 bits")
    return upright.convert(mode)


def _opened(file: Any) -> Image.Image:
    if not isinstance(file, str | pathlib.Path) and hasattr(file, "read_bytes"):  # in a tar
        file = io.BytesIO(file.read_bytes())
    try:
        image = Image.open(file)  # reads the header alone
    except UnidentifiedImageError as error:
        raise ValueError("it has no format that Pillow reads") from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(f"{image.width} x {image.height} pixels are over {MAX_PIXELS}")
    return image


def shape(file: Any) -> tuple[int, int, int]:
    """(height, width, channels) of an image as `open_image` gives it, from its header alone."""
    with _opened(file) as image:
        size, channels = image.size, 1 if image.mode in GREY else 3
        if image.format != "TIFF" and image.getexif().get(ORIENTATION) in TURNED:  # Pillow turns it
            size = size[::-1]
    return size[1], size[0], channels


def decode_image(
    data: bytes, channels: int, image_size: int | None, how: fitting.How = fitting.CENTRE
) -> np.ndarray:
    """An encoded image as uint8 (height, width, channels), of `image_size` a side as `how` has it.

    One of `NO_IMAGE` where it is none.
    """
    return _fitted(open_image(io.BytesIO(data), channels), channels, image_size, how)


def decode_images(
    encoded: Iterable[bytes],
    channels: int,
    image_size: int | None,
    how: fitting.How = fitting.CENTRE,
) -> dict[str, Any]:
    """Several, as a list "image"; with `how.sized` and "sizes", int32 (batch, 6)."""
    found, sizes = [], []
    for data in encoded:
        image = open_image(io.BytesIO(data), channels)
        found.append(_fitted(image, channels, image_size, how))
        if how.sized and image_size is not None:
            sizes.append(fitting.sizes(image.size, image_size, how))
    return {"image": found, **({"sizes": np.stack(sizes)} if sizes else {})}


def _fitted(
    image: Image.Image, channels: int, image_size: int | None, how: fitting.How
) -> np.ndarray:
    if image_size is not None:
        image = fitting.fit(image, image_size, how)
    pixels = np.asarray(image)
    return pixels[..., None] if channels == 1 else pixels
