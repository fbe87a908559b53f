"""Counter-based random numbers: a draw is a function of its key, and of nothing else.

A batch assembled by many threads on many hosts must not depend on who drew first, so nothing here
has a state. The bits of a key (k_1, ..., k_m) are

    h_0 = c,    h_i = mix(h_{i-1} + g (k_i + 1)),    bits = h_m                              (1)

with `mix` the finaliser of SplitMix64 and g its odd constant (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014, https://doi.org/10.1145/2660193.2660195).
It is written in whole-array integer arithmetic, so that it is fast in batches and stays the same
under every release of NumPy (whose own generators promise no such thing).
"""

import dataclasses
import functools
from typing import Any

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def bits(*key: int | np.ndarray) -> np.ndarray:
    """64 random bits for each element of the broadcast integer `key`: uint64, eq. 1."""
    h = np.zeros(1, np.uint64)
    for k in key:
        # Negative integers wrap round; the sum wraps as well, which is what is wanted.
        word = np.atleast_1d(k).astype(np.int64).astype(np.uint64)
        h = _mix(h + GOLDEN * (word + np.uint64(1)))
    return h


def below(high: int | np.ndarray, *key: int | np.ndarray) -> np.ndarray:
    """Integers drawn uniformly from 0 .. high - 1 for each element of `key`: int64.

    `high` (a scalar or an array, under 2**31) scales the upper 32 bits (Lemire's multiply and
    shift, https://arxiv.org/abs/1805.10941, without its rejection: the bias is under high / 2**32).
    """
    upper = bits(*key) >> np.uint64(32)
    return ((upper * np.asarray(high).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


@functools.lru_cache(maxsize=4)
def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which `epoch` visits 0 .. length - 1: int64 (length,), read-only, cached."""
    order = np.argsort(bits(seed, epoch, np.arange(length)), kind="stable")
    order.flags.writeable = False
    return order


@dataclasses.dataclass
class Draws:
    """What is drawn for one example, one after another: each draw has a key of its own."""

    key: tuple[int, ...]
    count: int = 0

    def uniform(self, low: float | int = 0, high: float | int = 1, shape: Any = ()) -> Any:
        """In [low, high): a number, or float64 of `shape`."""
        size = int(np.prod(shape))
        drawn = bits(*self.key, self.count + np.arange(size)) >> np.uint64(11)
        self.count += size
        values = low + (high - low) * drawn * 2.0**-53
        return values.reshape(shape) if shape else float(values[0])

    def below(self, high: int) -> int:
        """A whole number of 0 .. high - 1."""
        return int(self.uniform(0, high))

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        """Unit normal, by Box and Muller's transform."""
        radius = np.sqrt(-2 * np.log1p(-self.uniform(shape=shape)))
        return radius * np.cos(2 * np.pi * self.uniform(shape=shape))

    def order(self, length: int) -> list[int]:
        """0 .. length - 1 in any order."""
        return np.argsort(self.uniform(shape=(length,))).tolist()
