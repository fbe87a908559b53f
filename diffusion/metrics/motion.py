"""Whether things move as they should: the centre of brightness of each frame, and its path.

With b the brightness above black of a frame, its centre is c_f = sum(b r) / sum(b) over places r.
A thing that moves at constant speed has c_f = a + v f; the path's straightness is the share of the
centres' variance that the least-squares line explains,

    R^2 = 1 - sum_f |c_f - a - v f|^2 / sum_f |c_f - mean c|^2,                                  (1)

1 for steady motion, about 1 / (frames - 1) for frames in random order.
"""

import numpy as np


def centres(videos: np.ndarray) -> np.ndarray:
    """(batch, frames, height, width, channels) to (batch, frames, 2): row and column, pixels.

    A black frame has NaN.
    """
    bright = videos.astype(np.float64).sum(-1)
    total = bright.sum((2, 3))
    with np.errstate(invalid="ignore", divide="ignore"):
        row = (bright.sum(3) * np.arange(bright.shape[2])).sum(2) / total
        column = (bright.sum(2) * np.arange(bright.shape[3])).sum(2) / total
    return np.stack([row, column], -1)


def straightness(path: np.ndarray) -> np.ndarray:
    """Eq. 1 for each path (batch, frames, 2); NaN for one that stands still or has a gap."""
    frames = path.shape[1]
    f = np.arange(frames) - (frames - 1) / 2
    offset = path - path.mean(1, keepdims=True)
    velocity = (offset * f[:, None]).sum(1) / (f**2).sum()
    rest = offset - velocity[:, None] * f[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - (rest**2).sum((1, 2)) / (offset**2).sum((1, 2))


def speed(path: np.ndarray) -> np.ndarray:
    """Mean displacement from frame to frame, pixels, of each path (batch, frames, 2)."""
    return np.sqrt((np.diff(path, axis=1) ** 2).sum(-1)).mean(1)
