"""Learned words (textual inversion, https://arxiv.org/abs/2208.01618) in a model of captions."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion.sampling.pipeline import Pipeline


def with_embeddings(model: Pipeline, words: Mapping[str, np.ndarray]) -> Pipeline:
    """With learned words, (vectors, width) each. ValueError where they are of another encoder, or
    tokens already."""
    text: Any = model.task.conditions.get("text")
    if model.tokenizer is None or text is None:
        raise ValueError("the model reads no captions, so that no word can be learned for it")
    table = np.asarray(model.params["text_encoder"]["token_embedding"]["embedding"])
    tokenizer = model.tokenizer.with_words({word: len(v) for word, v in words.items()})
    rows = max(len(table), tokenizer.vocabulary_size)
    table = np.concatenate([table, np.zeros((rows - len(table), table.shape[1]), table.dtype)])
    for word, vectors in words.items():
        if vectors.shape[1] != table.shape[1]:
            raise ValueError(
                f"the word {word!r} has vectors of {vectors.shape[1]}, but the text encoder's "
                f"are of {table.shape[1]}: it was learned for another one"
            )
        first: Any = tokenizer.backend.token_to_id(word)
        table[first : first + len(vectors)] = vectors
    encoder = {**model.params["text_encoder"], "token_embedding": {"embedding": table}}
    grown = dataclasses.replace(text, encoder=text.encoder.clone(vocab_size=rows))
    task = dataclasses.replace(model.task, conditions={**model.task.conditions, "text": grown})
    params = {**model.params, "text_encoder": encoder}
    return dataclasses.replace(model, task=task, tokenizer=tokenizer, params=params)
