"""Text to integers: word-level and byte-pair tokenizers, trained on captions or read from a file.

All of them are `tokenizers.Tokenizer` inside (one `tokenizer.json` holds the whole of one), so what
this module adds is arrays of fixed length, a null caption, and an account of what did not fit: a
caption that is too long is counted, and a word that is not in the vocabulary is named.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from diffusion import files

# The captions of a batch are few: a thread pool over them costs more than it saves, on the cores
# that compute, and it makes every later fork of the process print a warning.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PAIR = '{"first": '  # how a pair begins, serialised
PAD, UNKNOWN, START, END = SPECIAL = ("[PAD]", "[UNK]", "[START]", "[END]")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Captions to token ids.

    Attributes:
      serialised: the tokenizer as JSON, which identifies it.
      pad_id: fills captions up to the length asked for.
    """

    serialised: str = dataclasses.field(repr=False)
    pad_id: int = 0

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "Tokenizer":
        """Reads a `tokenizer.json`, or the one in a directory.

        Raises:
          ValueError: there is none, or it is not one.
        """
        path = pathlib.Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"tokenizer {path} does not exist")
        return cls.of(path.read_text(encoding="utf-8"), str(path))

    @classmethod
    def of(cls, serialised: str, name: str = "tokenizer") -> "Tokenizer":
        if serialised.startswith(PAIR):
            return TokenizerPair(serialised)
        try:
            backend = tokenizers.Tokenizer.from_str(serialised)
        except Exception as error:  # the package raises plain Exception
            raise ValueError(f"{name} is not a tokenizer.json: {error}") from error
        if backend.padding is not None:
            return cls(serialised, backend.padding["pad_id"])
        pad = backend.token_to_id(PAD)
        return cls(serialised, 0 if pad is None else pad)

    def save(self, path: str | pathlib.Path) -> None:
        files.write(path, self.serialised)

    @functools.cached_property
    def backend(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self.serialised)

    @functools.cached_property
    def _of_length(self) -> dict[int, tokenizers.Tokenizer]:
        return {}

    def _fixed(self, length: int) -> tokenizers.Tokenizer:
        # Length is state of the backend: each length has a backend of its own, never changed again,
        # so that threads may share it.
        if length not in self._of_length:
            special = self.backend.num_special_tokens_to_add(is_pair=False)
            if length < special + 1:
                raise ValueError(
                    f"length={length} leaves no room beside {special} special tokens: raise it"
                )
            backend = tokenizers.Tokenizer.from_str(self.serialised)
            backend.enable_truncation(length)
            pad = self.backend.id_to_token(self.pad_id) or PAD
            backend.enable_padding(length=length, pad_id=self.pad_id, pad_token=pad)
            self._of_length[length] = backend
        return self._of_length[length]

    @property
    def vocabulary_size(self) -> int:
        return self.backend.get_vocab_size()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.serialised.encode()).hexdigest()

    def encode(self, captions: Sequence[str], length: int) -> np.ndarray:
        """Token ids, cut or padded: int32 (captions, length). "" is the null caption."""
        return self.encode_and_mark(captions, length)[0]

    def encode_and_mark(
        self, captions: Sequence[str], length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """`encode`, and which captions were too long and were cut: bool (captions,)."""
        encoded = self._fixed(length).encode_batch([self._spelled(text) for text in captions])
        tokens = np.array([one.ids for one in encoded], np.int32).reshape(-1, length)
        return tokens, np.array([bool(one.overflowing) for one in encoded], bool)

    def with_words(self, words: Mapping[str, int]) -> "Tokenizer":
        """With learned words, of so many vectors each: w, w_1, w_2, ... get the next ids.

        ValueError for a word that is a token already.
        """
        backend = tokenizers.Tokenizer.from_str(self.serialised)
        for word, vectors in words.items():
            for name in (word, *(f"{word}_{i}" for i in range(1, vectors))):
                if backend.token_to_id(name) is not None:
                    raise ValueError(f"the word {name!r} is a token already: rename it")
                backend.add_tokens([tokenizers.AddedToken(name, normalized=True)])
        return dataclasses.replace(self, serialised=backend.to_str())

    @functools.cached_property
    def _words(self) -> dict[str, str]:
        """Learned words of several vectors, and what a caption has in their place."""
        added = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        more = {
            word: list(itertools.takewhile(added.__contains__, (f"{word}_{i}" for i in count(1))))
            for word in added
        }
        return {word: " ".join((word, *rest)) for word, rest in more.items() if rest}

    def _spelled(self, caption: str) -> str:
        """With all of a learned word's vectors written out, as Diffusers' pipelines do."""
        if not self._words:
            return caption
        words = "|".join(map(re.escape, sorted(self._words, key=len, reverse=True)))
        return re.sub(rf"({words})(?!_\d)", lambda match: self._words[match[0]], caption)

    def null(self, length: int) -> np.ndarray:
        """The caption that says nothing, for classifier-free guidance: int32 (length,)."""
        return self.encode([""], length)[0]

    def decode(self, tokens: np.ndarray) -> list[str]:
        """Text of token ids (captions, length), without special tokens."""
        return self.backend.decode_batch(np.asarray(tokens).tolist(), skip_special_tokens=True)

    def unknown(self, captions: Iterable[str]) -> list[str]:
        """Words that the vocabulary lacks, each read as [UNK]: sorted, each once."""
        unknown_id = self.backend.token_to_id(UNKNOWN)
        words = set()
        for text in captions:
            one = self.backend.encode(text)
            spans = (span for i, span in zip(one.ids, one.offsets) if i == unknown_id)
            words.update(text[start:stop] for start, stop in spans)
        return sorted(words)


NAMES = ("first", "second", "third")


@dataclasses.dataclass(frozen=True)
class TokenizerPair(Tokenizer):
    """Two tokenizers of one caption, or three: `length` tokens are the third's `third_length`, and
    of the others half the first's, then the second's, with the third's after them."""

    @classmethod
    def join(cls, *parts: Tokenizer, third_length: int = 0) -> "TokenizerPair":
        named = ", ".join(f'"{name}": {part.serialised}' for name, part in zip(NAMES, parts))
        more = f', "third_length": {third_length}' if third_length else ""
        return cls(f"{{{named}{more}}}")

    @functools.cached_property
    def _whole(self) -> dict[str, Any]:
        return json.loads(self.serialised)

    @functools.cached_property
    def parts(self) -> tuple[Tokenizer, ...]:
        named = (self._whole[name] for name in NAMES if name in self._whole)
        return tuple(Tokenizer.of(json.dumps(part)) for part in named)

    @property
    def third_length(self) -> int:
        return self._whole.get("third_length", 0)

    @functools.cached_property
    def backend(self) -> tokenizers.Tokenizer:
        return self.parts[0].backend

    @property
    def vocabulary_size(self) -> int:
        return max(part.vocabulary_size for part in self.parts)

    def encode_and_mark(
        self, captions: Sequence[str], length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        half = (length - self.third_length) // 2
        lengths = (half, half, self.third_length)
        both = [part.encode_and_mark(captions, n) for part, n in zip(self.parts, lengths)]
        tokens, cut = zip(*both)
        return np.concatenate(tokens, axis=1), np.any(cut, axis=0)

    def with_words(self, words: Mapping[str, int]) -> "TokenizerPair":
        grown = (part.with_words(words) for part in self.parts)
        return self.join(*grown, third_length=self.third_length)

    def decode(self, tokens: np.ndarray) -> list[str]:
        half = (np.shape(tokens)[1] - self.third_length) // 2
        return self.parts[0].decode(np.asarray(tokens)[:, :half])


def train(captions: Iterable[str], kind: str = "word", vocabulary_size: int = 8192) -> Tokenizer:
    """A tokenizer of the words ("word") or the byte pairs ("bpe") of `captions`.

    Ids 0 to 3 are padding, unknown, start and end; the same captions in any order give the same
    tokenizer.

    Raises:
      ValueError: an unknown kind, or no captions.
    """
    texts = list(captions)
    if not texts:
        raise ValueError("a tokenizer cannot be trained on 0 captions: give some")
    if kind == "word":
        backend = tokenizers.Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(
            vocab_size=vocabulary_size, special_tokens=list(SPECIAL), show_progress=False
        )
    elif kind == "bpe":
        backend = tokenizers.Tokenizer(models.BPE(unk_token=UNKNOWN))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        raise ValueError(f"tokenizer kind {kind!r} is unknown: use 'word' or 'bpe'")
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(token, SPECIAL.index(token)) for token in (START, END)],
    )
    return Tokenizer.of(backend.to_str())
