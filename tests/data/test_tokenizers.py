"""Tokenizers: fixed lengths, round trips, what does not fit is counted, and the same each time."""

import random

import numpy as np
import pytest

from diffusion.data import tokenizers
from diffusion.data.builders.captioned_digits import compose


@pytest.fixture(scope="module", params=["word", "bpe"])
def tokenizer(request):
    return tokenizers.train(compose.vocabulary(), request.param)


@pytest.fixture(scope="module")
def captions():
    return compose.prompts(300, 1, False)[0]


def test_round_trip(tokenizer, captions):
    tokens = tokenizer.encode(captions, 20)
    assert tokens.dtype == np.int32 and tokens.shape == (300, 20)
    for text, back in zip(captions, tokenizer.decode(tokens)):
        assert back.replace(" ,", ",") == text
    assert len({tuple(row) for row in tokens.tolist()}) == len(set(captions))


def test_null_caption_padding_and_special_tokens(tokenizer):
    assert tokenizer.null(6).tolist() == [2, 3, 0, 0, 0, 0]
    one = tokenizer.encode(["red"], 6)[0]
    end = one.tolist().index(3)
    assert one[0] == 2 and end >= 2 and (one[1:end] > 3).all() and not one[end + 1 :].any()
    assert tokenizer.encode([], 6).shape == (0, 6)


def test_longest_caption_of_the_digits_fits_in_sixteen():
    words = tokenizers.train(compose.vocabulary())
    captions = compose.vocabulary() + compose.prompts(2000, 0, False)[0]
    assert not words.encode_and_mark(captions, 16)[1].any()
    assert words.encode_and_mark(captions, 15)[1].any()
    assert words.vocabulary_size < 64


def test_too_long_captions_are_cut_and_marked(tokenizer):
    text = "a small red seven at the top left on black"
    tokens, cut = tokenizer.encode_and_mark([text, "red", ""], 5)
    assert cut.tolist() == [True, False, False]
    assert tokens[0, -1] == 3, "the end token survives the cut"
    with pytest.raises(ValueError, match="length=2"):
        tokenizer.encode(["red"], 2)


def test_unknown_words_are_named_and_do_not_look_like_padding():
    words = tokenizers.train(compose.vocabulary())
    found = words.unknown(["a Purple seven", "a seven on mauve", "a red seven"])
    assert found == ["Purple", "mauve"]
    assert words.encode(["purple"], 4).tolist() == [[2, 1, 3, 0]]
    assert tokenizers.train(compose.vocabulary(), "bpe").unknown(["Purple ☃"]) == []


def test_case_does_not_matter(tokenizer):
    same = tokenizer.encode(["A Red SEVEN", "a red seven"], 8)
    np.testing.assert_array_equal(same[0], same[1])


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_training_is_deterministic_whatever_the_order(kind):
    texts = compose.vocabulary()
    one = tokenizers.train(texts, kind)
    shuffled = random.Random(0).sample(texts, len(texts))
    assert tokenizers.train(shuffled, kind).sha256 == one.sha256


def test_save_and_load(tokenizer, tmp_path, captions):
    tokenizer.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = tokenizers.Tokenizer.load(path)
        assert again == tokenizer and again.sha256 == tokenizer.sha256
        np.testing.assert_array_equal(again.encode(captions, 16), tokenizer.encode(captions, 16))


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        tokenizers.Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not"):
        tokenizers.Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="0 captions"):
        tokenizers.train([])
    with pytest.raises(ValueError, match="kind 'char'"):
        tokenizers.train(["a"], "char")
