"""What is hidden of a picture, for inpainting, drawn for each example of each epoch.

"lama" (LDM trained on these, https://arxiv.org/abs/2112.10752, appendix E.2.2) are the thick masks
of LaMa (https://arxiv.org/abs/2109.07161; advimman/lama: saicinpainting/training/data/masks.py,
configs/training/data/abl-04-256-mh-dist.yaml), one half each, at 256 pixels a side and smaller in
proportion:

    polygons: 1 to 5 of 1 to 5 strokes, 10 to 209 pixels long and 5 to 104 wide
    boxes: 1 to 3, 30 to 149 pixels a side, 10 from the edge

"half" hides the left, right, upper or lower half.
"""

import dataclasses

import numpy as np
from PIL import Image, ImageDraw

from diffusion.data.counter import Draws
from diffusion.data.sources import Batch

KINDS = ("lama", "half")
PURPOSE = 32  # of draws, folded into their keys


@dataclasses.dataclass(frozen=True)
class Hide:
    """Adds "mask": uint8 (batch, height, width, 1), 1 where the picture is to be made.

    Attributes:
      kind: one of KINDS.
      seed: of what is drawn.
    """

    kind: str
    seed: int

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"masks={self.kind!r} is unknown: use one of {KINDS}")

    def __call__(self, batch: Batch) -> Batch:
        draw, size = {"lama": lama, "half": half}[self.kind], batch["image"].shape[1:3]
        keys = zip(batch["epoch"].tolist(), batch["index"].tolist())
        made = [draw(size, Draws((self.seed, PURPOSE, *key))) for key in keys]
        return {**batch, "mask": np.stack(made)[..., None]}


def half(size: tuple[int, int], draws: Draws) -> np.ndarray:
    """uint8 (height, width)."""
    mask, way = np.zeros(size, np.uint8), draws.below(4)
    side = mask if way < 2 else mask.T
    middle = len(side) // 2
    side[slice(middle, None) if way % 2 else slice(middle)] = 1
    return mask


def lama(size: tuple[int, int], draws: Draws) -> np.ndarray:
    """uint8 (height, width)."""
    return (_strokes if draws.uniform() < 0.5 else _boxes)(size, draws, min(size) / 256)


def _strokes(size: tuple[int, int], draws: Draws, scale: float) -> np.ndarray:
    image = Image.new("L", (size[1], size[0]))
    pen = ImageDraw.Draw(image)
    for i in range(1 + draws.below(5)):
        x, y = draws.below(size[1]), draws.below(size[0])
        for _ in range(1 + draws.below(5)):
            angle = 0.01 + draws.below(4)
            angle = 2 * np.pi - angle if i % 2 == 0 else angle
            length, width = (10 + draws.below(200)) * scale, (5 + draws.below(100)) * scale
            ends = x + length * np.sin(angle), y + length * np.cos(angle)
            ends = tuple(int(np.clip(e, 0, n)) for e, n in zip(ends, size[::-1]))
            pen.line((x, y, *ends), fill=1, width=max(1, round(width)))
            for a, b in ((x, y), ends):  # round ends, as OpenCV draws them
                r = width / 2
                pen.ellipse((a - r, b - r, a + r, b + r), fill=1)
            x, y = ends
    return np.array(image)


def _boxes(size: tuple[int, int], draws: Draws, scale: float) -> np.ndarray:
    mask, margin = np.zeros(size, np.uint8), round(10 * scale)
    for _ in range(1 + draws.below(3)):
        sides = [max(1, round((30 + draws.below(120)) * scale)) for _ in size]
        sides = [min(side, n - 2 * margin) for side, n in zip(sides, size)]
        top, left = (
            margin + draws.below(n - 2 * margin - side + 1) for side, n in zip(sides, size)
        )
        mask[top : top + sides[0], left : left + sides[1]] = 1
    return mask
