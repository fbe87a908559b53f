"""Sizes that fit the data, the device and the minutes: the choices that config.py holds.

What is measured decides: both steps are compiled and timed for some seconds on made-up batches, and
the number of steps is what the time that is left allows, at most `MOST_EPOCHS` over the pictures.
"""

import collections
import json
import math
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import common_folder
from diffusion import files, wording
from diffusion.data import tokenizers
from experiments.plan import cost
from experiments.quickstart import matcher
from experiments.quickstart.look import Found
from experiments.run import assemble

LATENTS_FROM = 48  # pixels a side; below it pixels are diffused
MOST_EPOCHS = 400
FIRST_STAGE_SHARE = 0.3  # of the training time
EVALUATION_SECS = 15  # of all in it but sampling and the matcher's training
FEWEST_STEPS = 50
WORDS = 8192 - 4  # of a vocabulary beside its special tokens

Choices = dict[str, Any]
Get = Callable[[str], ConfigDict]

CONFIG = '''"""What experiments.quickstart chose for {images}; yours to keep and to edit.

{why}

The stages by hand, in turn:
{commands}

What is trained stays as it is. Edited, it is made anew where its folder is deleted ({stages}, and
what comes after it) and the command that made this file is run again.
"""

from configs import common_folder

CHOSEN = {chosen}


def get_config(arg=None):
    config = common_folder.get_config(arg, **CHOSEN)
    if config.task == "denoiser":
        # any other key, such as config.sample.guidance_scale = 5.0 (which `sample` follows once
        # this was run again; or at once by its flag --guidance_scale=5)
        pass
    return config
'''


def sizes(found: Found, root: pathlib.Path, seed: int) -> tuple[Choices, list[str]]:
    """Everything but the numbers of steps, and why, in sentences."""
    large = jax.devices()[0].platform != "cpu"
    side = image_size(found, large)
    latents = side >= LATENTS_FROM
    text, said = text_of(found)
    classes = len({row["label"] for row in found.rows["train"] if "label" in row})
    batch = min(64 if large else 16, 2 ** int(math.log2(len(found.rows["train"]))))
    batch *= len(jax.devices())
    chosen = {
        "root": str(root),
        "image_size": side,
        "seed": seed,
        "first_stage": _first_stage(large, batch) if latents else None,
        "denoiser": _denoiser(found, large, latents, batch, text, classes),
        "text": text,
        "classes": classes,
    }
    device, middle = jax.devices()[0].device_kind, int(statistics.median(found.sides))
    limit = ", and this device has time for no more" if middle >= 2 * side else ""
    why = [
        f"{side} x {side} pixels: half of the pictures are {middle} or more{limit}",
        f"diffusion of {'latents, an eighth of the pixels a side' if latents else 'pixels'}",
        f"batches of {batch}, on {len(jax.devices())} x {device}",
        said,
    ]
    return chosen, why


def image_size(found: Found, large: bool) -> int:
    """The largest of some sizes that half of the pictures have."""
    middle = statistics.median(found.sides)
    allowed = (32, 64, 128, 256) if large else (32, 64)
    size = max((side for side in allowed if side <= middle), default=allowed[0])
    return 64 if size == 32 and middle >= LATENTS_FROM else size


def _first_stage(large: bool, batch: int) -> dict[str, Any]:
    network = {
        "name": "kl",
        "channels": 128,
        "multipliers": (1,),
        "blocks": 0,
        "mid_attention": False,
        "z_channels": 8,
        "patch": 8,
        "groups": 32,
    }
    if large:  # the same factor, with blocks at an eighth and at a quarter of the pixels
        network |= {"channels": 96, "multipliers": (1, 2), "blocks": 2, "patch": 4}
    return {"network": network, "batch_size": batch, "learning_rate": 1e-3 if large else 2e-3}


def _denoiser(
    found: Found, large: bool, latents: bool, batch: int, text: dict | None, classes: int
) -> dict[str, Any]:
    network: dict[str, Any] = {
        "kind": "unet",
        "out_channels": 8 if latents else 3,
        "channels": 128 if large else 32,
        "multipliers": (1, 2, 3) if large else (1, 3) if latents else (1, 2, 3),
        "blocks": 2 if large else 1,
        "heads": None,
        "head_dim": 32,
        "transformer_depth": 1 if text else 0,
        "pool_context": bool(text),
        "num_classes": classes + 1 if classes else None,  # and none of them
        "groups": 16,
        "epsilon": 1e-5,
        "scale_shift": True,
        "flip_sin_to_cos": True,
        "freq_shift": 0.0,
        "downsample_padding": 1,
        "dropout": 0.1 if len(found.rows["train"]) < 2000 else 0.0,  # few are learnt by heart
    }
    levels = len(network["multipliers"])
    network["attention"] = tuple(large and level > 0 for level in range(levels))
    rate = 2e-4 if large else 1e-3 if latents else 5e-4
    return {"network": network, "batch_size": batch, "learning_rate": rate}


def text_of(found: Found) -> tuple[dict[str, Any] | None, str]:
    """Tokenizer and text encoder for the captions, if any."""
    captions = [row["caption"] for row in found.rows["train"] if "caption" in row]
    if not captions:
        return None, "nothing to be told" if found.told == "nothing" else "classes as labels"
    words = collections.Counter(w for c in captions for w in re.findall(r"\w+|[^\w\s]+", c.lower()))
    repeated = sum(count for count in words.values() if count > 1) / max(sum(words.values()), 1)
    kind = "word" if len(words) <= WORDS and repeated > 0.9 else "bpe"
    tokenizer = tokenizers.train(set(captions), kind)
    lengths = sorted(len(one.ids) for one in tokenizer.backend.encode_batch(captions))
    longest = lengths[min(int(0.99 * len(lengths)), len(lengths) - 1)]
    width = 256 if jax.devices()[0].platform != "cpu" else 96
    network = {
        "vocab_size": -(-tokenizer.vocabulary_size // 64) * 64,
        "max_length": min(-(-longest // 8) * 8, 77),
        "width": width,
        "layers": 2 if width > 96 else 1,
        "heads": width // 32,
        "activation": "gelu",
        "causal": False,
    }
    what = "words" if kind == "word" else "byte pairs"
    said = f"{len(words):,} different words: captions by {what}, {network['max_length']} at most"
    return {"tokenizer": kind, "network": network}, said


# -- time ----------------------------------------------------------------------------------------


def with_steps(
    chosen: Choices, pictures: int, secs: float, spent_secs: float, samples: int
) -> tuple[Choices, list[str]]:
    """`chosen` with the steps that `secs`, of which some are spent, leave time for, at most
    `MOST_EPOCHS` over so many pictures; so many samples are made of them at the end.

    Raises ValueError where that is none.
    """
    started = time.monotonic()
    parts = [name for name in ("first_stage", "denoiser") if chosen[name]]
    chosen = {**chosen, **{name: {**chosen[name], "steps": 1000} for name in parts}}
    which = {"first_stage": "autoencoder", "denoiser": "ldm" if len(parts) > 1 else "pixel"}
    configs = {n: common_folder.get_config(which[n], **chosen).lock() for n in parts}
    found = {}
    for n, config in configs.items():
        print(f"compiling and timing a step: {which[n]}", flush=True)
        found[n] = time_step(config)
    judging = matcher.time_step(chosen["image_size"]) if chosen["text"] or chosen["classes"] else ()
    again = sum(compiling for compiling, _ in found.values())  # each is compiled for its run
    last = evaluation_secs(configs["denoiser"], found["denoiser"][1], samples, *judging)
    kept = last + 1.5 * again
    left = secs - spent_secs - (time.monotonic() - started) - kept
    shares = {"first_stage": FIRST_STAGE_SHARE if len(parts) > 1 else 0.0}
    shares["denoiser"] = 1 - shares["first_stage"]
    why = []
    for name in parts:
        step = 1.05 * found[name][1]  # and what lies between steps
        steps = int(shares[name] * left / step)
        if steps < FEWEST_STEPS:
            fewest = max(1.05 * FEWEST_STEPS * found[n][1] / shares[n] for n in parts)
            raise ValueError(
                f"--minutes={secs / 60:g} are too few: beside the trainings' steps about "
                f"{wording.duration(secs - left)} are needed here (looking, compiling, measuring, "
                f"evaluation), and {wording.duration(fewest)} for {FEWEST_STEPS} steps of each: "
                f"give --minutes={math.ceil((secs - left + fewest) / 60) + 1} or more, better "
                "several times as many"
            )
        most = -(-MOST_EPOCHS * pictures // chosen[name]["batch_size"])
        chosen[name]["steps"] = steps = max(min(steps, most), FEWEST_STEPS)
        why.append(
            f"{which[name]}: {steps:,} steps of {step * 1e3:.1f} ms, "
            f"about {wording.duration(steps * step)}"
        )
    why.append(f"evaluation: {samples} samples and their numbers, about {wording.duration(last)}")
    return chosen, why


def evaluation_secs(
    config: ConfigDict, step: float, samples: int, compiling: float = 0.0, judging: float = 0.0
) -> float:
    """What comes after training: sampling, the matcher's training (0: there is none), the rest.

    A training step, of `step` seconds, costs its batch about three passes of the network, and
    something more; guidance asks for two passes.
    """
    passes = config.sample.steps * (1 if config.sample.guidance_scale == 1 else 2)
    sampling = samples * passes * step / config.train.batch_size / 2.5
    return EVALUATION_SECS + sampling + compiling + matcher.STEPS * judging


def time_step(config: ConfigDict, secs: float = 3.0) -> tuple[float, float]:
    """(seconds to compile, seconds a step) of a config's training, on made-up batches."""
    task, placed = cost.shapes(config)[0], assemble.parallel(config)
    state = placed.init(task.init, jax.random.key(0))
    shapes = cost.abstract_batch(config, task, config.train.batch_size)
    batch = placed.rows({name: np.zeros(s.shape, s.dtype) for name, s in shapes.items()})
    step, started = placed.step(task.train_step), time.perf_counter()
    state, metrics = step(state, batch, {})
    jax.block_until_ready(metrics)
    compiled, each = time.perf_counter(), []
    while time.perf_counter() - compiled < secs or len(each) < 3:
        begun = time.perf_counter()
        state, metrics = step(state, batch, {})
        jax.block_until_ready(metrics)
        each.append(time.perf_counter() - begun)
    return compiled - started, statistics.median(each)


# -- the file ------------------------------------------------------------------------------------


def write(path: pathlib.Path, found: Found, chosen: Choices, why: Sequence[str]) -> None:
    """config.py, for people to read and for `--config`."""
    python, file = "python -m experiments", path
    stages = ("autoencoder", "ldm") if chosen["first_stage"] else ("pixel",)
    commands = []
    for stage in stages:
        if stage == "ldm":
            commands.append(f"{python}.encode_latents --config={file}:ldm")
        commands.append(f"{python}.train --config={file}:{stage} --workdir={path.parent}/{stage}")
    text = CONFIG.format(
        images=str(found.directory).replace("\\", "/").replace('"""', "'''"),
        why="\n".join(f"- {line}" for line in why),
        stages=", ".join((stages[0], "latents", "ldm") if len(stages) > 1 else stages),
        commands="\n".join(f"    {line}" for line in commands),
        chosen=_literal(chosen),
    )
    files.write(path, text)


def _literal(value: Any, indent: str = "") -> str:
    """A nested dict as Python, a key a line."""
    if not isinstance(value, dict):
        return repr(value)
    inner = indent + "    "
    rows = "".join(f"{inner}{json.dumps(k)}: {_literal(v, inner)},\n" for k, v in value.items())
    return f"{{\n{rows}{indent}}}"
