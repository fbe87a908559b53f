"""What no setting of a config may exceed: numbers that would fill a machine or never end.

A number that is infinite or not one, a network a thousand layers deep, a batch of a billion: each
is refused by its key before anything is opened or allocated. The bounds are far above any use.
"""

import math
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from experiments.host import cli

DEPTHS = ("blocks", "layers", "transformer_depth")  # each is a loop while the step is traced
MOST_DEEP, MOST_LEVELS = 128, 16
MOST_WIDE = 2**17  # channels, codes, words, ... of a network
MOST = {
    "train.batch_size": 2**20,
    "train.accumulate": 2**20,
    "evaluation.batch_size": 2**20,
    "sample.batch_size": 2**20,
    "sample.steps": 2**17,
    "process.schedule.num_steps": 2**20,
    "data.image_size": 2**14,  # a side; a series may be as long
    "data.channels": 2**10,
    "data.examples": 2**24,
    "online.": 2**17,
    "model.": MOST_WIDE,
}


def check(config: ConfigDict) -> None:
    """ValueError naming the first key whose value is beyond what any run needs."""
    for key, value in cli.flat(config).items():
        if (
            isinstance(value, list | tuple)
            and len(value) > MOST_LEVELS
            and key.startswith("model.")
        ):
            raise ValueError(f"{key} has {len(value)} entries: give at most {MOST_LEVELS}")
        for number in _numbers(value):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{key}={value} must be finite: give a number")
            most = _most(key)
            if abs(number) > most:
                raise ValueError(f"{key}={value} is over {most}: give less")


def _most(key: str) -> float:
    if key.startswith("model.") and key.rsplit(".", 1)[-1] in DEPTHS:
        return MOST_DEEP
    return next((most for name, most in MOST.items() if key.startswith(name)), 2**62)


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value
