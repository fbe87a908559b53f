"""Textual inversion (https://arxiv.org/abs/2208.01618, section 3.2): a new word for a text encoder.

The word is one or more new rows at the end of the encoder's table of tokens, and they alone are
trained: the loss and all the rest stay as they are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Words:
    """word: as captions have it. start: a word of one token, whose row the new ones begin from.
    vectors: rows of the word."""

    word: str
    start: str
    vectors: int = 1

    def __post_init__(self) -> None:
        if self.vectors < 1 or not self.word.strip():
            raise ValueError(
                f"vectors={self.vectors} of the word {self.word!r} must be at least 1, and the "
                "word not blank: give both"
            )

    def split(self, encoder: Mapping[str, Any]) -> Tree:
        """ "words", the word's rows, and "text_encoder", the rest of an encoder that has both."""
        table = encoder["token_embedding"]["embedding"]
        own = {**encoder, "token_embedding": {"embedding": table[: -self.vectors]}}
        return {"words": {"embedding": table[-self.vectors :]}, "text_encoder": own}

    def merged(self, params: Mapping[str, Any]) -> Tree:
        """`split`'s inverse among the parameters of all networks; nothing where it is done."""
        rest = {name: tree for name, tree in params.items() if name != "words"}
        if "words" not in params:
            return rest
        encoder, new = params["text_encoder"], params["words"]["embedding"]
        table = jnp.concatenate([encoder["token_embedding"]["embedding"], new])
        return {**rest, "text_encoder": {**encoder, "token_embedding": {"embedding": table}}}
