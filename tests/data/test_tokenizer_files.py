"""CLIP's and BERT's tokenizers against Transformers', on generated strings; broken files."""

import json
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from diffusion.data import tokenizer_files
from diffusion.data.tokenizers import Tokenizer

CORPUS = (
    "the quick brown fox's 12 jumps, over a lazy dog; painting of naïve cafés at dawn, "
    "they're photographed in 4k by größe the third and his photographer who'll see the sea "
).split(" ")
START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77


def clip_directory(path, **settings):
    """A directory as openai/clip-vit-large-patch14 is, with a small vocabulary."""
    trained = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        [" ".join(CORPUS)] * 3,
        trainers.BpeTrainer(
            vocab_size=900,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    merges = json.loads(trained.to_str())["model"]["merges"]
    pieces = [*sorted(alphabet), *(f"{a}</w>" for a in sorted(alphabet))]
    pieces += [m for pair in merges if (m := "".join(pair)) not in pieces]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, START, END]))}
    path.mkdir(parents=True, exist_ok=True)
    (path / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def bert_directory(path, **settings):
    """A directory as bert-base-uncased is, with a small vocabulary."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.;:'\"!?()-"
    words = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    words += [f"##{a}" for a in letters] + ["the", "fox", "##ing", "paint", "cafe", "中", "國"]
    path.mkdir(parents=True, exist_ok=True)
    (path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def strings(count=10_000):
    """Words, any Unicode, emoji and their joiners, control characters, special tokens; long."""
    rng = random.Random(0)
    emoji = ["😀", "👩\u200d🚀", "🏳\ufe0f\u200d🌈", "é", "e\u0301", "中國", "ß", "İ", "ﬁ", "\u200d"]
    emoji += ["<|endoftext|>", "[SEP]"]
    found = ["", " ", "\n\t", "a" * 5000, "the fox " * 400, "'s 're'LL <|startoftext|>"]
    kinds = (
        lambda: rng.choice(CORPUS),
        lambda: rng.choice(CORPUS).upper(),
        lambda: rng.choice(emoji),
        lambda: str(rng.randrange(10**6)),
        lambda: chr(rng.randrange(0x20)),
        lambda: chr(rng.choice([rng.randrange(0x80, 0x3000), rng.randrange(0x10000, 0x1FFFF)])),
        lambda: rng.choice([" ", "  ", "\t", "\u00a0", "\u3000", ",", "--", "...", "'"]),
    )
    while len(found) < count:
        size = rng.randrange(150) if rng.random() < 0.05 else rng.randrange(12)
        joiner = rng.choice(["", " ", " "])
        found.append(joiner.join(rng.choice(kinds)() for _ in range(size)))
    return found


def reference(kind, directory):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import BertTokenizer, CLIPTokenizer

        return {"clip": CLIPTokenizer, "bert": BertTokenizer}[kind].from_pretrained(directory)


DIRECTORIES = {"clip": clip_directory, "bert": bert_directory}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("clip", {}),
        ("clip", {"pad_token": "!"}),
        ("bert", {}),
        ("bert", {"do_lower_case": False}),
    ],
)
def test_ids_equal_transformers_on_ten_thousand_strings(tmp_path, kind, settings):
    directory = DIRECTORIES[kind](tmp_path, **settings)
    ours, theirs = tokenizer_files.load(directory), reference(kind, directory)
    texts = strings()
    wanted = theirs(texts, padding="max_length", truncation=True, max_length=LENGTH)["input_ids"]
    tokens, cut = ours.encode_and_mark(texts, LENGTH)
    differ = [t for t, a, b in zip(texts, tokens, np.array(wanted)) if (a != b).any()]
    assert differ == []
    assert ours.pad_id == theirs.pad_token_id
    lengths = [len(ids) for ids in theirs(texts)["input_ids"]]
    assert cut.tolist() == [n > LENGTH for n in lengths]
    assert 50 < cut.sum() < 2000


def flags(content, special=True, normalized=False):
    fields = {"lstrip": False, "rstrip": False, "single_word": False}
    return {"content": content, "normalized": normalized, "special": special} | fields


def added(directory, *, decoder, special=False, normalized=True):
    """Gives a directory two learned words, as Transformers 4.34 and later write it or as before."""
    first = tokenizer_files.load(directory).vocabulary_size
    words = {"<cat-toy>": first, "<Sks Dog>": first + 1}
    config = json.loads((directory / "tokenizer_config.json").read_text())
    if decoder:
        kept = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": "!"}
        vocab = json.loads((directory / "vocab.json").read_text())
        tokens = {str(vocab[t]): flags(t) for t in (START, END, "!")}
        tokens |= {str(i): flags(t, special, normalized) for t, i in words.items()}
        config |= kept | {"added_tokens_decoder": tokens}
    else:
        (directory / "added_tokens.json").write_text(json.dumps(words))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return list(words)


SAID = {"bos_token": START, "eos_token": END, "unk_token": END}
SD1 = {k: flags(v, normalized=True) | {"special": None} for k, v in SAID.items()}
SD1 = {k: {f: x for f, x in v.items() if f != "special"} for k, v in SD1.items()}
TYPED = {k: v | {"__type": "AddedToken"} for k, v in SD1.items()} | {"pad_token": END}
# tokenizer_config.json, special_tokens_map.json, and the padding that Transformers 4 and 5 take.
LAYOUTS = {
    "SD 1.x": (TYPED, SD1 | {"pad_token": END}, END),
    "SD 2.x": (TYPED, SD1 | {"pad_token": "!"}, "!"),
    "map alone": ({}, SAID | {"pad_token": "!"}, "!"),
    "map of objects": ({"pad_token": END}, {"pad_token": flags("!")}, "!"),
    "config alone": ({"pad_token": "!"}, None, "!"),
    "neither": ({}, None, END),
    "a further special word": ({}, {"additional_special_tokens": ["<|endoftext|>"]}, END),
}


@pytest.mark.parametrize("words", ["none", "added_tokens.json", "decoder", "special", "exact"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_of_clip(tmp_path, layout, words):
    """Padding and ids as Transformers', with the words of a pipeline that has learned some."""
    config, special, pad = LAYOUTS[layout]
    directory, learned = clip_directory(tmp_path, **config), []
    if special is not None:
        (directory / "special_tokens_map.json").write_text(json.dumps(special))
    if words != "none":
        how = {"special": words == "special", "normalized": words == "decoder"}
        decoder = words != "added_tokens.json"
        learned = added(directory, decoder=decoder, **how)
        pad = "!" if decoder else pad
    ours, theirs = tokenizer_files.load(directory), reference("clip", directory)
    assert ours.backend.id_to_token(ours.pad_id) == theirs.pad_token == pad
    plain = strings(10_000 if "SD" in layout and words not in ("special", "exact") else 500)
    texts = [f"{t} {w}{t[:3]}, {w.upper()}" for t in plain[:150] for w in learned] + plain
    wanted = theirs(texts, padding="max_length", truncation=True, max_length=LENGTH)["input_ids"]
    differ = [t for t, a, b in zip(texts, ours.encode(texts, LENGTH), wanted) if list(a) != b]
    assert differ == []
    if learned:
        assert ours.vocabulary_size - 1 in ours.encode(["a " + learned[1]], LENGTH)
    tokenizer_files.save(ours, tmp_path / "again", LENGTH)
    for again in (tokenizer_files.load(tmp_path / "again"), reference("clip", tmp_path / "again")):
        found = (
            again.encode(texts, LENGTH)
            if isinstance(again, Tokenizer)
            else np.array(again(texts, padding="max_length", truncation=True)["input_ids"])
        )
        np.testing.assert_array_equal(found, ours.encode(texts, LENGTH))


@pytest.mark.parametrize("kind", DIRECTORIES)
def test_a_tokenizer_survives_our_file_and_theirs(tmp_path, kind):
    first = tokenizer_files.load(DIRECTORIES[kind](tmp_path / "a", pad_token="!"))
    first.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    tokenizer_files.save(again, tmp_path / "b", LENGTH)
    theirs, back = reference(kind, tmp_path / "b"), tokenizer_files.load(tmp_path / "b")
    texts = strings(300)
    wanted = first.encode(texts, LENGTH)
    found = theirs(texts, padding="max_length", truncation=True)["input_ids"]
    for tokens in (again.encode(texts, LENGTH), back.encode(texts, LENGTH), np.array(found)):
        np.testing.assert_array_equal(tokens, wanted)


def test_what_is_decoded_reads_like_the_caption(tmp_path):
    ours = tokenizer_files.load(clip_directory(tmp_path))
    assert ours.decode(ours.encode(["The  quick fox, 12"], 20)) == ["the quick fox , 1 2"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("merges.txt", None, ("merges.txt", "missing")),
        ("merges.txt", "#version: 0.2\nth e\nbroken\n", ("merges.txt", "line 3", "broken")),
        ("merges.txt", "#version: 0.2\nqqq zzz\n", ("merges.txt", "vocab.json")),
        ("vocab.json", '{"a": 0', ("vocab.json", "JSON")),
        ("vocab.json", '{"a": 0}', ("vocab.json",)),
        ("tokenizer_config.json", "[]", ("tokenizer_config.json", "list")),
        ("tokenizer_config.json", '{"pad_token": "[NONE]"}', ("[NONE]",)),
        ("tokenizer_config.json", '{"pad_token": null}', ("special token None",)),
        ("tokenizer_config.json", '{"pad_token": {"text": "!"}}', ("'text'", "config.json")),
        ("tokenizer_config.json", '{"padding_side": "left"}', ("padding_side", "'right'")),
        ("added_tokens.json", '{"<new>": 7}', ("<new>", "id 7")),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, words):
    directory = clip_directory(tmp_path)
    if name == "vocab.json" and content.endswith("}"):
        (directory / "merges.txt").write_text("#version: 0.2\n")
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_text(content)
    with pytest.raises(ValueError) as caught:
        tokenizer_files.load(directory)
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_empty_directory_and_a_vocabulary_without_special_tokens(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer"):
        tokenizer_files.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\nfox\n")
    with pytest.raises(ValueError, match=r"vocab.txt lacks .*\[SEP\]"):
        tokenizer_files.load(tmp_path)
