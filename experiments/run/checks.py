"""What no setting of a config may exceed: numbers that would fill a machine or never end.

A number that is infinite or not one, a network a thousand layers deep, a batch of a billion: each
is refused by its key before anything is opened or allocated. The bounds are far above any use.
"""

import math
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from diffusion.metrics.directions import has_best
from experiments.host import cli
from experiments.run import build, data

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
    """ValueError naming the first key whose value no run can have."""
    _check_bounds(config)
    _check_counts(config)
    _check_data(config)


def _check_bounds(config: ConfigDict) -> None:
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


def _check_counts(config: ConfigDict) -> None:
    at_least_one = ("steps", "batch_size", "accumulate", "log_every_steps", "save_every_steps")
    for section, keys, least in (
        ("train", (*at_least_one, "keep_checkpoints"), 1),
        ("train", ("keep_every_steps",), 0),
        ("evaluation", ("batch_size",), 1),
        ("evaluation", ("every_steps", "examples", "preview"), 0),
    ):
        for key in keys:
            if config[section][key] < least:
                raise ValueError(f"{section}.{key}={config[section][key]} must be at least {least}")
    profiled = tuple(config.train.profile_steps)
    if profiled and not (len(profiled) == 2 and 1 <= profiled[0] <= profiled[1]):
        raise ValueError(
            f"train.profile_steps={profiled} must be the first and the last step of a trace, such "
            "as (10, 13), or (): give two numbers, from 1"
        )
    spikes = config.train.max_loss_deviations
    if spikes and config.task == "autoencoder" and config.loss.adversarial:
        raise ValueError(
            f"train.max_loss_deviations={spikes} takes the discriminator's start, a leap that "
            "lasts, for a spike: set it to 0"
        )
    if config.train.keep_best and not config.evaluation.every_steps:
        raise ValueError(
            f"train.keep_best={config.train.keep_best!r} needs evaluations: set "
            "evaluation.every_steps, best to train.save_every_steps"
        )
    if not has_best(config.train.keep_best):
        raise ValueError(
            f"train.keep_best={config.train.keep_best!r} is best near the data's own, neither "
            "highest nor lowest: name another number, such as eval_loss"
        )


def _check_data(config: ConfigDict) -> None:
    name = data.images_config(config).data.name
    row = data.known(name)
    if build.reads_captions(config) and row.captions is False:
        raise ValueError(
            f"model.text_encoder reads captions, but {name!r} has none: use data that has some"
        )
    if config.task == "classifier" and row.labels is False:
        raise ValueError(f"task='classifier' reads labels, but {name!r} has none: use other data")
