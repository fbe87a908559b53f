"""The captions of a data set: a tokenizer for them, and how many are too long for it."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from diffusion.data import loader, tokenizer_files, tokenizers
from diffusion.data.tokenizers import Tokenizer


def make_tokenizer(kind: str, source: Any, steps: list) -> Tokenizer:
    """Trained on the captions of the first epoch ("word", "bpe"), or read from a directory."""
    if kind not in ("word", "bpe"):
        return tokenizer_files.load(kind)
    return tokenizers.train({text for texts in _captions(source, steps) for text in texts}, kind)


def count_cut(source: Any, steps: list, tokenizer: Tokenizer, length: int) -> int:
    """Says how many captions of the first epoch are longer than the text encoder reads."""
    cut = total = 0
    for texts in _captions(source, steps):
        cut += int(tokenizer.encode_and_mark(texts, length)[1].sum())
        total += len(texts)
    if cut:
        print(f"note: {cut} of {total} captions are cut to {length} tokens", flush=True)
    return cut


def _captions(source: Any, steps: list) -> Iterator[list[str]]:
    known = getattr(source, "captions", None)
    if known is not None:
        yield list(known)
        return
    for batch in loader.one_pass(source, 500, steps):
        if "caption" not in batch:
            raise ValueError("model.text_encoder reads captions, but the data of data.dir has none")
        yield [batch["caption"][i] for i in np.flatnonzero(batch["valid"])]
