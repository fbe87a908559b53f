"""CLIP score: does the picture show what the caption says?

Hessel et al. 2021 (https://arxiv.org/abs/2104.08718, eq. 1) take, with c and v the vectors of a
caption and of an image,

    s = w max(cos(c, v), 0).                                                                    (1)

Here w = 100, as text-to-image papers print it (the paper's own is 2.5). The score of a set is the
mean. It depends on the CLIP that is used: name it beside the number.
"""

import numpy as np
from jaxtyping import Float

from diffusion.metrics.intervals import Estimate, mean_interval

SCALE = 100.0


def scores(
    images: Float[np.ndarray, "batch dim"], texts: Float[np.ndarray, "batch dim"]
) -> Float[np.ndarray, "batch"]:
    """Eq. 1 of each pair. ValueError for vectors that are not finite."""
    x, y = np.asarray(images, np.float64), np.asarray(texts, np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("CLIP's vectors are not finite: look for NaN among the images")
    cosine = (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
    return SCALE * np.maximum(cosine, 0.0)


def clip_score(
    images: Float[np.ndarray, "batch dim"],
    texts: Float[np.ndarray, "batch dim"],
    confidence: float = 0.95,
) -> Estimate:
    """The mean of eq. 1 with a normal interval (NaN of a single pair)."""
    return mean_interval(scores(images, texts), confidence)
