"""Do the edges of a picture lie where they were asked for? Boolean masks, compared with tolerance.

With E the edges found and W those wanted, and a pixel near a set where one of the set is within
`tolerance` pixels of it (along both axes),

    (1)  precision = |{e in E near W}| / |E|,    recall = |{w in W near E}| / |W|
    (2)  F = 2 precision recall / (precision + recall)

as contour benchmarks have it (Martin et al., https://doi.org/10.1109/TPAMI.2004.1273918), for each
picture; an empty set agrees with an empty one alone.
"""

import numpy as np
from jaxtyping import Bool, Float


def agreement(
    found: Bool[np.ndarray, "batch height width"],
    wanted: Bool[np.ndarray, "batch height width"],
    tolerance: int = 1,
) -> dict[str, Float[np.ndarray, "batch"]]:
    """ "precision", "recall" and "f", eqs. 1-2, of each picture."""
    precision = _covered(found, _grown(wanted, tolerance))
    recall = _covered(wanted, _grown(found, tolerance))
    total = precision + recall
    f = np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)
    empty = ~found.any(axis=(1, 2)) & ~wanted.any(axis=(1, 2))
    scores = {"precision": precision, "recall": recall, "f": f}
    return {name: np.where(empty, 1.0, value) for name, value in scores.items()}


def _grown(mask: np.ndarray, tolerance: int) -> np.ndarray:
    """The pixels near the mask."""
    around = [(0, 0), (tolerance, tolerance), (tolerance, tolerance)]
    padded, (_, height, width) = np.pad(mask, around), mask.shape
    shifts = range(2 * tolerance + 1)
    views = [padded[:, i : i + height, j : j + width] for i in shifts for j in shifts]
    return np.logical_or.reduce(views)


def _covered(mask: np.ndarray, by: np.ndarray) -> np.ndarray:
    """The fraction of the mask's pixels that are in `by`; 0 where it has none."""
    count = mask.sum(axis=(1, 2))
    inside = (mask & by).sum(axis=(1, 2))
    return np.divide(inside, count, out=np.zeros(len(mask)), where=count > 0)
