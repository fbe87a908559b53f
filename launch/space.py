"""The algebra of sweeps: pure, on lists of trials.

A trial is a dict of what it changes, dotted key to value; a space is a list of trials, in order.
With values(k, v...) the space of one key,

    product(a, b) = [x | y for x in a for y in b]     associative, product() = [{}] its unit    (1)
    chain(a, b)   = a + b                             associative, chain() = [] its unit        (2)
    zip(a, b)     = [x | y for x, y in pairs]         of equal lengths                          (3)

and product distributes over chain from the right: product(chain(a, b), c) = chain(product(a, c),
product(b, c)). No trial may set one key twice: x | y would forget one of its values.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

Trial = dict[str, Any]
Space = list[Trial]

LONGEST_NAME = 120  # characters; file systems stop at 255


def values(key: str, *of: Any) -> Space:
    """One trial for each value of a key."""
    return [{key: value} for value in of]


def _join(parts: Iterable[Trial]) -> Trial:
    joined: Trial = {}
    for part in parts:
        if twice := sorted(joined.keys() & part.keys()):
            raise ValueError(f"sweep: a trial sets {twice[0]} twice: keep it in one of its factors")
        joined |= part
    return joined


def product(*spaces: Space) -> Space:
    """Every combination, the last space varying fastest (1)."""
    return [_join(parts) for parts in itertools.product(*spaces)]


def chain(*spaces: Space) -> Space:
    """One after the other (2)."""
    return [dict(trial) for space in spaces for trial in space]


def zipped(*spaces: Space) -> Space:
    """The first of each together, the second of each, ... (3)."""
    if len({len(space) for space in spaces}) > 1:
        lengths = ", ".join(str(len(space)) for space in spaces)
        raise ValueError(f"sweep: zip joins spaces of {lengths} trials: make them equally long")
    return [_join(parts) for parts in zip(*spaces)]


class Add:
    """What a config's `sweep(add)` is given: `add(space)` adds trials, `add.product` makes them.

    def sweep(add):
        rates = add.values("optim.learning_rate", 1e-4, 2e-4)
        add(add.product(rates, add.values("seed", 0, 1, 2)))  # does the gain survive seeds?
    """

    values = staticmethod(values)
    product = staticmethod(product)
    chain = staticmethod(chain)
    zip = staticmethod(zipped)

    def __init__(self) -> None:
        self.trials: Space = []

    def __call__(self, space: Space | Trial) -> None:
        self.trials += [dict(trial) for trial in ([space] if isinstance(space, dict) else space)]


def names(trials: Sequence[Trial]) -> list[str]:
    """A folder's name for each trial, by what differs among them; no two alike.

    Keys appear by their last word, or as much of their path as tells them apart.

    Raises ValueError for two trials that are the same.
    """
    keys = list(dict.fromkeys(key for trial in trials for key in trial))
    first = trials[0] if trials else {}
    differing = [k for k in keys if any(_absent(t, k) != _absent(first, k) for t in trials)]
    short = {key: _short(key, keys) for key in keys}
    found: dict[str, Trial] = {}
    for trial in trials:
        parts = [f"{short[k]}={_text(trial[k])}" for k in differing if k in trial]
        name = ",".join(parts) or "base"
        if len(name) > LONGEST_NAME:
            name = name[:LONGEST_NAME] + "-" + _digest(trial)
        if name in found and _digest(found[name]) == _digest(trial):
            raise ValueError(f"sweep: two trials are the same, {trial}: leave one out")
        if name in found:  # values that differ in characters that a file's name cannot have
            name = f"{name}-{_digest(trial)}"
        found[name] = trial
    return list(found)


def _absent(trial: Trial, key: str) -> str:
    return repr(trial[key]) if key in trial else ""


def _digest(trial: Trial) -> str:
    text = repr(sorted((key, repr(value)) for key, value in trial.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _short(key: str, keys: Sequence[str]) -> str:
    words = key.split(".")
    for count in range(1, len(words)):
        tail = ".".join(words[-count:])
        if not any(other != key and f".{other}".endswith(f".{tail}") for other in keys):
            return tail
    return key


def _text(value: Any) -> str:
    """As a part of a file's name."""
    text = "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-") or "empty"
