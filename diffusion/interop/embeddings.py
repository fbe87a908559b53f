"""Learned words: files of textual inversion (https://arxiv.org/abs/2208.01618).

A word stands for one or more vectors in the place of a row of the text encoder's table:

    Diffusers              {word: (width,) or (vectors, width)}: learned_embeds.bin or .safetensors
    AUTOMATIC1111, .pt     "name", and string_to_param: {"*": (vectors, width)}
    .safetensors           emb_params: (vectors, width), the word being the file's name; of Stable
                           Diffusion XL clip_l and clip_g, here beside each other

In a tokenizer the further vectors of a word are word_1, word_2, ..., as Diffusers has them.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from diffusion.files import write_tensors
from diffusion.interop import pickled
from diffusion.interop.weight_files import read_tensors

SHARED, PAIR = "emb_params", ("clip_l", "clip_g")
FILE = "learned_embeds.safetensors"


def load_embeddings(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """(vectors, width) float32 by word. ValueError naming the file where it is no such file."""
    path, texts = Path(path), {}
    if path.suffix == ".safetensors":
        tensors = read_tensors(path)
    else:
        tensors = pickled.read(path, ("string_to_param",), texts)
    if set(tensors) == set(PAIR):  # of Stable Diffusion XL, whose word is the file's name
        parts = [np.atleast_2d(tensors[name]) for name in PAIR]
        if len({len(part) for part in parts}) > 1:
            raise ValueError(
                f"{path}: {' and '.join(PAIR)} have not as many vectors: fetch it again"
            )
        tensors = {path.stem: np.concatenate(parts, axis=1)}
    elif len(tensors) == 1 and set(tensors) < set(PAIR):
        raise ValueError(f"{path} holds {min(tensors)} alone of {' and '.join(PAIR)}: give both")
    if set(tensors) in ({SHARED}, {"*"}):
        (vectors,) = tensors.values()
        tensors = {texts.get("name") or path.stem: vectors}
    found = {word: np.atleast_2d(np.asarray(v, np.float32)) for word, v in tensors.items()}
    for word, vectors in found.items():
        if vectors.ndim != 2 or not vectors.size or not word.strip():
            raise ValueError(
                f"{path} holds {word!r} of shape {tuple(np.shape(tensors[word]))}, which is no "
                "learned word's (width,) or (vectors, width): give a file of textual inversion"
            )
        if not np.isfinite(vectors).all():
            raise ValueError(f"{path}: the vectors of {word!r} are not finite: fetch it again")
    return found


def save_embeddings(path: str | os.PathLike, words: Mapping[str, np.ndarray]) -> None:
    """A file that Diffusers' `load_textual_inversion` and AUTOMATIC1111's UI read, of one word."""
    tensors = {word: np.asarray(vectors, np.float32) for word, vectors in words.items()}
    write_tensors(Path(path), tensors, format="pt")
