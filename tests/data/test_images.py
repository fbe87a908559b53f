"""Every mode and depth that Pillow writes: read as it is, or refused with the reason."""

import io
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from diffusion.data import images

ROOT = pathlib.Path(__file__).parents[2]
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 9), np.uint8)
COLOUR = RNG.integers(0, 256, (6, 9, 3), np.uint8)
OPAQUE = np.full((6, 9, 1), 255, np.uint8)
DEEP = RNG.integers(0, 65536, (6, 9)).astype(np.uint16)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def palette() -> Image.Image:
    image = Image.fromarray(GREY % 4).convert("P")
    image.putpalette([9, 8, 7, 100, 0, 0, 0, 200, 0, 1, 2, 3])
    return image


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, -1)


PALETTE = np.array([[9, 8, 7], [100, 0, 0], [0, 200, 0], [1, 2, 3]], np.uint8)
BITS = Image.fromarray(GREY).convert("1")
# name: (file, pixels as RGB, how far off they may be)
READ = {
    "L": (encoded(Image.fromarray(GREY)), rgb(GREY), 0),
    "1": (encoded(BITS), rgb(np.asarray(BITS).astype(np.uint8) * 255), 0),
    "P": (encoded(palette()), PALETTE[GREY % 4], 0),
    "P of a GIF": (encoded(palette(), "GIF"), PALETTE[GREY % 4], 0),
    "LA, opaque": (encoded(Image.fromarray(np.dstack([GREY, OPAQUE]), "LA")), rgb(GREY), 0),
    "RGB": (encoded(Image.fromarray(COLOUR)), COLOUR, 0),
    "RGB of a TIFF": (encoded(Image.fromarray(COLOUR), "TIFF"), COLOUR, 0),
    "RGB of a WebP": (encoded(Image.fromarray(COLOUR), "WEBP", lossless=True), COLOUR, 0),
    "RGBA, opaque": (encoded(Image.fromarray(np.dstack([COLOUR, OPAQUE]))), COLOUR, 0),
    "CMYK": (encoded(Image.fromarray(COLOUR).convert("CMYK"), "TIFF"), COLOUR, 1),
    "16 bits of a PNG": (encoded(Image.fromarray(DEEP)), rgb(np.rint(DEEP / 257)), 0),
    "16 bits of a TIFF": (encoded(Image.fromarray(DEEP), "TIFF"), rgb(np.rint(DEEP / 257)), 0),
    "16 bits of a PGM": (encoded(Image.fromarray(DEEP), "PPM"), rgb(np.rint(DEEP / 257)), 0),
}


@pytest.mark.parametrize("name", READ)
def test_a_mode_is_read_as_it_is(name):
    file, wanted, error = READ[name]
    data = file.getvalue()
    found = images.decode_image(data, 3, None)
    assert found.dtype == np.uint8 and found.shape == (6, 9, 3)
    assert np.abs(found.astype(int) - wanted).max() <= error
    assert images.shape(io.BytesIO(data))[:2] == (6, 9)
    grey = images.decode_image(data, 1, None)[..., 0]
    luma = wanted @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    assert np.abs(grey - luma).max() <= error + 1


def transparent(mode: str) -> Image.Image:
    alpha = OPAQUE.copy()
    alpha[2, 3] = 254
    return Image.fromarray(np.dstack([COLOUR if mode == "RGBA" else GREY, alpha]), mode)


FLOATS = Image.fromarray(GREY.astype(np.float32))
PAGES = {"save_all": True, "append_images": [Image.fromarray(255 - COLOUR)]}
REFUSED = {
    "RGBA": (encoded(transparent("RGBA")), "transparent pixels"),
    "LA": (encoded(transparent("LA")), "transparent pixels"),
    "P": (encoded(palette(), transparency=2), "transparent pixels"),
    "RGB with a key": (
        encoded(Image.fromarray(COLOUR), transparency=tuple(COLOUR[0, 0].tolist())),
        "transparent pixels",
    ),
    "F": (encoded(FLOATS, "TIFF"), "its pixels are F"),
    "I": (encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "its pixels are I"),
    "a GIF that moves": (encoded(Image.fromarray(COLOUR), "GIF", **PAGES), "2 frames"),
    "a TIFF of pages": (encoded(Image.fromarray(COLOUR), "TIFF", **PAGES), "2 frames or pages"),
    "a WebP that moves": (encoded(Image.fromarray(COLOUR), "WEBP", **PAGES), "2 frames"),
    "a PNG that moves": (encoded(Image.fromarray(COLOUR), "PNG", **PAGES), "2 frames"),
    "LAB": (encoded(Image.fromarray(COLOUR, "LAB"), "TIFF"), "its pixels are LAB"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_pixels_of_its_own_is_refused(name):
    file, reason = REFUSED[name]
    with pytest.raises(images.NO_IMAGE, match=reason):
        images.decode_image(file.getvalue(), 3, None)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_camera_held_askew_is_set_upright(kind, orientation):
    """The stored pixels of a picture, for each of EXIF's eight orientations (TIFF 6.0, tag 274)."""
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :12] = 250  # only the top left corner is white
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    file = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)
    assert images.shape(file) == (16, 24, 3)
    found = images.decode_image(file.getvalue(), 3, None)
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).mean() < 6  # JPEG's edges
    assert found[2, 2].min() > 240 and found[-3:].max() < 15 and found[:, -3:].max() < 15


def test_a_phones_picture_of_several_is_its_first():
    """MPO: a JPEG with previews behind it."""
    file = encoded(Image.fromarray(rgb(GREY)), "MPO", **PAGES)
    assert Image.open(file).n_frames == 2
    found = images.decode_image(file.getvalue(), 3, None)
    assert np.abs(found.astype(int) - rgb(GREY)).mean() < 20


def test_there_is_one_reader():
    """Whatever opens a picture by another way says why: those are of our own making."""
    own = {"diffusion/data/images.py", "experiments/sample.py", "experiments/report/runs.py"}
    own |= {"diffusion/data/degrade.py"}  # a JPEG that it has just made
    own |= {"diffusion/data/annotations.py"}  # a palette's numbers are labels, not colours
    found = {
        path.relative_to(ROOT).as_posix()
        for top in ("diffusion", "experiments")
        for path in (ROOT / top).rglob("*.py")
        if re.search(r"\bImage\.open\(|imread\(", path.read_text())
    }
    assert found == own
