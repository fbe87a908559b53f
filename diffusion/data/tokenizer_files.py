"""The tokenizers of published text encoders, from the files of a model directory.

    vocab.json, merges.txt    CLIP's byte pairs (https://arxiv.org/abs/2103.00020, section 2.4):
                              Unicode NFC, white space joined, lower case; words, single digits and
                              runs of other signs; bytes, merged, a word's last ending in "</w>"
    vocab.txt                 BERT's word pieces (https://arxiv.org/abs/1810.04805): control
                              characters dropped, Chinese set apart, accents and case removed
    tokenizer.json            whatever it says

Special tokens and what BERT does to case stand in tokenizer_config.json, else they are CLIP's and
BERT's own. As in Transformers 4 and 5, where that file has added_tokens_decoder, that names the
words that are tokens, learned ones too; elsewhere special_tokens_map.json wins over it, and such
words stand in added_tokens.json and tokenizer.json. A caption becomes start, pieces, end, cut with
the end kept, and padded: Stable Diffusion 1.x pads with the end token, 2.x with "!" (id 0).
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from diffusion import files
from diffusion.data.tokenizers import Tokenizer

CLIP_SPECIAL = {"bos_token": "<|startoftext|>"}
CLIP_SPECIAL |= dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
BERT_SPECIAL = {
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "unk_token": "[UNK]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
}
# Keys that have no place here, and the one value that changes nothing.
FIXED = {"padding_side": "right", "truncation_side": "right", "split_special_tokens": False}
BERT_CASE = {"do_lower_case": True, "tokenize_chinese_chars": True, "strip_accents": None}
# CLIP's own pattern (openai/CLIP:clip/simple_tokenizer.py).
CLIP_PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def load(directory: str | pathlib.Path, **replaced: Any) -> Tokenizer:
    """The tokenizer of a model directory; `replaced`: settings whatever its files say.

    ValueError naming the file that is missing, broken, or lacks a special token.
    """
    directory = pathlib.Path(directory)
    settings, added = _settings(directory, replaced)
    for name, build in (("vocab.json", _clip), ("vocab.txt", _bert)):
        if (directory / name).is_file():
            backend = build(directory, settings, added)
            return _finish(backend, settings["pad_token"], directory / name)
    if (directory / "tokenizer.json").is_file():
        known = Tokenizer.load(directory)
        path = directory / "tokenizer.json"
        _add(known.backend, added, path)
        pad = (known.backend.padding or {}).get("pad_token") or settings.get("pad_token")
        return _finish(known.backend, pad, path) if pad else Tokenizer.of(known.backend.to_str())
    raise ValueError(
        f"{directory} holds no tokenizer: vocab.json with merges.txt, vocab.txt or tokenizer.json "
        "is needed"
    )


def save(tokenizer: Tokenizer, directory: pathlib.Path, length: int) -> None:
    """Writes the files that Transformers reads, CLIP's or BERT's, and tokenizer.json beside them.

    `length`: tokens that the text encoder reads. Others are written as tokenizer.json alone.
    """
    # Length and padding are the caller's choices, which Transformers keeps elsewhere.
    whole = json.loads(tokenizer.serialised) | {"padding": None, "truncation": None}
    model = whole["model"]
    pad = tokenizer.backend.id_to_token(tokenizer.pad_id)
    config: dict[str, Any] = {"model_max_length": length, "pad_token": pad}
    config["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in whole["added_tokens"]
    }
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


# Words that are tokens of their own: with the id that a file gives them, or None.
Added = list[tuple[AddedToken, int | None]]


def _settings(directory: pathlib.Path, replaced: Mapping) -> tuple[dict[str, Any], Added]:
    """Special tokens and switches that the directory states, or defaults; added words."""
    own: dict[str, Any] = {}
    if (directory / "vocab.json").is_file():
        own = dict(CLIP_SPECIAL)
    elif (directory / "vocab.txt").is_file():
        own = {**BERT_SPECIAL, **BERT_CASE}
    path = directory / "tokenizer_config.json"
    stated = _json(path)
    for key, value in FIXED.items():
        if stated.get(key, value) != value:
            raise ValueError(
                f"{path}: {key}={stated[key]!r} is not supported: only {value!r} is; change it"
            )
    decoder = stated.get("added_tokens_decoder")
    more = {} if decoder is not None else _json(directory / "special_tokens_map.json")
    stated |= {**more, **replaced}
    own |= {key: value for key, value in stated.items() if key in own or key == "pad_token"}
    named = [own[key] for key in own if key.endswith("_token") and own[key] is not None]
    more = stated.get("extra_special_tokens") or stated.get("additional_special_tokens") or []
    more = more.values() if isinstance(more, dict) else more
    named = [_token(value, path) for value in (*named, *more)]
    if decoder is None:
        added = _legacy(directory, {token.content for token in named})
    else:
        added = [(_token(value, path), int(index)) for index, value in decoder.items()]
    special = {token.content for token in named}
    for token, _ in added:
        token.special = token.special or token.content in special
    known = {token.content for token, _ in added}
    own = {k: _token(v, path).content if isinstance(v, dict) else v for k, v in own.items()}
    added = sorted(added, key=lambda pair: pair[1] or 0)
    return own, added + [(token, None) for token in named if token.content not in known]


def _legacy(directory: pathlib.Path, special: set[str]) -> Added:
    """Of directories without added_tokens_decoder; tokenizer.json's win."""
    path = directory / "added_tokens.json"
    found = {
        text: (AddedToken(text, normalized=text not in special, special=text in special), index)
        for text, index in _json(path).items()
    }
    path = directory / "tokenizer.json"
    for fields in _json(path).get("added_tokens", []):
        found[fields["content"]] = (_token(fields, path), fields["id"])
    return list(found.values())


def _token(value: Any, path: pathlib.Path) -> AddedToken:
    """A token by its text alone is special, and stands in the text as it is."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    keys = ("single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        fields = {"special": True} | {k: value[k] for k in keys if k in value}
        return AddedToken(value["content"], **fields)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} has {value!r} for a token ({error!r}): fetch it again") from error


def _add(backend: tokenizers.Tokenizer, added: Added, path: pathlib.Path) -> None:
    """Adds the words. ValueError for one that would get an id that no file gives it."""
    for token, index in added:
        if index is None:
            _id(backend, token.content, path)
        backend.add_tokens([token])
        found = backend.token_to_id(token.content)
        if index is not None and found != index:
            raise ValueError(
                f"{path}: the added token {token.content!r} is to have the id {index}, but gets "
                f"{found} in this vocabulary: fetch both again"
            )


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): fetch it again") from error


def _json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, no JSON object: fetch it again")
    return found


def _clip(
    directory: pathlib.Path, special: Mapping[str, str], added: Added
) -> tokenizers.Tokenizer:
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
    _add(backend, added, vocab_file)
    start, end = (_id(backend, special[key], vocab_file) for key in ("bos_token", "eos_token"))
    backend.post_processor = processors.RobertaProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        (special["eos_token"], end), (special["bos_token"], start), False, False
    )
    return backend


def _merges(path: pathlib.Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pieces = line.split(" ")
        if len(pieces) != 2:
            raise ValueError(
                f"{path}, line {number}, is {line[:40]!r}, no pair of pieces: fetch it again"
            )
        merges.append((pieces[0], pieces[1]))
    return merges


def _bert(
    directory: pathlib.Path, settings: Mapping[str, Any], added: Added
) -> tokenizers.Tokenizer:
    path = directory / "vocab.txt"
    words = _text(path).split("\n")
    words = [word.rstrip("\r") for word in (words[:-1] if words[-1] == "" else words)]
    vocab = {word: i for i, word in enumerate(words)}
    unknown = settings["unk_token"]
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=unknown))
    backend.normalizer = normalizers.BertNormalizer(  # pyright: ignore[reportAttributeAccessIssue]
        clean_text=True,
        handle_chinese_chars=settings["tokenize_chinese_chars"],
        strip_accents=settings["strip_accents"],
        lowercase=settings["do_lower_case"],
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.WordPiece(prefix="##")  # pyright: ignore[reportAttributeAccessIssue]
    # Captions need no mask: vocabularies without it are whole.
    mask = settings["mask_token"]
    _add(backend, [(t, i) for t, i in added if t.content != mask or mask in vocab], path)
    first, last = settings["cls_token"], settings["sep_token"]
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{first} $A {last}",
        special_tokens=[(token, _id(backend, token, path)) for token in (first, last)],
    )
    return backend


def _id(backend: tokenizers.Tokenizer, token: str | None, path: pathlib.Path) -> int:
    found = None if token is None else backend.token_to_id(token)
    if found is None:
        raise ValueError(f"{path} lacks the special token {token!r}: fetch it again")
    return found


def _finish(backend: tokenizers.Tokenizer, pad: str | None, path: pathlib.Path) -> Tokenizer:
    """With the padding token noted in the JSON, from where `Tokenizer.of` reads it."""
    pad_id = _id(backend, pad, path)
    backend.enable_padding(pad_id=pad_id, pad_token=pad)
    return Tokenizer.of(backend.to_str(), str(path))
