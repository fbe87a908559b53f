"""Whether digits are where they were asked for, and are what they were asked to be.

Of boxes (`data/layouts.py`), with a classifier of captioned digits: what lies in each box is set in
the middle of a black picture, as the classifier knows digits, and judged; a box is right where that
is its label, a picture where all of its boxes are and no more than a tenth of its light lies
outside. Of maps of labels: the picture whole is judged, and its digit's pixels compared with the
map's, by intersection over union. The same is said of the data's own pictures.
"""

from typing import Any

import numpy as np

from diffusion import pictures
from diffusion.data import layouts
from diffusion.data.builders.captioned_digits import compose
from diffusion.metrics.intervals import beside, mean_interval, wilson
from experiments.evaluate.features import Judge
from experiments.evaluate.samples import Subject
from experiments.run import data

SHOWN = 10
OUTSIDE = 0.1  # of a picture's light


def check(subject: Subject, name: str) -> None:
    """ValueError for a run of other data."""
    config = subject.run.image_config
    told, like = config.conditioning, data.known(config.data.name).like
    if like != "captioned_digits" or not (told.layout or told.concat == "semantic"):
        raise ValueError(
            f"--metrics={name} is of digits by boxes or maps of labels, not {subject.run}: name a "
            "run of configs/ldm_layout.py:digits, or of ldm_semantic.py:digits"
        )
    _ = subject.judge


def placement(subject: Subject) -> dict[str, Any]:
    samples, judge = subject.samples, subject.judge
    given = samples.given
    measure = of_boxes if "layout" in given else of_maps
    sets = {"samples": samples.images(samples.num)[0], "data": given["image"]}
    found = {name: measure(images, given, judge) for name, images in sets.items()}
    told = {name: given[name][:SHOWN] for name in ("layout", "segments") if name in given}
    rows = np.concatenate([_asked(**told), *(sets[name][:SHOWN] for name in sets)])
    said = [name for name in ("asked", "sample", "of the data") for _ in given["image"][:SHOWN]]
    if "layout" in told:
        said[: len(told["layout"])] = [
            " and ".join(f"{box[0]:.0f}" for box in boxes) for boxes in told["layout"]
        ]
    sheet = pictures.sheet(rows, said, min(SHOWN, len(given["image"])))
    return {"placement": {**found, "count": len(given["image"])}, "sheet": sheet}


def _asked(layout: Any = None, segments: Any = None) -> np.ndarray:
    """uint8 (pictures, side, side, 3): grey boxes, the first the lighter, or white digits."""
    if layout is None:
        return np.repeat(np.where(segments > 0, 255, 0).astype(np.uint8)[..., None], 3, axis=-1)
    made = np.zeros((len(layout), compose.CANVAS, compose.CANVAS, 3), np.uint8)
    for picture, boxes in zip(made, np.rint(layout[..., 1:] * compose.CANVAS).astype(int)):
        for light, (left, top, width, height) in zip((200, 110), boxes):
            picture[top : top + height, left : left + width] = light
    return made


def of_boxes(images: np.ndarray, given: dict[str, Any], judge: Judge) -> dict[str, Any]:
    """adherence: of boxes; whole: of pictures; outside: mean share of light outside all boxes."""
    layout, size = given["layout"], compose.CANVAS
    corners = np.rint(layout[..., 1:3] * size).astype(int)
    crops = np.zeros((*layout.shape[:2], size, size, 3), np.uint8)
    light, middle = images.astype(np.float64).sum(-1), (size - layouts.BOX) // 2
    outside = light.copy()
    for picture, crop, rest, places in zip(images, crops, outside, corners):
        for one, (left, top) in zip(crop, places):
            rows, columns = slice(top, top + layouts.BOX), slice(left, left + layouts.BOX)
            inner = slice(middle, middle + layouts.BOX)
            one[inner, inner] = picture[rows, columns]
            rest[rows, columns] = 0
    said = judge(crops.reshape(-1, size, size, 3))[0].reshape(layout.shape[:2])
    right = said == layout[..., 0]
    share = outside.sum((1, 2)) / np.maximum(light.sum((1, 2)), 1)
    whole = right.all(1) & (share <= OUTSIDE)
    values = {"adherence": right.mean(1), "outside": share}
    means = {name: mean_interval(value) for name, value in values.items()}
    return beside(means | {"whole": wilson(int(whole.sum()), len(whole))})


def of_maps(images: np.ndarray, given: dict[str, Any], judge: Judge) -> dict[str, Any]:
    """accuracy: of the digit; iou: of its pixels, those nearer to their brightest contrast."""
    segments = given["segments"] > 0
    ground = np.median(images[:, :1].astype(np.float64), axis=(1, 2), keepdims=True)
    far = np.linalg.norm(images - ground, axis=-1)
    drawn = far > far.max((1, 2), keepdims=True) * 32 / 255
    iou = (drawn & segments).sum((1, 2)) / np.maximum((drawn | segments).sum((1, 2)), 1)
    right = judge(images)[0] == given["label"]
    accuracy = wilson(int(right.sum()), len(right))
    return beside({"accuracy": accuracy, "iou": mean_interval(iou)})
