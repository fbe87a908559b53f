"""Numbers of samples of a folder's pictures, on what needs no download.

kid, frechet_distance   between samples and training pictures, on the features below; for the
                        pictures held out as well (`held_out`): what a perfect model would have;
                        None, and a sentence in `warnings`, of fewer than `FEWEST` pictures
adherence               `matcher.py`'s, of samples and of the held-out pictures; None where there
                        are no captions or classes, or captions repeat no words
features                of 16 fixed random filters of 5x5 pixels at each of three scales (whole,
                        half and quarter size): the mean of relu(response) in each quarter of the
                        picture, 192 numbers, over their deviations among training pictures. They
                        see colours, layout, edges and noise, and no meaning; distances on them
                        compare within one folder and size, and are no FID
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from diffusion.metrics import frechet, kernel
from diffusion.metrics.intervals import Estimate, beside
from diffusion.training import codec
from experiments.quickstart import matcher

MOST_PICTURES = 10_000  # of the training split
FEWEST = 200  # pictures for a distance: the features are 192 numbers
BATCH = 50
NHWC = ("NHWC", "HWIO", "NHWC")


@dataclasses.dataclass(frozen=True)
class Pictures:
    """uint8 pictures of one size and what is said of them; `said` None: nothing."""

    pixels: np.ndarray
    said: list[str] | None

    def shuffled(self, seed: int) -> "Pictures":
        order = np.random.default_rng(seed).permutation(len(self.pixels))
        said = None if self.said is None else [self.said[i] for i in order]
        return Pictures(self.pixels[order], said)

    def first(self, num: int) -> "Pictures":
        return Pictures(self.pixels[:num], None if self.said is None else self.said[:num])


FILTERS, SCALES = 16, 3


@jax.jit
def _features(image):
    x, found = codec.signed(image), []
    for scale in range(SCALES):
        key = jax.random.fold_in(jax.random.key(0), scale)
        kernel = jax.random.normal(key, (5, 5, 3, FILTERS)) / np.sqrt(75)
        h = jax.nn.relu(lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC))
        found.append(_mean(h, x.shape[1] // 2).reshape(len(x), -1))
        x = _mean(x, 2)
    return jnp.concatenate(found, axis=1)


def _mean(x, side: int):
    """Over squares of `side` pixels."""
    batch, height, width, channels = x.shape
    shape = (batch, height // side, side, width // side, side, channels)
    return x.reshape(shape).mean((2, 4))


def features(pixels: np.ndarray) -> np.ndarray:
    """(pictures, 192), in float32; `pixels` uint8 of a side that 8 divides."""
    parts = []
    for start in range(0, len(pixels), BATCH):
        part = pixels[start : start + BATCH]
        padded = np.pad(part, ((0, BATCH - len(part)), (0, 0), (0, 0), (0, 0)))
        parts.append(np.asarray(_features(padded))[: len(part)])
    return np.concatenate(parts)


def distances(pixels: dict[str, np.ndarray], train: np.ndarray) -> dict[str, dict[str, Any]]:
    """{name: {"kid", "frechet_distance", "count"}} of each set of `pixels` to the training ones."""
    of_train = features(train)
    mean, deviation = of_train.mean(0), of_train.std(0)
    deviation = np.maximum(deviation, 0.05 * deviation.mean() + 1e-6)  # what never varies
    reference, found = (of_train - mean) / deviation, {}
    statistics = frechet.feature_statistics(reference)
    for name, x in pixels.items():
        if min(len(x), len(train)) < FEWEST:
            found[name] = {"kid": None, "frechet_distance": None, "count": len(x)}
            continue
        own = (features(x) - mean) / deviation
        kid = kernel.kernel_distance(own, reference)
        distance = frechet.frechet_distance(frechet.feature_statistics(own), statistics)
        intervals = beside({"kid": Estimate(kid.value, kid.low, kid.high)})
        found[name] = {**intervals, "frechet_distance": distance, "count": len(x)}
    return found


def measure(samples: Pictures, held_out: Pictures, train: Pictures, seed: int) -> dict[str, Any]:
    """Everything above. `samples.said`: what each was asked for."""
    train = train.first(MOST_PICTURES)
    sets = {"samples": samples.pixels, "held_out": held_out.pixels}
    found = distances(sets, train.pixels)
    results: dict[str, Any] = {**found["samples"], "held_out": found["held_out"], "warnings": []}
    counts = {**{name: len(x) for name, x in sets.items()}, "training": len(train.pixels)}
    few = [f"{count} {name.replace('_', '-')}" for name, count in counts.items() if count < FEWEST]
    if few:
        results["warnings"] = [
            f"KID and the Frechet distance are left out where there are only {' and '.join(few)} "
            f"pictures: they need {FEWEST} of both sides"
        ]
    results["adherence"] = None
    if train.said is not None and samples.said is not None and held_out.said is not None:
        judge = matcher.train(train.pixels, train.said, seed)
        if judge is not None:
            results["adherence"] = judge.adherence(samples.pixels, samples.said, seed)
            real = judge.adherence(held_out.pixels, held_out.said, seed)
            results["held_out"]["adherence"] = real
            results["terms"] = len(judge.words)
    return results


def unseen(said: Sequence[str], train: Sequence[str]) -> int:
    """How many of `said` no training picture has."""
    known = set(train)
    return sum(text not in known for text in said)
