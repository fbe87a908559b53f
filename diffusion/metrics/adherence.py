"""Does a digit image show what its prompt said? Direct measurements on pixels, with no network.

An image is one flat background b, and a digit of one flat colour c under anti-aliased coverage a in
[0, 1]:

    x(i, j) = a(i, j) c + (1 - a(i, j)) b + noise.                                              (1)

The background is the palette's colour nearest to the median of the image's outermost pixels. The
digit is what lies far from it: with d = |x - b|,

    foreground = { d > max(peak / 2, floor) },   peak = mean of the 12 largest d,               (2)

where `floor` keeps a decoder's noise from being read as a digit. Thin strokes are mostly rim, and
blurred ones reach full coverage nowhere, so the mean m of x under the weights d⁴ on the foreground
lies between b and c. The colour is the c of the palette whose upper half of the segment from b to c
is nearest to m,

    min over a in [1/2, 1] of |m - b - a (c - b)|  +  (1 - a) |c - b| / 10,                     (3)

where the second term tells apart colours that lie on one line with the background. Place and size
come from the box that holds the foreground, less pixels with none of it among their eight
neighbours; half of the peak is where blur leaves an edge. An image with no foreground shows
nothing: colour, place and size are `MISSING`, which equals no wanted value.

Adherence is the fraction of images whose measured attributes are the wanted ones, with Wilson's
interval. Which digit it is, only a classifier can say: add its answer to the measured attributes as
"digit".
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from diffusion.metrics.intervals import beside, wilson

MISSING = -1
PEAK_PIXELS = 12

Table = Mapping[str, Sequence[float | int]]


def measure(
    images: UInt8[np.ndarray, "batch height width 3"],
    *,
    colours: Table,
    backgrounds: Table,
    places: Table,
    sizes: Mapping[str, float | int],
    floor: float | int = 60,
) -> dict[str, Int[np.ndarray, "batch"]]:
    """Attributes of each image, as positions in the tables given.

    Args:
      images: uint8 in 0..255.
      colours, backgrounds: name to (red, green, blue) in 0..255.
      places: name to the (row, column) of the centre of the digit's box, as fractions of height and
        width.
      sizes: name to the longer side of the digit's box, in pixels.
      floor: least distance from the background, in grey levels, that counts as digit.

    Returns:
      "background", "colour", "place" and "size": int32 (batch,) each, `MISSING` where no digit is
      seen.
    """
    x = images.astype(np.float32)
    background_table = _rows(backgrounds)
    background = _nearest(_frame_median(x), background_table)
    distance = np.linalg.norm(x - background_table[background][:, None, None], axis=-1)
    threshold = np.maximum(_peak(distance) / 2, floor)
    foreground = _connected(distance > threshold[:, None, None])
    seen = foreground.any(axis=(1, 2))
    centre, extent = _box(foreground)
    measured = {
        "colour": _colour(x, distance * foreground, background_table[background], _rows(colours)),
        "place": _nearest(centre / np.array(images.shape[1:3]), _rows(places)),
        "size": _nearest(extent.max(axis=1, keepdims=True), _rows(sizes)),
    }
    measured = {name: np.where(seen, value, MISSING) for name, value in measured.items()}
    return {name: v.astype(np.int32) for name, v in {"background": background, **measured}.items()}


def adherence(
    predicted: Mapping[str, Int[np.ndarray, "batch"]],
    wanted: Mapping[str, Int[np.ndarray, "wanted"]],
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Fraction of samples in which each wanted attribute, and `all` at once, is the predicted one.

    Returns:
      A fraction for each name in `wanted` and for "all"; "intervals" with [low, high] for each of
      those (Wilson); "count". Plain numbers, as JSON takes them.

    Raises:
      ValueError: an attribute is not measured, lengths differ, or there are no samples.
    """
    correct = {}
    for name, want in wanted.items():
        if name not in predicted:
            raise ValueError(
                f"wanted attribute {name!r} is not among the predicted {sorted(predicted)}: "
                "measure it too"
            )
        if np.shape(predicted[name]) != np.shape(want):
            raise ValueError(
                f"{name!r}: {np.size(predicted[name])} predictions for {np.size(want)} wanted "
                "values; give one a sample"
            )
        correct[name] = np.asarray(predicted[name]) == np.asarray(want)
    if not correct:
        raise ValueError("wanted names no attribute: give at least one")
    correct["all"] = np.logical_and.reduce(list(correct.values()))
    estimates = {
        name: wilson(int(hit.sum()), hit.size, confidence) for name, hit in correct.items()
    }
    return {**beside(estimates), "count": int(correct["all"].size)}


def _rows(table: Mapping[str, Any]) -> np.ndarray:
    """The table's values as (entries, components)."""
    return np.asarray(list(table.values()), np.float32).reshape(len(table), -1)


def _nearest(
    points: Float[np.ndarray, "batch components"], table: Float[np.ndarray, "entries components"]
) -> np.ndarray:
    return np.square(points[:, None] - table).sum(axis=-1).argmin(axis=1)


def _frame_median(x: np.ndarray) -> np.ndarray:
    frame = [x[:, 0], x[:, -1], x[:, 1:-1, 0], x[:, 1:-1, -1]]
    return np.median(np.concatenate(frame, axis=1), axis=1)


def _peak(distance: np.ndarray) -> np.ndarray:
    flat = np.sort(distance.reshape(len(distance), -1), axis=1)
    return flat[:, -PEAK_PIXELS:].mean(axis=1)


def _colour(
    x: np.ndarray, weight: np.ndarray, background: np.ndarray, palette: np.ndarray
) -> np.ndarray:
    """Position in the palette by eq. (3), for weights that are 0 off the foreground."""
    weight = weight[..., None] ** 4
    mean = (x * weight).sum(axis=(1, 2)) / np.maximum(weight.sum(axis=(1, 2)), 1e-6)
    toward = palette - background[:, None]  # (batch, entries, 3)
    length = np.maximum(np.linalg.norm(toward, axis=-1), 1e-6)
    offset = (mean - background)[:, None]
    coverage = np.clip((offset * toward).sum(axis=-1) / length**2, 0.5, 1.0)
    miss = np.linalg.norm(offset - coverage[..., None] * toward, axis=-1)
    return (miss + 0.1 * (1 - coverage) * length).argmin(axis=1)


def _connected(foreground: np.ndarray) -> np.ndarray:
    """The foreground less its isolated pixels, which noise makes and strokes do not."""
    height, width = foreground.shape[1:]
    padded = np.pad(foreground, ((0, 0), (1, 1), (1, 1)))
    shifts = [(i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    near = [padded[:, i : i + height, j : j + width] for i, j in shifts]
    return foreground & np.logical_or.reduce(near)


def _box(foreground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre (row, column) and extent (height, width), pixels, of the box of the foreground."""
    lit = [np.any(foreground, axis=across) for across in (2, 1)]
    low = np.stack([np.argmax(side, axis=1) for side in lit], axis=1)
    high = np.stack([side.shape[1] - np.argmax(side[:, ::-1], axis=1) for side in lit], axis=1)
    return (low + high) / 2, (high - low).astype(np.float32)
