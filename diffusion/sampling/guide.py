"""Autoguidance: a model led away from a worse one (https://arxiv.org/abs/2406.02507).

Where classifier-free guidance compares a model with itself told nothing, this compares it with a
smaller or less trained one told the same, whose errors are those of the model, larger (eq. 3):

    (1)  x_0 = x_0^worse + w (x_0 - x_0^worse)
"""

import dataclasses
from typing import Any

import numpy as np

from diffusion.sampling.pipeline import Pipeline


def guided(model: Pipeline, worse: Pipeline) -> Pipeline:
    """`model` by eq. 1, w its `guidance_scale`. Networks and predictions may differ.

    ValueError where the two do not diffuse the same, or are not told in the same words.
    """
    ours, theirs = _alike(model), _alike(worse)
    for name, mine in ours.items():
        if repr(mine) != repr(theirs[name]):
            raise ValueError(
                f"its {name} is {theirs[name]}, but the model's {mine}: name one that agrees"
            )
    how = dataclasses.replace(worse.how, clip=False, dynamic_threshold=0.0, guidance_scale=1.0)
    guide = dataclasses.replace(worse, how=how, params={})
    return dataclasses.replace(model, guide=guide, params={**model.params, "guide": worse.params})


def _alike(model: Pipeline) -> dict[str, Any]:
    conditions: Any = model.task.conditions
    text, label = (conditions.get(name) for name in ("text", "label"))
    schedule = model.how.schedule
    times = np.linspace(*schedule.time_range, 5)
    times = times if schedule.num_steps is None else times.astype(int)
    return {
        "shape": model.task.sample_shape,
        "schedule": np.stack([schedule.alpha(times), schedule.sigma(times)]),
        "scale of latents": [
            np.asarray(model.extra.get(k)) for k in ("latent_shift", "latent_scale")
        ],
        "tokenizer": model.tokenizer and model.tokenizer.sha256,
        "length of captions": text and len(text.null_tokens),
        "null class": label and label.null_label,
        "columns": model.reads,
    }
