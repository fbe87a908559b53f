"""What happens to a batch between the source and the device: NumPy, whole batches at a time.

A transform is a callable from batch to batch. It may use "index" and "epoch", which the loader
adds, but nothing that depends on the rest of the batch, so that an example is the same in any
batch.
"""

import dataclasses
import threading
from collections.abc import Callable

import numpy as np

from diffusion.data.builders.captioned_digits import compose
from diffusion.data.counter import Draws
from diffusion.data.sources import Batch, Source
from diffusion.data.tokenizers import Tokenizer

Transform = Callable[[Batch], Batch]
CROP_PURPOSE = 34  # of draws, folded into their keys


@dataclasses.dataclass(frozen=True)
class ComposeDigits:
    """Grey digits to captioned colour pictures (see `builders.captioned_digits.compose`).

    Replaces "image" by uint8 (batch, 32, 32, 3), and adds "caption" and, int32 (batch, 5),
    "attributes" in the order of `compose.ATTRIBUTES`.

    Attributes:
      glyphs: every digit of the source, resized.
      seed: of the compositions.
      held_out: whether pairs held out of training may be drawn.
    """

    glyphs: compose.Glyphs
    seed: int
    held_out: bool = False

    @classmethod
    def of(cls, source: Source, seed: int, held_out: bool = False) -> "ComposeDigits":
        images = source.batch(np.arange(len(source)))["image"]
        return cls(compose.Glyphs.of(images[..., 0]), seed, held_out)

    def __call__(self, batch: Batch) -> Batch:
        image, captions, attributes = compose.compose(
            self.glyphs, batch["label"], batch["index"], batch["epoch"], self.seed, self.held_out
        )
        stacked = np.stack([attributes[name] for name in compose.ATTRIBUTES], axis=1)
        return {**batch, "image": image, "caption": captions, "attributes": stacked}


@dataclasses.dataclass(frozen=True)
class RecolourDigits:
    """`ComposeDigits`, with every other picture (by index and epoch) in a colour that is new.

    Attributes:
      compose: of the ordinary pictures.
      colour: a key of `compose.NEW_COLOURS`.
    """

    compose: ComposeDigits
    colour: str

    def __call__(self, batch: Batch) -> Batch:
        made = self.compose(batch)
        names = compose.ATTRIBUTES
        attributes = {name: made["attributes"][:, i] for i, name in enumerate(names)}
        image = compose.recolour(self.compose.glyphs, batch["index"], attributes, self.colour)
        new = (batch["index"] + batch["epoch"]) % 2 == 0
        words = list(compose.COLOURS)
        captions = [
            text.replace(words[colour], self.colour) if changed else text
            for text, colour, changed in zip(made["caption"], attributes["colour"], new)
        ]
        image = np.where(new[:, None, None, None], image, made["image"])
        return {**made, "image": image, "caption": captions}


class Tokenize:
    """Captions to "tokens", int32 (batch, length); "caption" goes.

    `captions` and `truncated` count what went through, over all threads.
    """

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        self.tokenizer = tokenizer
        self.length = length
        self.captions = 0
        self.truncated = 0
        self._lock = threading.Lock()

    def __call__(self, batch: Batch) -> Batch:
        tokens, cut = self.tokenizer.encode_and_mark(batch["caption"], self.length)
        with self._lock:
            self.captions += len(cut)
            self.truncated += int(cut.sum())
        rest = {name: value for name, value in batch.items() if name != "caption"}
        return {**rest, "tokens": tokens}


@dataclasses.dataclass(frozen=True)
class Keep:
    """Keeps the named entries of a batch, and the loader's own "position" and "index"."""

    names: tuple[str, ...]

    def __call__(self, batch: Batch) -> Batch:
        kept = (*self.names, "position", "index", "valid")
        return {name: value for name, value in batch.items() if name in kept}


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """Of images that nothing was cut off (a list), a square of `image_size` a side, drawn uniformly
    for each example of each epoch by `seed`; its place is put into "sizes" where there are any."""

    image_size: int
    seed: int

    def __call__(self, batch: Batch) -> Batch:
        keys = zip(batch["epoch"].tolist(), batch["index"].tolist())
        drawn = [Draws((self.seed, CROP_PURPOSE, *key)) for key in keys]
        size, found = self.image_size, {"image": [], "sizes": []}
        for image, draws in zip(batch["image"], drawn):
            top, left = (draws.below(side - size + 1) for side in image.shape[:2])
            found["image"].append(image[top : top + size, left : left + size])
            found["sizes"].append((top, left))
        made = {**batch, "image": np.stack(found["image"])}
        if "sizes" in batch:
            made["sizes"] = batch["sizes"].copy()
            made["sizes"][:, 2:4] = found["sizes"]
        return made


@dataclasses.dataclass(frozen=True)
class PadImage:
    """Pads images with `value` to `image_size` a side, centred (28 to 32: two pixels all round)."""

    image_size: int
    value: int = 0

    def __call__(self, batch: Batch) -> Batch:
        image = batch["image"]
        missing = [self.image_size - side for side in image.shape[1:-1]]
        if min(missing) < 0:
            raise ValueError(
                f"data.image_size={self.image_size} is under the images' {image.shape[1:-1]}: "
                "padding cannot shrink them"
            )
        around = [(0, 0), *((m // 2, m - m // 2) for m in missing), (0, 0)]
        return {**batch, "image": np.pad(image, around, constant_values=self.value)}


@dataclasses.dataclass(frozen=True)
class Channels:
    """Repeats a single channel `channels` times; leaves images that have so many as they are."""

    channels: int

    def __call__(self, batch: Batch) -> Batch:
        image = batch["image"]
        if image.shape[-1] == self.channels:
            return batch
        if image.shape[-1] != 1:
            raise ValueError(
                f"data.channels={self.channels}, but images have {image.shape[-1]}: set it to that"
            )
        return {**batch, "image": np.repeat(image, self.channels, axis=-1)}


@dataclasses.dataclass(frozen=True)
class FlipOddEpochs:
    """Mirrors images left to right in odd epochs, so that latents hold both variants."""

    def __call__(self, batch: Batch) -> Batch:
        image = batch["image"]
        odd = (batch["epoch"] % 2 == 1).reshape(-1, *[1] * (image.ndim - 1))
        return {**batch, "image": np.where(odd, image[..., ::-1, :], image)}


@dataclasses.dataclass(frozen=True)
class Edges:
    """Adds "hint", the edges of "image" in white on black: uint8 (batch, height, width, 3).

    An edge is where the colour changes by more than `threshold` grey levels over a central
    difference, in the channel that changes most.
    """

    threshold: int = 48

    def __call__(self, batch: Batch) -> Batch:
        return {**batch, "hint": edges(batch["image"], self.threshold)}


def edges(image: np.ndarray, threshold: int = 48) -> np.ndarray:
    """See `Edges`."""
    x = np.pad(image.astype(np.int32), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    down = x[:, 2:, 1:-1] - x[:, :-2, 1:-1]
    right = x[:, 1:-1, 2:] - x[:, 1:-1, :-2]
    strength = np.square(down) + np.square(right)  # of twice the gradient
    white = strength.max(axis=-1, keepdims=True) > (2 * threshold) ** 2
    return np.repeat(np.where(white, 255, 0).astype(np.uint8), 3, axis=-1)
