"""Small pictures of large ones, for super-resolution: bicubic, means, or BSRGAN's degradation.

"bicubic" is Pillow's, antialiased. "area" takes means of blocks, as ADM's upsamplers are trained on
(openai/guided-diffusion: scripts/super_res_train.py), rounded to 8 bits, which those are not.
"bsr_light" is what LDM's `bsr_sr` was trained on
(https://arxiv.org/abs/2112.10752, section 4.4): the light variant of Zhang et al.'s random blur,
resizing, noise and JPEG, in an order drawn anew for each picture
(https://arxiv.org/abs/2103.14006; CompVis/latent-diffusion:
ldm/modules/image_degradation/bsrgan_light.py, `degradation_bsrgan_variant`; lines in its words):

    1/4 of the pictures (at a factor of 4): halve first, by any of the resizings
    in any order, the last resizing after the first:
        blur: an anisotropic or a plain Gaussian
        resize by 1 / U(1, 2 f), or (1/5) blur with a shifted Gaussian and take every f-th pixel
        resize to the final size
        Gaussian noise of 1 or 2 levels: a channel's own, grey, or correlated
        JPEG of quality 80 to 95 (9/10 of the pictures)
    JPEG again

Resizing there is OpenCV's: linear, cubic (a = -0.75) or of areas, none but the last antialiased.
Deviations: enlarging by areas, which OpenCV rounds in a way of its own, is linear; covariances are
floored at 0.01, where the authors' fail on singular ones.
"""

import dataclasses
import io

import numpy as np
from PIL import Image
from scipy import ndimage

from diffusion.data.counter import Draws
from diffusion.data.sources import Batch

KINDS = ("bicubic", "area", "bsr_light")
PURPOSE = 31  # of draws, folded into their keys
RESIZINGS = ("linear", "cubic", "area")


@dataclasses.dataclass(frozen=True)
class Degrade:
    """Adds "small": uint8 (batch, height / factor, width / factor, channels).

    Attributes:
      kind: one of KINDS.
      factor: how much smaller; 1 is as large, which only "bsr_light" changes.
      seed: of what is drawn for each example of each epoch.
    """

    kind: str
    factor: int
    seed: int

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"degradation={self.kind!r} is unknown: use one of {KINDS}")

    def __call__(self, batch: Batch) -> Batch:
        made = []
        for image, index, epoch in zip(batch["image"], batch["index"], batch["epoch"]):
            if self.kind == "bicubic":
                made.append(bicubic(image, 1 / self.factor))
            elif self.kind == "area":
                size = [side // self.factor for side in image.shape[:2]]
                made.append(np.rint(_resize(image * 1.0, size, "area")).astype(np.uint8))
            else:
                draws = Draws((self.seed, PURPOSE, int(epoch), int(index)))
                made.append(bsr_light(image, self.factor, draws))
        return {**batch, "small": np.stack(made)}


def bicubic(image: np.ndarray, scale: float | int) -> np.ndarray:
    """uint8 (height, width, channels) resized by Pillow's bicubic, antialiased when smaller."""
    height, width = (round(side * scale) for side in image.shape[:2])
    planes = [
        np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC))
        for plane in np.moveaxis(image, -1, 0)
    ]
    return np.stack(planes, -1)


def bsr_light(image: np.ndarray, factor: int, draws: Draws) -> np.ndarray:
    """uint8 (height, width, channels) to the same `factor` times smaller."""
    x = image.astype(np.float64) / 255
    height, width = (side // factor for side in image.shape[:2])
    if factor == 4 and draws.uniform() < 0.25:
        way = draws.below(4)
        x = _resize(x, [s // 2 for s in x.shape[:2]], RESIZINGS[way] if way < 3 else "matlab")
        factor = 2
    order = draws.order(5)
    first, last = sorted((order.index(1), order.index(2)))
    order[first], order[last] = 1, 2
    for step in order:
        if step == 0:
            x = _blur(x, _gaussian(factor, draws))
        elif step == 1:
            x = _shrink(x, factor, draws)
        elif step == 2:
            x = np.clip(_resize(x, (height, width), RESIZINGS[draws.below(3)]), 0, 1)
        elif step == 3:
            x = np.clip(x + _noise(x.shape, draws), 0, 1)
        elif draws.uniform() < 0.9:
            x = _jpeg(x, draws)
    return np.rint(_jpeg(x, draws) * 255).astype(np.uint8)


def _shrink(x: np.ndarray, factor: int, draws: Draws) -> np.ndarray:
    if draws.uniform() < 0.8:
        by = draws.uniform(1, 2 * factor)
        size = [max(1, int(side / by)) for side in x.shape[:2]]
        return np.clip(_resize(x, size, RESIZINGS[draws.below(3)]), 0, 1)
    kernel = _isotropic(25, draws.uniform(0.1, 0.6 * factor))
    places = np.clip(np.arange(25) + (factor - 1) / 2, 0, 24)
    for axis in (0, 1):  # moved by half of what is skipped, so that the picture stays in its place
        kernel = np.apply_along_axis(lambda k: np.interp(places, np.arange(25), k), axis, kernel)
    return np.clip(_blur(x, kernel / kernel.sum())[::factor, ::factor], 0, 1)


def _gaussian(factor: int, draws: Draws) -> np.ndarray:
    """Anisotropic and turned, or plain, of a size and spread that are drawn."""
    if draws.uniform() < 0.5:
        spread = (4 + factor) / 4
        variances = np.maximum([draws.uniform(0, spread), draws.uniform(0, spread)], 0.01)
        size, angle = 5 + draws.below(10), draws.uniform(0, np.pi)
        c, s = np.cos(angle), np.sin(angle)
        axes = np.array([[c, s], [s, -c]])
        place = np.arange(size) - (size - 1) / 2
        grid = np.stack(np.meshgrid(place, place), -1) @ axes
        kernel = np.exp(-0.5 * (grid**2 / variances).sum(-1))
        return kernel / kernel.sum()
    size = 5 + draws.below(3)
    return _isotropic(size, (2 + 0.2 * factor) / 4 * draws.uniform())


def _isotropic(size: int, sigma: float) -> np.ndarray:
    place = np.arange(size) - (size - 1) / 2
    line = np.exp(-(place**2) / (2 * max(sigma, 0.1) ** 2))
    kernel = np.outer(line, line)
    return kernel / kernel.sum()


def _blur(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return ndimage.convolve(x, kernel[..., None], mode="mirror")


def _noise(shape: tuple[int, ...], draws: Draws) -> np.ndarray:
    level, way, channels = (1 + draws.below(2)) / 255, draws.uniform(), shape[-1]
    if way > 0.6 or channels == 1:
        return level * draws.normal(shape)
    if way < 0.4:
        return level * draws.normal((*shape[:2], 1))
    turn = np.linalg.qr(draws.uniform(shape=(channels, channels)))[0]
    covariance = np.abs(turn.T @ np.diag(draws.uniform(shape=(channels,))) @ turn) * (2 / 255) ** 2
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0))
    return draws.normal(shape) @ root.T


def _jpeg(x: np.ndarray, draws: Draws) -> np.ndarray:
    pixels = np.rint(x * 255).astype(np.uint8)
    file = io.BytesIO()
    grey = pixels.shape[-1] == 1
    picture = Image.fromarray(pixels[..., 0] if grey else pixels)
    picture.save(file, "JPEG", quality=80 + draws.below(16))
    found = np.asarray(Image.open(file), np.float64) / 255
    return found[..., None] if grey else found


def _resize(x: np.ndarray, size: tuple[int, ...] | list[int], kind: str) -> np.ndarray:
    """(height, width, channels) to `size`: OpenCV's three, or "matlab": cubic and antialiased."""
    down, across = (_weights(a, b, kind) for a, b in zip(x.shape, size))
    return np.einsum("yi,ijc,xj->yxc", down, x, across, optimize=True)


def _weights(n: int, m: int, kind: str) -> np.ndarray:
    """(m, n): how much of each pixel is in each new one."""
    scale = n / m
    if kind == "area" and scale > 1:
        edges, cells = np.arange(m)[:, None] * scale, np.arange(n)
        covered = np.minimum(edges + scale, cells + 1) - np.maximum(edges, cells)
        return np.maximum(covered, 0) / scale
    stretch = max(scale, 1.0) if kind == "matlab" else 1.0
    centre = (np.arange(m) + 0.5) * scale - 0.5
    taps = np.floor(centre)[:, None] + np.arange(-3 * int(np.ceil(stretch)), 4 * int(stretch + 1))
    distance = np.abs(taps - centre[:, None]) / stretch
    value = {"cubic": lambda d: _cubic(d, -0.75), "matlab": lambda d: _cubic(d, -0.5)}.get(
        kind, lambda d: np.maximum(1 - d, 0)
    )(distance)
    weights, rows = np.zeros((m, n)), np.repeat(np.arange(m), taps.shape[1])
    inside = taps.astype(int)
    if kind == "matlab":  # mirrored at the edges, which OpenCV repeats
        inside = np.where(inside < 0, -1 - inside, inside)
        inside = np.where(inside >= n, 2 * n - 1 - inside, inside)
    np.add.at(weights, (rows, np.clip(inside, 0, n - 1).ravel()), value.ravel())
    return weights / weights.sum(1, keepdims=True)


def _cubic(d: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel (https://doi.org/10.1109/TASSP.1981.1163711)."""
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * (d**3 - 5 * d**2 + 8 * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))
