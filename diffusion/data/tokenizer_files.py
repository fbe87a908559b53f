"""The tokenizers of published text encoders, from the files of a model directory.

    vocab.json, merges.txt    CLIP's byte pairs (https://arxiv.org/abs/2103.00020, section 2.4):
                              Unicode NFC, white space joined, lower case; words, single digits and
                              runs of other signs; bytes, merged, a word's last ending in "</w>"
    vocab.txt                 BERT's word pieces (https://arxiv.org/abs/1810.04805): control
                              characters dropped, Chinese set apart, accents and case removed
    tokenizer.json            whatever it says

Special tokens and what BERT does to case stand in tokenizer_config.json or special_tokens_map.json;
without them they are CLIP's and BERT's own. A caption becomes start, pieces, end, cut to the length
with the end kept, and padded: Stable Diffusion 1.x pads with the end token, 2.x with "!" (id 0).
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from diffusion import files
from diffusion.data.tokenizers import Tokenizer

CLIP_SPECIAL = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
BERT_SPECIAL = {
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "unk_token": "[UNK]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
}
BERT_CASE = {"do_lower_case": True, "tokenize_chinese_chars": True, "strip_accents": None}
# CLIP's own pattern (openai/CLIP:clip/simple_tokenizer.py).
CLIP_PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def load(directory: str | pathlib.Path) -> Tokenizer:
    """The tokenizer of a model directory.

    Raises:
      ValueError: naming the file that is missing, broken, or lacks a special token.
    """
    directory = pathlib.Path(directory)
    settings = _settings(directory)
    if (directory / "vocab.json").is_file():
        return _finish(_clip(directory, settings), settings["pad_token"], directory / "vocab.json")
    if (directory / "vocab.txt").is_file():
        return _finish(_bert(directory, settings), settings["pad_token"], directory / "vocab.txt")
    if (directory / "tokenizer.json").is_file():
        known = Tokenizer.load(directory)
        if known.backend.padding is not None or not settings.get("pad_token"):
            return known
        path = directory / "tokenizer.json"
        return _finish(known.backend, settings["pad_token"], path)
    raise ValueError(
        f"{directory} holds no tokenizer: vocab.json with merges.txt, vocab.txt or tokenizer.json "
        "is needed"
    )


def save(tokenizer: Tokenizer, directory: pathlib.Path, length: int) -> None:
    """Writes the files that Transformers reads, CLIP's or BERT's, and tokenizer.json beside them.

    `length`: the tokens that the text encoder reads. Other tokenizers are written as
    tokenizer.json alone.
    """
    # Length and padding are the caller's choices, which Transformers keeps elsewhere.
    whole = json.loads(tokenizer.serialised) | {"padding": None, "truncation": None}
    model = whole["model"]
    pad = tokenizer.backend.id_to_token(tokenizer.pad_id)
    config: dict[str, Any] = {"model_max_length": length, "pad_token": pad}
    if model["type"] == "BPE" and model.get("end_of_word_suffix") == "</w>":
        merges = "".join(f"{' '.join(_pair(pair))}\n" for pair in model["merges"])
        files.write(directory / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
        files.write(directory / "merges.txt", "#version: 0.2\n" + merges)
        (end, _), (start, _) = (whole["post_processor"][key] for key in ("sep", "cls"))
        config |= {"tokenizer_class": "CLIPTokenizer", "bos_token": start, "eos_token": end}
        config["unk_token"] = model["unk_token"]
    elif model["type"] == "WordPiece":
        words = sorted(model["vocab"], key=model["vocab"].__getitem__)
        files.write(directory / "vocab.txt", "".join(f"{word}\n" for word in words))
        normalizer = whole["normalizer"]
        config |= {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": normalizer["lowercase"],
            "strip_accents": normalizer["strip_accents"],
            "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
        }
    else:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    files.write(directory / "tokenizer.json", json.dumps(whole, ensure_ascii=False))
    files.write_json(directory / "tokenizer_config.json", config)


def _pair(pair: str | list[str]) -> list[str]:
    return pair.split(" ") if isinstance(pair, str) else pair


def _settings(directory: pathlib.Path) -> dict[str, Any]:
    """Special tokens and switches that the directory states, defaults elsewhere."""
    own: dict[str, Any] = {}
    if (directory / "vocab.json").is_file():
        own = dict(CLIP_SPECIAL)
    elif (directory / "vocab.txt").is_file():
        own = {**BERT_SPECIAL, **BERT_CASE}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in _json(directory / name).items():
            value = value.get("content") if isinstance(value, Mapping) else value
            if key in own or key == "pad_token":
                own[key] = value
    return own


def _json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, no JSON object: fetch it again")
    return found


def _clip(directory: pathlib.Path, special: Mapping[str, str]) -> tokenizers.Tokenizer:
    vocab_file, merges_file = directory / "vocab.json", directory / "merges.txt"
    if not merges_file.is_file():
        raise ValueError(f"{merges_file} is missing: CLIP's tokenizer needs it beside vocab.json")
    vocab = _json(vocab_file)
    merges = _merges(merges_file)
    try:
        model = models.BPE(
            vocab=vocab,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=special["unk_token"],
        )
    except Exception as error:  # the package raises plain Exception
        raise ValueError(f"{merges_file} does not belong to {vocab_file.name}: {error}") from error
    backend = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), spaces, normalizers.Lowercase()]  # pyright: ignore[reportArgumentType]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(CLIP_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]  # pyright: ignore[reportArgumentType]
    )
    backend.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.ByteLevel(), decoders.Replace("</w>", " "), decoders.Strip(" ", 0, 1)]  # pyright: ignore[reportArgumentType]
    )
    start, end = (_id(vocab, special[key], vocab_file) for key in ("bos_token", "eos_token"))
    backend.post_processor = processors.RobertaProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        (special["eos_token"], end), (special["bos_token"], start), False, False
    )
    for token in special.values():
        _id(vocab, token, vocab_file)
    backend.add_special_tokens(sorted(set(special.values())))
    return backend


def _merges(path: pathlib.Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): fetch it again") from error
    merges = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pieces = line.split(" ")
        if len(pieces) != 2:
            raise ValueError(
                f"{path}, line {number}, is {line[:40]!r}, no pair of pieces: fetch it again"
            )
        merges.append((pieces[0], pieces[1]))
    return merges


def _bert(directory: pathlib.Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    path = directory / "vocab.txt"
    try:
        words = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): fetch it again") from error
    words = [word.rstrip("\r") for word in (words[:-1] if words[-1] == "" else words)]
    vocab = {word: i for i, word in enumerate(words)}
    unknown = settings["unk_token"]
    _id(vocab, unknown, path)
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=unknown))
    backend.normalizer = normalizers.BertNormalizer(  # pyright: ignore[reportAttributeAccessIssue]
        clean_text=True,
        handle_chinese_chars=settings["tokenize_chinese_chars"],
        strip_accents=settings["strip_accents"],
        lowercase=settings["do_lower_case"],
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.WordPiece(prefix="##")  # pyright: ignore[reportAttributeAccessIssue]
    first, last = settings["cls_token"], settings["sep_token"]
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{first} $A {last}",
        special_tokens=[(token, _id(vocab, token, path)) for token in (first, last)],
    )
    special = [value for key, value in settings.items() if key in BERT_SPECIAL and value in vocab]
    backend.add_special_tokens(special)
    return backend


def _id(vocab: Mapping[str, int], token: str, path: pathlib.Path) -> int:
    if token not in vocab:
        raise ValueError(f"{path} lacks the special token {token!r}: fetch it again")
    return vocab[token]


def _finish(backend: tokenizers.Tokenizer, pad: str, path: pathlib.Path) -> Tokenizer:
    """With the padding token noted in the JSON, from where `Tokenizer.of` reads it."""
    pad_id = backend.token_to_id(pad)
    if pad_id is None:
        raise ValueError(f"{path} lacks the padding token {pad!r}: fetch it again")
    backend.enable_padding(pad_id=pad_id, pad_token=pad)
    return Tokenizer.of(backend.to_str(), str(path))
