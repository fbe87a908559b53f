"""How a picture of any size becomes a square one: as the papers' own code had it, by name.

    "bicubic"   the centre square, then Pillow's bicubic: LDM's LSUN (CompVis/latent-diffusion:
                ldm/data/lsun.py)
    "lanczos"   the centre square, then Pillow's Lanczos: DDPM's LSUN (StyleGAN2's dataset_tool.py)
    "opencv"    the shorter side by OpenCV's bilinear, which smooths nothing before it makes a
                picture small, then the crop: LDM's faces and ImageNet (CompVis/taming-transformers:
                taming/data/base.py, by albumentations)
    "box"       halved by means of 2 x 2 while the shorter side is twice too long, then the shorter
                side by bicubic, then the crop: ADM's and DiT's (openai/guided-diffusion:
                image_datasets.py)

OpenCV's rule of the pixel at place i of n, of a picture with m: it lies at

    x = (i + 1/2) m / n - 1/2, held within [0, m - 1],                                          (1)

and is the mean of the two pixels beside x by nearness, along either axis. Its fixed-point weights
of eleven bits are floats here, so that a level may differ by one.
"""

import dataclasses

import numpy as np
from PIL import Image

BOX, BICUBIC, LANCZOS = (
    Image.Resampling.BOX,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)
RESIZES = ("bicubic", "lanczos", "opencv", "box")


@dataclasses.dataclass(frozen=True)
class How:
    """resize: a name above. shorter_side: pixels that it is made to have before the crop, 0: those
    of the crop. whole: nothing is cut off, for crops that are drawn (`transforms.RandomCrop`).
    sized: `sizes` of each picture are given beside it.
    """

    resize: str = "bicubic"
    shorter_side: int = 0
    whole: bool = False
    sized: bool = False

    def __post_init__(self):
        if self.resize not in RESIZES:
            raise ValueError(f"data.resize={self.resize!r} is unknown: use one of {RESIZES}")

    def side(self, image_size: int) -> int:
        """What the shorter side becomes. ValueError where the crop does not fit into it."""
        if self.shorter_side and self.shorter_side < image_size:
            raise ValueError(
                f"data.shorter_side={self.shorter_side} is under data.image_size={image_size}: "
                "raise it, or set it to 0"
            )
        return self.shorter_side or image_size


CENTRE = How()


def fit(image: Image.Image, image_size: int, how: How = CENTRE) -> Image.Image:
    """The picture of `image_size` a side; with `how.whole`, its shorter side as `how` has it."""
    side = how.side(image_size)
    if how.resize in ("bicubic", "lanczos") and not how.whole and side == image_size:
        return _resized(centre(image, min(image.size)), (side, side), how.resize)
    if how.resize == "box":
        while min(image.size) >= 2 * side:
            image = image.resize((image.width // 2, image.height // 2), BOX)
    image = _resized(image, whole_size(image.size, side, how.resize), how.resize)
    return image if how.whole else centre(image, image_size)


def whole_size(size: tuple[int, int], side: int, resize: str) -> tuple[int, int]:
    """(width, height) that a picture of `size` has before it is cut, its shorter side `side`."""
    while resize == "box" and min(size) >= 2 * side:
        size = size[0] // 2, size[1] // 2
    scale = side / min(size)
    return round(size[0] * scale), round(size[1] * scale)


def sizes(size: tuple[int, int], image_size: int, how: How) -> np.ndarray:
    """What Stable Diffusion XL is told of a picture of `size` (width, height) that was fitted:
    int32, its height and width, top and left of the square in what it was resized to, and the
    square's height and width, in pixels (https://arxiv.org/abs/2307.01952, section 2.2). Of a
    square that is still to be drawn (`how.whole`) top and left are 0."""
    whole = whole_size(size, how.side(image_size), how.resize)
    left, top = (0, 0) if how.whole else ((n - image_size) // 2 for n in whole)
    return np.array([size[1], size[0], top, left, image_size, image_size], np.int32)


def centre(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _resized(image: Image.Image, size: tuple[int, int], resize: str) -> Image.Image:
    if image.size == size:
        return image
    if resize == "opencv":
        return Image.fromarray(opencv_bilinear(np.asarray(image), (size[1], size[0])))
    return image.resize(size, LANCZOS if resize == "lanczos" else BICUBIC)


def opencv_bilinear(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (height, width[, channels]) to `size` (height, width), eq. 1."""
    x = pixels.astype(np.float32)
    for axis, n in enumerate(size):
        m = x.shape[axis]
        place = np.clip((np.arange(n) + 0.5) * m / n - 0.5, 0, m - 1)
        first = np.minimum(place.astype(int), max(m - 2, 0))
        near = (place - first).astype(np.float32).reshape(-1, *[1] * (x.ndim - 1 - axis))
        after = x.take(np.minimum(first + 1, m - 1), axis)
        x = x.take(first, axis) * (1 - near) + after * near
    return np.floor(x + 0.5).astype(np.uint8)
