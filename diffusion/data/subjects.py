"""Pictures of one subject, told by prompts: for DreamBooth and textual inversion.

DreamBooth (https://arxiv.org/abs/2208.12242, eq. 2) learns a rare word for a subject from a few
pictures of it, and beside them from pictures of the subject's class, which the model drew itself
before, so that it does not forget the class:

    (1)  L = mean of the subject's losses + weight * mean of the class's
"""

import dataclasses
from typing import Any

import numpy as np

from diffusion.data import counter
from diffusion.data.sources import Batch

PROMPT, PICTURE = 41, 42  # of draws, folded into their keys


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Adds "caption", one of `prompts` drawn for each example of each epoch."""

    prompts: tuple[str, ...]
    seed: int

    def __call__(self, batch: Batch) -> Batch:
        key = (self.seed, PROMPT, batch["epoch"], batch["index"])
        drawn = counter.below(len(self.prompts), *key)
        return {**batch, "caption": [self.prompts[i] for i in drawn.tolist()]}


@dataclasses.dataclass(frozen=True)
class Prior:
    """Puts pictures of the class, drawn from `source`, at every odd place of the global batch, with
    one of `prompts`; and adds "weight" (batch,), with which the mean over an even batch is eq. 1.
    """

    source: Any
    prompts: tuple[str, ...]
    weight: float
    seed: int

    def __call__(self, batch: Batch) -> Batch:
        prior = batch["position"] % 2 == 1
        key = (self.seed, PICTURE, batch["epoch"], batch["index"])
        drawn = counter.below(len(self.source), *key)
        told = list(batch["caption"])
        found = {name: np.array(batch[name]) for name in ("image", "sizes") if name in batch}
        if prior.any():
            theirs = self.source.batch(drawn[prior])
            for name, column in found.items():
                column[prior] = theirs[name]
        of_class = Prompts(self.prompts, self.seed + 1)(batch)["caption"]
        told = [b if at else a for a, b, at in zip(told, of_class, prior)]
        weight = np.where(prior, 2 * self.weight, 2.0).astype(np.float32)
        return {**batch, **found, "caption": told, "weight": weight}
