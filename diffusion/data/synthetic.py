"""Data off the two-dimensional path: a series, and short videos of moving digits.

Both show that process, networks and trainer take any number of spatial axes. Everything of an
example is a hash of (seed, epoch, index), as in `builders.captioned_digits.compose`.

A series is like an electrocardiogram: with beats at times c_k = phi + k r and the waves P, Q, R, S,
T of a beat as bumps of height h_w, place p_w and width s_w (in beats; the shape of McSharry et al.
2003, https://doi.org/10.1109/TBME.2003.808805, without its dynamics),

    x(i) = gain sum_k sum_w h_w exp(-((i - c_k) / r - p_w)^2 / (2 s_w^2)) + wander + noise,     (1)

with period r, phase phi, gain, and a slow sinusoidal wander of the baseline drawn for each.

In a video a digit moves along a straight line at constant speed, from one place to another:

    place(f) = start + (end - start) f / (frames - 1),   f = 0 .. frames - 1,                   (2)

drawn with bilinear weights, so that a digit lies between pixels where eq. 2 says so.
"""

import dataclasses

import numpy as np
from PIL import Image

from diffusion.data import counter
from diffusion.data.sources import Batch, MemorySource, Source

# Height, place and width of the waves P, Q, R, S, T: the last two in beats.
WAVES = np.array(
    [
        (0.12, -0.20, 0.030),
        (-0.12, -0.035, 0.012),
        (1.00, 0.00, 0.014),
        (-0.22, 0.035, 0.012),
        (0.28, 0.28, 0.050),
    ]
)
PERIODS = (40.0, 80.0)  # samples a beat
GAINS = (0.5, 0.8)
WANDER, NOISE = 0.08, 0.01
GLYPH = 10  # pixels of a digit's longer side in a video


def uniform(low: float | int, high: float | int, *key: int | np.ndarray) -> np.ndarray:
    """In [low, high), a function of the key alone."""
    return low + (high - low) * (counter.bits(*key) >> np.uint64(11)) * 2.0**-53


def series(index: np.ndarray, length: int, seed: int) -> np.ndarray:
    """Eq. 1: float32 (batch, length, 1), within [-1, 1]."""

    def draw(low: float | int, high: float | int, purpose: int) -> np.ndarray:
        return uniform(low, high, seed, purpose, index)[:, None]

    period, gain = draw(*PERIODS, 0), draw(*GAINS, 1)
    phase = draw(0, 1, 2) * period
    place = np.arange(length)[None]
    inside = ((place - phase) / period + 0.5) % 1 - 0.5  # place within the beat, in beats
    beats = sum(h * np.exp(-((inside - p) ** 2) / (2 * s**2)) for h, p, s in WAVES)
    slow = np.sin(2 * np.pi * (place / length * draw(0.5, 1.5, 3) + draw(0, 1, 4)))
    u, v = (uniform(1e-12, 1, seed, n, index[:, None], place) for n in (5, 6))
    noise = np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)  # Box-Muller
    x = gain * beats + WANDER * slow + NOISE * noise
    return np.clip(x, -1, 1).astype(np.float32)[..., None]


def signals(examples: int, length: int, seed: int, split: str = "train") -> Source:
    """A data set of series; "test" holds others than "train"."""
    first = {"train": 0, "test": 2**40}[split]
    values = series(first + np.arange(examples, dtype=np.uint64), length, seed)
    return MemorySource({"image": values}, {"name": "signals", "split": split})


@dataclasses.dataclass(frozen=True)
class MoveDigits:
    """Grey digits to videos (eq. 2): "image" becomes uint8 (batch, frames, side, side, 1).

    Attributes:
      glyphs: float32 (examples, GLYPH, GLYPH), coverage of each digit of the source in [0, 1].
    """

    glyphs: np.ndarray
    frames: int
    side: int
    seed: int

    @classmethod
    def of(cls, source: Source, frames: int, side: int, seed: int) -> "MoveDigits":
        if side <= GLYPH or frames < 2:
            raise ValueError(
                f"data.image_size=({frames}, {side}, {side}) leaves a digit of {GLYPH} pixels no "
                f"room to move: give at least 2 frames of more than {GLYPH} pixels a side"
            )
        images = source.batch(np.arange(len(source)))["image"][..., 0]
        small = [Image.fromarray(i).resize((GLYPH, GLYPH), Image.Resampling.BOX) for i in images]
        return cls(np.stack([np.asarray(i, np.float32) / 255 for i in small]), frames, side, seed)

    def __call__(self, batch: Batch) -> Batch:
        index, epoch = (batch[name].astype(np.uint64) for name in ("index", "epoch"))
        room = self.side - GLYPH
        ends = [uniform(0, room, self.seed, 10 + n, epoch, index) for n in range(4)]
        along = np.linspace(0, 1, self.frames)
        top, left = (a[:, None] + (b - a)[:, None] * along for a, b in (ends[:2], ends[2:]))
        glyphs = self.glyphs[batch["index"]]
        rows, columns = (self._weights(place) for place in (top, left))
        video = np.einsum("nfyi,nij,nfxj->nfyx", rows, glyphs, columns, optimize=True)
        return {**batch, "image": np.round(video * 255).astype(np.uint8)[..., None]}

    def _weights(self, place: np.ndarray) -> np.ndarray:
        """(batch, frames, side, GLYPH): how much of the glyph's line i falls on the frame's y."""
        position = place[..., None, None] + np.arange(GLYPH)
        line = np.arange(self.side)[:, None]
        return np.maximum(1 - np.abs(line - position), 0).astype(np.float32)
