"""Captioned colour pictures of grey digits, composed in batches from integer keys.

A picture is a 32x32 canvas of one background colour with one digit in one colour, at one size, in
one place. With a(i, j) in [0, 1] the digit's own anti-aliased coverage, moved to its place, and f,
b the colours,

    x(i, j) = a(i, j) f + (1 - a(i, j)) b.                                                    (1)

Everything drawn for an example (colour, background, size, place, phrasing) is a hash of (seed,
epoch, index): the same key gives the same picture and caption in any batch, on any host, under any
order of reading. Attributes are independent and uniform, except that the pairs in `HELD_OUT` are
never drawn unless asked for: whether a model draws a red three, having seen red and seen threes, is
what they measure.

Boxes lie on offsets that differ by multiples of four pixels (1, 9, 17 for small, 2, 6, 10 for
large), so that a digit keeps its phase against a patch or latent grid of 4 from place to place, and
a one-pixel frame of the canvas is always background.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from diffusion.data import counter

CANVAS = 32
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (225, 25, 35),
    "green": (20, 155, 45),
    "blue": (45, 75, 245),
    "orange": (250, 140, 5),
    "magenta": (205, 45, 200),
    "cyan": (10, 185, 205),
}
# Outside the palette, for teaching a trained model something new.
NEW_COLOURS = {"yellow": (250, 225, 20)}
BACKGROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255)}
SIZES = {"small": 14, "large": 20}  # longer side of the digit's bounding box, pixels
# (row, column) of the box: 0 is the top or left edge, 1 the middle, 2 the bottom or right edge.
PLACES = {
    "top left": (0, 0),
    "top right": (0, 2),
    "bottom left": (2, 0),
    "bottom right": (2, 2),
    "centre": (1, 1),
}
OFFSETS = {"small": (1, 9, 17), "large": (2, 6, 10)}  # pixels, for edge, middle, edge
# One digit a colour and at most one colour a digit: every colour and every digit is seen in
# training, and colours stay uniform over a set that has as many of each digit.
HELD_OUT = frozenset(
    ((1, "blue"), (2, "orange"), (3, "red"), (5, "cyan"), (7, "green"), (8, "magenta"))
)
PHRASINGS = (
    "a {size} {colour} {digit} {place} on {background}",
    "{size} {colour} {digit}, {place} on {background}",
    "on {background}, a {size} {colour} {digit} {place}",
    "{place}, a {size} {colour} {digit} on {background}",
    "the digit {digit}, {size} and {colour}, {place} on {background}",
)
ATTRIBUTES = ("digit", "colour", "background", "size", "place")
# Names of each attribute's values, in the order of its integers.
VALUES: dict[str, tuple[str, ...]] = {
    "digit": DIGITS,
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
    "size": tuple(SIZES),
    "place": tuple(PLACES),
}
# Purposes, folded into the key so that no two draws share their bits.
_COLOUR, _BACKGROUND, _SIZE, _PLACE, _PHRASING, _PROMPT = range(1, 7)

Attributes = dict[str, np.ndarray]  # each of ATTRIBUTES to int32 (batch,)


def _held_out_table() -> np.ndarray:
    table = np.zeros((len(DIGITS), len(COLOURS)), bool)
    for digit, colour in HELD_OUT:
        table[digit, VALUES["colour"].index(colour)] = True
    return table


_IS_HELD_OUT = _held_out_table()
# Row d: the colours allowed with digit d first, the held-out ones last; and how many are allowed.
_COLOUR_ORDER = np.argsort(_IS_HELD_OUT, axis=1, kind="stable")
_ALLOWED = (~_IS_HELD_OUT).sum(axis=1)
_OFFSET = np.array(
    [[[OFFSETS[size][edge] for edge in place] for place in PLACES.values()] for size in SIZES]
)  # (size, place, 2)


def is_held_out(attributes: Mapping[str, np.ndarray]) -> np.ndarray:
    """Whether each example's (digit, colour) is kept out of training: bool (batch,)."""
    return _IS_HELD_OUT[attributes["digit"], attributes["colour"]]


def draw_attributes(
    labels: np.ndarray,
    index: np.ndarray,
    epoch: np.ndarray | int,
    seed: int,
    held_out: bool = False,
) -> Attributes:
    """Attributes for digits `labels` (batch,), as integers into `VALUES`: int32 (batch,) each.

    `held_out=True` lets the held-out pairs be drawn as often as any other (for a validation set
    that ignores the split; training leaves it False).
    """
    key = (seed, epoch, index)
    labels = np.asarray(labels)
    choices = len(COLOURS) if held_out else _ALLOWED[labels]
    drawn = {
        "digit": labels,
        "colour": _COLOUR_ORDER[labels, counter.below(choices, *key, _COLOUR)],
        "background": counter.below(len(BACKGROUNDS), *key, _BACKGROUND),
        "size": counter.below(len(SIZES), *key, _SIZE),
        "place": counter.below(len(PLACES), *key, _PLACE),
    }
    return {name: value.astype(np.int32) for name, value in drawn.items()}


def caption(attributes: Mapping[str, np.ndarray], phrasing: np.ndarray) -> list[str]:
    """One caption an example, in the phrasing that its integer names."""
    columns = [np.asarray(attributes[name]).tolist() for name in ATTRIBUTES]
    captions = []
    for *values, which in zip(*columns, np.asarray(phrasing).tolist()):
        words = {name: VALUES[name][value] for name, value in zip(ATTRIBUTES, values)}
        place = words["place"]
        words["place"] = "in the centre" if place == "centre" else f"at the {place}"
        captions.append(PHRASINGS[which].format(**words))
    return captions


def parse(text: str) -> dict[str, int]:
    """The attributes that a caption states, for every phrasing (and any that keeps its words).

    Raises:
      ValueError: an attribute is missing or stated twice.
    """
    found = {}
    padded = f" {' '.join(text.lower().replace(',', ' ').split())} "
    for name, values in VALUES.items():
        stated = [i for i, value in enumerate(values) if f" {value} " in padded]
        if len(stated) != 1:
            raise ValueError(
                f"caption {text!r} names {len(stated)} values of {name!r}; it must name one of "
                f"{', '.join(values)}"
            )
        found[name] = stated[0]
    return found


def prompts(n: int, seed: int, held_out: bool) -> tuple[list[str], Attributes]:
    """`n` prompts for evaluation, uniform over attributes and phrasings.

    Args:
      held_out: draw the (digit, colour) pairs from `HELD_OUT` only; else from all the others only.

    Returns:
      The captions, and the attributes they state, int32 (n,) each.
    """
    pairs = np.argwhere(_IS_HELD_OUT if held_out else ~_IS_HELD_OUT)
    rows = np.arange(n)
    chosen = pairs[counter.below(len(pairs), seed, rows, int(held_out), _PROMPT)]
    key = (seed, -1 - int(held_out), rows)
    attributes = draw_attributes(chosen[:, 0], rows, key[1], seed)
    attributes["colour"] = chosen[:, 1].astype(np.int32)
    return caption(attributes, counter.below(len(PHRASINGS), *key, _PHRASING)), attributes


@dataclasses.dataclass(frozen=True)
class Glyphs:
    """Every digit of a set resized to every size, once, so that composing only copies and blends.

    `coverage[s]` is uint8 (digits, box, box): the digit's bounding box, its longer side `box`
    pixels, centred.
    """

    coverage: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, images: np.ndarray) -> "Glyphs":
        """From grey digits on black, uint8 (digits, height, width)."""
        crops = [_bounding_box(image) for image in images]
        return cls(tuple(np.stack([_fit(crop, box) for crop in crops]) for box in SIZES.values()))

    def __len__(self) -> int:
        return len(self.coverage[0])


def _bounding_box(image: np.ndarray) -> Image.Image:
    # Pixels under 1/8 of full scale are the faint rim of MNIST's anti-aliasing, which the eye does
    # not see.
    ink = image > 32
    if not ink.any():
        return Image.fromarray(image)
    (top, bottom), (left, right) = (
        np.flatnonzero(ink.any(axis=axis))[[0, -1]].tolist() for axis in (1, 0)
    )
    return Image.fromarray(image[top : bottom + 1, left : right + 1])


def _fit(crop: Image.Image, box: int) -> np.ndarray:
    scale = box / max(crop.size)
    width, height = (max(1, round(side * scale)) for side in crop.size)
    out = np.zeros((box, box), np.uint8)
    top, left = (box - height) // 2, (box - width) // 2
    resized = crop.resize((width, height), Image.Resampling.LANCZOS)
    out[top : top + height, left : left + width] = np.asarray(resized)
    return out


def render(glyphs: Glyphs, rows: np.ndarray, attributes: Mapping[str, np.ndarray]) -> np.ndarray:
    """Pictures of the digits `rows` with `attributes` (eq. 1): uint8 (batch, 32, 32, 3)."""
    covered = coverage(glyphs, rows, attributes)
    return blend(covered, attributes["colour"], attributes["background"])


def recolour(
    glyphs: Glyphs, rows: np.ndarray, attributes: Mapping[str, np.ndarray], colour: str
) -> np.ndarray:
    """As `render`, in a colour of NEW_COLOURS. ValueError for another."""
    if colour not in NEW_COLOURS:
        raise ValueError(f"data.colour={colour!r} is unknown: use one of {', '.join(NEW_COLOURS)}")
    alpha = coverage(glyphs, rows, attributes)[..., None] / 255
    back = np.array(list(BACKGROUNDS.values()))[attributes["background"]][:, None, None]
    return np.rint(alpha * NEW_COLOURS[colour] + (1 - alpha) * back).astype(np.uint8)


def coverage(glyphs: Glyphs, rows: np.ndarray, attributes: Mapping[str, np.ndarray]) -> np.ndarray:
    """a of eq. 1: uint8 (batch, 32, 32)."""
    coverage = np.zeros((len(rows), CANVAS, CANVAS), np.uint8)
    for s, box in enumerate(SIZES.values()):
        for p in range(len(PLACES)):
            (chosen,) = np.nonzero((attributes["size"] == s) & (attributes["place"] == p))
            top, left = _OFFSET[s, p]
            coverage[chosen, top : top + box, left : left + box] = glyphs.coverage[s][rows[chosen]]
    return coverage


def blend(coverage: np.ndarray, colour: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Eq. 1 for uint8 coverage (batch, height, width): a look-up of 256 blends a colour pair."""
    pair = (colour * len(BACKGROUNDS) + background).astype(np.int32) * 256
    return np.take(_BLENDS, pair[:, None, None] + coverage, axis=0)


def _blends() -> np.ndarray:
    alpha = np.arange(256).reshape(1, 1, 256, 1) / 255
    front = np.array(list(COLOURS.values())).reshape(-1, 1, 1, 3)
    back = np.array(list(BACKGROUNDS.values())).reshape(1, -1, 1, 3)
    return np.rint(alpha * front + (1 - alpha) * back).astype(np.uint8).reshape(-1, 3)


_BLENDS = _blends()


def compose(
    glyphs: Glyphs,
    labels: Sequence[int] | np.ndarray,
    index: np.ndarray,
    epoch: np.ndarray | int,
    seed: int,
    held_out: bool = False,
) -> tuple[np.ndarray, list[str], Attributes]:
    """Pictures, captions and attributes of digits `index` in their `epoch`-th composition.

    Args:
      glyphs: all digits of the set, resized.
      labels: what the digits `index` are, (batch,).
      index: which digit of the set, int (batch,).
      epoch: which composition of it, int (batch,) or one for all.
      seed: of the whole set of compositions.
      held_out: see `draw_attributes`.

    Returns:
      uint8 (batch, 32, 32, 3), the captions, and int32 (batch,) an attribute.
    """
    attributes = draw_attributes(np.asarray(labels), index, epoch, seed, held_out)
    phrasing = counter.below(len(PHRASINGS), seed, epoch, index, _PHRASING)
    return render(glyphs, index, attributes), caption(attributes, phrasing), attributes


def vocabulary() -> list[str]:
    """Captions that between them use every word of every phrasing: what a tokenizer trains on."""
    count = max(len(values) for values in VALUES.values())
    rows = np.arange(count)
    attributes = {name: rows % len(values) for name, values in VALUES.items()}
    return [
        text
        for which in range(len(PHRASINGS))
        for text in caption(attributes, np.full(count, which))
    ]
