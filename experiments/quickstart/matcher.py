"""Which caption does a picture have? A small network that reads captions' words from pictures.

It is trained on the training split alone, to say of each word and each pair of neighbouring words
that captions repeat whether the picture's caption has it. With p_w what it says of w, a caption's
score is

    log p(caption | picture) = sum over w in it of log p_w + over the others of log (1 - p_w)    (1)

and a picture matches its caption if of that and some other captions its own scores highest. It is
no CLIP: it knows this folder alone, and "adherence" on it compares with that of real pictures that
it never saw, which stands beside it, and with nothing outside this folder.
"""

import collections
import dataclasses
import functools
import itertools
import re
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion import wording
from diffusion.metrics.intervals import beside, wilson
from diffusion.models.image_encoder import DigitClassifier
from diffusion.training import codec

WORDS = 512  # at most, and pairs of them
RAREST, MOST_FREQUENT = 0.005, 0.95  # of the captions that have a word
FEWEST = 5  # captions with it
CANDIDATES = 16  # captions that a picture's own is told from, itself among them
STEPS, BATCH = 600, 64


def terms(caption: str) -> set[str]:
    """Its words and pairs of neighbours: "a red 3" to {a, red, 3, a red, red 3}."""
    words = re.findall(r"\w+", caption.lower())
    return {*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))}


def vocabulary(captions: Sequence[str]) -> list[str]:
    """The terms that captions repeat, the most frequent first; those in almost all tell nothing."""
    counts = collections.Counter(term for caption in captions for term in terms(caption))
    low, high = max(FEWEST, RAREST * len(captions)), MOST_FREQUENT * len(captions)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [term for term, count in ordered if low <= count <= high][:WORDS]


def indicators(captions: Sequence[str], words: Sequence[str]) -> np.ndarray:
    """bool (captions, words)."""
    found = [terms(caption) for caption in captions]
    rows = [[word in one for word in words] for one in found]
    return np.array(rows, bool).reshape(len(rows), len(words))


@dataclasses.dataclass(frozen=True)
class Matcher:
    words: list[str]
    network: Any
    params: Any

    def scores(self, pixels: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """Equation 1 of every picture (uint8) and every caption: (pictures, captions)."""
        has = indicators(captions, self.words).astype(np.float32)
        rows = []
        for start in range(0, len(pixels), BATCH):
            part = pixels[start : start + BATCH]
            padded = np.pad(part, ((0, BATCH - len(part)), (0, 0), (0, 0), (0, 0)))
            logits = np.asarray(_logits(self.network, self.params, padded))[: len(part)]
            # log p = -softplus(-l), log (1 - p) = -softplus(l), and their difference is l
            rows.append(logits @ has.T - np.logaddexp(0, logits).sum(1, keepdims=True))
        return np.concatenate(rows)

    def adherence(
        self, pixels: np.ndarray, captions: Sequence[str], seed: int = 0
    ) -> dict[str, Any]:
        """Share of pictures whose own caption scores highest of `CANDIDATES`, with Wilson's
        interval; `chance` is that of a guess. Captions of the same terms count as one."""
        alike = indicators(captions, self.words)
        _, first, own = np.unique(alike, axis=0, return_index=True, return_inverse=True)
        scores = self.scores(pixels, [captions[i] for i in first])
        count, rng = min(CANDIDATES, len(first)), np.random.default_rng(seed)
        right = 0
        for row, mine in zip(scores, own.reshape(-1)):
            others = np.delete(np.arange(len(first)), mine)
            drawn = rng.choice(others, count - 1, replace=False)
            right += bool((row[mine] > row[drawn]).all())
        return {**beside({"value": wilson(right, len(pixels))}), "chance": 1 / count}


def _training(side: int, words: int, seed: int) -> tuple[Any, Any, Any, Any]:
    """Network, its parameters, optimiser and compiled step, for pictures of a side."""
    network = DigitClassifier(feature_dim=128, classes=words, window=0, dropout=0.2)
    params = network.init(jax.random.key(seed), jnp.zeros((1, side, side, 3)))["params"]
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, STEPS), weight_decay=1e-2)

    @jax.jit
    def step(params, state, image, wanted, key):
        def loss(params):
            logits = network.apply({"params": params}, codec.signed(image), keys=key)
            return optax.sigmoid_binary_cross_entropy(logits, wanted).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return network, params, optimizer, step


def time_step(side: int, times: int = 5) -> tuple[float, float]:
    """(seconds to compile, seconds a step) of its training, on made-up pictures."""
    _, params, optimizer, step = _training(side, 64, 0)
    image, keys = (
        np.zeros((BATCH, side, side, 3), np.uint8),
        jax.random.split(jax.random.key(0), BATCH),
    )
    given, moments, secs = (
        (image, np.zeros((BATCH, 64), np.float32), keys),
        optimizer.init(params),
        [],
    )
    for _ in range(times):
        begun = time.perf_counter()
        params, moments = jax.block_until_ready(step(params, moments, *given))
        secs.append(time.perf_counter() - begun)
    return secs[0], statistics.median(secs[1:])


def train(pixels: np.ndarray, captions: Sequence[str], seed: int = 0) -> Matcher | None:
    """On uint8 pictures (n, height, width, 3) and their captions; None where no words repeat."""
    words = vocabulary(captions)
    if len(np.unique(indicators(captions, words), axis=0)) < 2:
        return None
    has = indicators(captions, words).astype(np.float32)
    network, params, optimizer, step = _training(pixels.shape[1], len(words), seed)
    state, rng = optimizer.init(params), np.random.default_rng(seed)
    progress = wording.Progress("a small network learns to read captions", STEPS)
    for number in range(STEPS):
        rows = rng.integers(0, len(pixels), BATCH)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), BATCH)
        params, state = step(params, state, pixels[rows], has[rows], keys)
        progress.at(number + 1)
    progress.close()
    return Matcher(words, network, params)


@functools.partial(jax.jit, static_argnums=0)
def _logits(network, params, image):
    return network.apply({"params": params}, codec.signed(jnp.asarray(image)))
