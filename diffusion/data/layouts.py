"""Where things are in a picture: boxes with labels as tokens, maps of labels, and digits of both.

A layout is float32 (objects, 5): label, left, top, width, height, the last four of the picture's
sides in [0, 1]; a label of -1 is no object. LDM reads it as tokens (arXiv:2112.10752, section
4.3.1), in the form of CompVis/taming-transformers (taming/data/conditional_builder/
objects_bbox.py): of v tokens, with s = floor(sqrt(v)) places a side,

    (1)  place(x, y) = s round(y (s - 1)) + round(x (s - 1))
    (2)  an object: its label, place(left, top), place(right, bottom); none: v - 1 three times
    (3)  objects in any order, none to fill up, and last the places of the crop: (0, 0), (1, 1)
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from diffusion.data.builders.captioned_digits import compose
from diffusion.data.counter import Draws
from diffusion.data.sources import Batch, Source

PURPOSE = 33  # of draws, folded into their keys
BOX = compose.SIZES["small"]  # pixels of a digit's longer side where there are two
OFFSETS = range(1, compose.CANVAS - BOX, 4)  # of their boxes, as `compose` has them and between


def objects(length: int) -> int:
    """How many fit into so many tokens. ValueError where eq. 3 does not end there."""
    if length < 5 or (length - 2) % 3:
        raise ValueError(f"max_length={length} must be three tokens an object and two of the crop")
    return (length - 2) // 3


def tokens(layouts: np.ndarray, length: int, vocabulary: int) -> np.ndarray:
    """Eqs. 1-3, in the order given: (batch, objects, 5) to int32 (batch, length)."""
    side = int(vocabulary**0.5)

    def place(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return side * np.rint(y * (side - 1)) + np.rint(x * (side - 1))

    label, left, top, width, height = np.moveaxis(layouts.astype(np.float64), -1, 0)
    of_one = np.stack([label, place(left, top), place(left + width, top + height)], -1)
    of_one[label < 0] = vocabulary - 1
    found = np.full((len(layouts), length), vocabulary - 1, np.int32)
    found[:, : of_one[0].size] = of_one.reshape(len(layouts), -1)
    found[:, -2:] = 0, side * side - 1
    return found


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Adds "tokens" of the column "layout", its objects in an order drawn for each example.

    Attributes:
      length, vocabulary: of the text encoder.
      seed: of the order.
    """

    length: int
    vocabulary: int
    seed: int

    def __call__(self, batch: Batch) -> Batch:
        if "layout" not in batch:
            raise ValueError(
                "conditioning.layout reads boxes, but the data have none: add data.boxes"
            )
        layouts, most = batch["layout"], objects(self.length)
        if layouts.shape[1] > most:
            raise ValueError(
                f"a picture has {layouts.shape[1]} boxes, but model.text_encoder.max_length="
                f"{self.length} reads {most}: raise it by three for each"
            )
        keys = zip(batch["epoch"].tolist(), batch["index"].tolist())
        orders = [Draws((self.seed, PURPOSE, *key)).order(layouts.shape[1]) for key in keys]
        drawn = np.take_along_axis(layouts, np.array(orders)[..., None], axis=1)
        known = np.argsort(drawn[..., 0] < 0, axis=1, kind="stable")  # none last
        drawn = np.take_along_axis(drawn, known[..., None], axis=1)
        return {**batch, "tokens": tokens(drawn, self.length, self.vocabulary)}


def parse(boxes: Sequence[str], classes: int) -> np.ndarray:
    """ "label,left,top,width,height" of each to a layout. ValueError for what is none."""
    found = []
    for box in boxes:
        try:
            label, *sides = [float(number) for number in box.split(",")]
            left, top, width, height = sides
        except ValueError as error:
            raise ValueError(f"box={box} must be label,left,top,width,height") from error
        if not (label.is_integer() and 0 <= label < classes):
            raise ValueError(f"box={box} has a label outside 0..{classes - 1}: give one of these")
        inside = min(left, top) >= 0 and max(left + width, top + height) <= 1 + 1e-6
        if not inside or min(width, height) <= 0:
            raise ValueError(
                f"box={box} is not inside the picture, whose sides are 0 to 1: move or shrink it"
            )
        found.append([label, *sides])
    return np.array(found, np.float32).reshape(-1, 5)


@dataclasses.dataclass(frozen=True)
class TwoDigits:
    """Digits to pictures of two, each small, on black and in a box of its own, and their "layout".

    "image" becomes uint8 (batch, 32, 32, 3) and "layout" float32 (batch, 2, 5); the second digit,
    the places (5 x 5) and the colours are drawn for each example of each epoch; the boxes do not
    overlap.

    Attributes:
      glyphs: every digit of the source, resized.
      labels: int (digits,), what they are.
      seed: of what is drawn.
    """

    glyphs: compose.Glyphs
    labels: np.ndarray
    seed: int

    @classmethod
    def of(cls, source: Source, seed: int) -> "TwoDigits":
        every = source.batch(np.arange(len(source)))
        return cls(compose.Glyphs.of(every["image"][..., 0]), every["label"], seed)

    def __call__(self, batch: Batch) -> Batch:
        keys = zip(batch["epoch"].tolist(), batch["index"].tolist())
        made = [self._one(*key) for key in keys]
        images, layouts = (np.stack(column) for column in zip(*made))
        return {**batch, "image": images, "layout": layouts}

    def _one(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        draws = Draws((self.seed, PURPOSE, epoch, index))
        digits = index, draws.below(len(self.labels))
        places = np.zeros((2, 2), int)
        while np.abs(places[0] - places[1]).max() < BOX:
            places = np.array([[OFFSETS[draws.below(len(OFFSETS))] for _ in "yx"] for _ in "ab"])
        image, layout = np.zeros((*(compose.CANVAS,) * 2, 3)), np.zeros((2, 5), np.float32)
        for i, (digit, (top, left)) in enumerate(zip(digits, places)):
            colour = list(compose.COLOURS.values())[draws.below(len(compose.COLOURS))]
            covered = self.glyphs.coverage[0][digit][..., None] / 255
            image[top : top + BOX, left : left + BOX] = covered * colour
            sides = np.array([left, top, BOX, BOX]) / compose.CANVAS
            layout[i] = [self.labels[digit], *sides]
        return np.rint(image).astype(np.uint8), layout


@dataclasses.dataclass(frozen=True)
class CentreDigits:
    """Digits to pictures of them, large and in the centre, coloured as `compose` draws them.

    Attributes:
      glyphs: every digit of the source, resized.
      seed: of what is drawn.
    """

    glyphs: compose.Glyphs
    seed: int

    def __call__(self, batch: Batch) -> Batch:
        drawn = compose.draw_attributes(batch["label"], batch["index"], batch["epoch"], self.seed)
        for name, value in (("size", "large"), ("place", "centre")):
            which = compose.VALUES[name].index(value)
            drawn[name] = np.full_like(drawn[name], which)
        return {**batch, "image": compose.render(self.glyphs, batch["index"], drawn)}


@dataclasses.dataclass(frozen=True)
class CheckSegments:
    """That there is a map of labels, and that each of them is one of `classes`."""

    classes: int

    def __call__(self, batch: Batch) -> Batch:
        if "segments" not in batch:
            raise ValueError(
                "conditioning.concat='semantic' reads maps of labels, but the data have none: add "
                "data.segments"
            )
        if (most := int(batch["segments"].max())) >= self.classes:
            raise ValueError(
                f"a map has the label {most}, but model.rescaler.classes={self.classes}: raise it "
                "above that, or map the label to another"
            )
        return batch


@dataclasses.dataclass(frozen=True)
class SegmentDigits:
    """Adds "segments" of composed digits: uint8 (batch, 32, 32), 0 the ground, 1 + d the digit d.

    The map is of the digit's own pixels, an eighth of them and more covered.
    """

    glyphs: compose.Glyphs

    def __call__(self, batch: Batch) -> Batch:
        names = compose.ATTRIBUTES
        drawn = {name: batch["attributes"][:, i] for i, name in enumerate(names)}
        covered = compose.coverage(self.glyphs, batch["index"], drawn) > 32
        labels = (1 + drawn["digit"]).astype(np.uint8)[:, None, None]
        return {**batch, "segments": covered * labels}
