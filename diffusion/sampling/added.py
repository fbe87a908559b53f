"""What a pipeline gets besides its own networks: low-rank updates, learned words, ControlNets."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion import interop
from diffusion.models import lora
from diffusion.models.unet import UNet
from diffusion.sampling.pipeline import Pipeline
from diffusion.training.denoiser import control_name
from diffusion.training.sized_text import PooledText

PAIR = {"text_encoder": "first", "text_encoder_2": "second"}  # in a `TextPair`'s parameters


def with_lora(pipeline: Pipeline, path: str, scale: float = 1.0) -> Pipeline:
    """With `scale` times the updates of a file in Diffusers' format."""
    params = {"unet" if k == "denoiser" else k: v for k, v in pipeline.params.items()}
    two = isinstance(pipeline.task.conditions.get("text"), PooledText)
    if two:
        params |= {name: pipeline.params["text_encoder"][part] for name, part in PAIR.items()}
    for name, tree in interop.load_lora(path, params, pipeline.task.network).items():
        params[name] = lora.merge(params[name], tree, scale)
    if two:
        own = {part: params.pop(name) for name, part in PAIR.items()}
        params["text_encoder"] = {**pipeline.params["text_encoder"], **own}
    params["denoiser"] = params.pop("unet")
    return dataclasses.replace(pipeline, params=params)


def with_embeddings(pipeline: Pipeline, words: Mapping[str, np.ndarray]) -> Pipeline:
    """With learned words, (vectors, width) each; of two text encoders, both widths beside each
    other. ValueError where they are of another encoder, or tokens already.
    """
    text: Any = pipeline.task.conditions.get("text")
    if pipeline.tokenizer is None or text is None:
        raise ValueError("the model reads no captions, so that no word can be learned for it")
    tokenizer: Any = pipeline.tokenizer.with_words({word: len(v) for word, v in words.items()})
    encoder, params = text.encoder, pipeline.params["text_encoder"]
    two = isinstance(text, PooledText)
    if two and encoder.third is not None:
        raise ValueError(
            "a word is not learned for three text encoders: use a pipeline of one or two"
        )
    trees = [params[part] for part in PAIR.values()] if two else [params]
    tables = [np.asarray(tree["token_embedding"]["embedding"]) for tree in trees]
    widths = [table.shape[1] for table in tables]
    for word, vectors in words.items():
        if vectors.shape[1] != sum(widths):
            raise ValueError(
                f"the word {word!r} has vectors of {vectors.shape[1]}, but the text encoder's are "
                f"of {' + '.join(map(str, widths))}: it was learned for another one"
            )
    rows = max(*(len(table) for table in tables), tokenizer.vocabulary_size)
    grown = []
    for i, (tree, table) in enumerate(zip(trees, tables)):
        part = tokenizer.parts[i] if two else tokenizer
        table = np.concatenate([table, np.zeros((rows - len(table), widths[i]), table.dtype)])
        for word, vectors in words.items():
            first = part.backend.token_to_id(word)
            table[first : first + len(vectors)] = np.split(vectors, np.cumsum(widths)[:-1], 1)[i]
        grown.append({**tree, "token_embedding": {"embedding": table}})
    if two:
        params = {**params, **dict(zip(PAIR.values(), grown))}
        halves = (encoder.first, encoder.second)
        first, second = (half.clone(vocab_size=rows) for half in halves)
        encoder = encoder.clone(first=first, second=second)
    else:
        params, encoder = grown[0], encoder.clone(vocab_size=rows)
    told = {**pipeline.task.conditions, "text": dataclasses.replace(text, encoder=encoder)}
    task = dataclasses.replace(pipeline.task, conditions=told)
    params = {**pipeline.params, "text_encoder": params}
    return dataclasses.replace(pipeline, task=task, tokenizer=tokenizer, params=params)


def with_controlnet(pipeline: Pipeline, network: Any, params: Any) -> Pipeline:
    """Steered by one ControlNet more. ValueError for one of another U-Net."""
    ours = pipeline.task.network
    if type(ours) is not UNet:
        kind = type(ours).__name__
        raise ValueError(f"the ControlNet steers a U-Net, but the denoiser is a {kind}")
    for key in ("channels", "multipliers", "blocks", "vector"):
        own, theirs = (n.per_level(getattr(n, key)) for n in (ours, network))
        if own != theirs:
            raise ValueError(
                f"the ControlNet has {key}={theirs}, but the U-Net has {own}: it steers another "
                "U-Net"
            )
    nets = pipeline.task.controlnets
    task = dataclasses.replace(pipeline.task, controlnets=(*nets, network))
    params = {**pipeline.params, control_name(len(nets)): params}
    return dataclasses.replace(pipeline, task=task, params=params)
