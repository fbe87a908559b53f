"""Inception score: do samples look like something, and like many things?

Salimans et al. 2016 (arXiv:1606.03498, section 4), from the class probabilities p(c|x) of a
classifier:

    IS = exp( mean_x KL( p(c|x) || mean_x p(c|x) ) ),                                           (1)

between 1 and the number of classes. The published number is the mean over 10 splits, with the
deviation between them; splits are of shuffled samples, since generated files often lie ordered by
class. The interval is by bootstrap over all samples (see `intervals`).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion.metrics.intervals import bootstrap


class InceptionScore(NamedTuple):
    """Mean and standard deviation over splits, and an interval for the mean."""

    value: float
    std: float
    low: float
    high: float
    splits: int


def score(log_probabilities: Float[np.ndarray, "samples classes"]) -> float:
    """Eq. (1) over all the samples given."""
    marginal = np.exp(log_probabilities).mean(axis=0)
    # A class that no sample has contributes p log p = 0.
    entropy = -np.sum(marginal * np.log(np.where(marginal > 0, marginal, 1.0)))
    negative = np.exp(log_probabilities) * np.maximum(log_probabilities, -1e30)
    return float(np.exp(negative.sum(axis=1).mean() + entropy))


def inception_score(
    logits: Float[np.ndarray, "samples classes"],
    *,
    splits: int = 10,
    replicates: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> InceptionScore:
    """Inception score from logits (before the softmax), in float64.

    Raises:
      ValueError: fewer samples than splits, or logits that are NaN or +infinity.
    """
    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits={splits} of {len(logits)} samples: give 1 to {len(logits)}")
    logits = np.asarray(logits, np.float64)
    if np.isnan(logits).any() or np.isposinf(logits).any():
        raise ValueError("logits holds NaN or infinity: look for NaN among the images")
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    shuffled = log_p[np.random.default_rng(seed).permutation(len(log_p))]
    scores = [score(part) for part in np.array_split(shuffled, splits)]
    value = float(np.mean(scores))
    interval = bootstrap(
        lambda rows: score(log_p[rows]),
        len(log_p),
        replicates=replicates,
        confidence=confidence,
        seed=seed,
    )
    low, high = (value + bound - interval.value for bound in (interval.low, interval.high))
    return InceptionScore(value, float(np.std(scores)), low, high, splits)
