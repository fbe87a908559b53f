"""Composed digits: keyed by example alone, uniform, true to their captions, pairs held out."""

import numpy as np
import pytest

from diffusion.data.builders.captioned_digits import compose
from diffusion.data.builders.captioned_digits.captioned_digits import split_by_class


@pytest.fixture(scope="module")
def glyphs(digits):
    return compose.Glyphs.of(digits.batch(np.arange(500))["image"][..., 0])


@pytest.fixture(scope="module")
def labels(digits):
    return digits.batch(np.arange(len(digits)))["label"]


def test_an_example_depends_on_its_key_only(glyphs, labels):
    index, epoch = np.array([3, 99, 41, 7]), np.array([0, 2, 1, 1])
    image, captions, attributes = compose.compose(glyphs, labels[index], index, epoch, seed=5)
    for i in (2, 0, 3, 1):
        one = compose.compose(glyphs, labels[index[[i]]], index[[i]], epoch[[i]], seed=5)
        np.testing.assert_array_equal(one[0][0], image[i])
        assert one[1][0] == captions[i]
        assert {k: int(v[0]) for k, v in one[2].items()} == {
            k: int(v[i]) for k, v in attributes.items()
        }


@pytest.mark.parametrize("change", ["seed", "epoch", "index"])
def test_every_part_of_the_key_matters(labels, change):
    key = {"seed": 0, "epoch": 0, "index": np.arange(500)}
    a = compose.draw_attributes(labels[:500], **key)
    b = compose.draw_attributes(labels[:500], **{**key, change: key[change] + 1})
    for name in ("colour", "background", "size", "place"):
        agree = (a[name] == b[name]).mean()
        assert abs(agree - 1 / len(compose.VALUES[name])) < 0.1, name


def test_attributes_are_uniform_and_independent(labels):
    index = np.tile(np.arange(len(labels)), 8)
    epoch = np.repeat(np.arange(8), len(labels))
    drawn = compose.draw_attributes(labels[index], index, epoch, seed=0)
    n = len(index)
    for name, values in compose.VALUES.items():
        share = np.bincount(drawn[name], minlength=len(values)) / n
        np.testing.assert_allclose(share, 1 / len(values), atol=5 * np.sqrt(0.25 / n))
    free = [drawn[name] for name in ("colour", "background", "size", "place")]
    together = np.ravel_multi_index(free, (6, 2, 2, 5))
    share = np.bincount(together, minlength=120) / n
    np.testing.assert_allclose(share, 1 / 120, atol=5 * np.sqrt(1 / 120 / n))


def test_held_out_pairs_are_drawn_only_when_asked_for(labels):
    index = np.tile(np.arange(len(labels)), 4)
    epoch = np.repeat(np.arange(4), len(labels))
    train = compose.draw_attributes(labels[index], index, epoch, seed=1)
    assert not compose.is_held_out(train).any()
    pairs = set(zip(train["digit"].tolist(), train["colour"].tolist()))
    assert len(pairs) == 60 - len(compose.HELD_OUT)  # and every other pair is drawn
    every = compose.draw_attributes(labels[index], index, epoch, seed=1, held_out=True)
    assert compose.is_held_out(every).mean() == pytest.approx(0.1, abs=0.02)


def test_every_digit_and_colour_is_seen_in_training():
    digits, colours = zip(*compose.HELD_OUT)
    assert len(set(digits)) == len(digits) and set(colours) == set(compose.COLOURS)


@pytest.mark.parametrize("held_out", [False, True])
def test_prompts_say_what_their_attributes_are(held_out):
    captions, attributes = compose.prompts(2000, seed=0, held_out=held_out)
    for i, text in enumerate(captions):
        assert compose.parse(text) == {k: int(v[i]) for k, v in attributes.items()}
    assert (compose.is_held_out(attributes) == held_out).all()
    for name in ("background", "size", "place"):
        share = np.bincount(attributes[name]) / 2000
        np.testing.assert_allclose(share, 1 / len(compose.VALUES[name]), atol=0.06)
    assert captions == compose.prompts(2000, 0, held_out)[0]
    assert captions[:100] == compose.prompts(100, 0, held_out)[0]
    assert captions != compose.prompts(2000, 1, held_out)[0]


def test_every_phrasing_parses_and_is_used():
    captions, _ = compose.prompts(300, seed=3, held_out=False)
    starts = {text.split()[0] for text in captions}
    assert {"a", "on", "the", "small", "at"} <= starts
    with pytest.raises(ValueError, match="2 values of 'colour'"):
        compose.parse("a small red blue seven at the top left on black")
    with pytest.raises(ValueError, match="0 values of 'size'"):
        compose.parse("a red seven at the top left on black")


def test_pictures_show_their_attributes(glyphs, labels):
    """Colour, background, size and place are read back from the pixels alone."""
    index = np.arange(500)
    image, _, attributes = compose.compose(glyphs, labels[index], index, 0, seed=2)
    back = np.array(list(compose.BACKGROUNDS.values()))[attributes["background"]]
    frame = np.concatenate([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], axis=1)
    np.testing.assert_array_equal(frame, np.broadcast_to(back[:, None], frame.shape))
    far = np.abs(image.astype(int) - back[:, None, None]).max(-1)
    for i in range(500):
        rows, columns = (np.flatnonzero((far[i] > 16).any(axis)) for axis in (1, 0))
        height, width = (int(np.ptp(edge)) + 1 for edge in (rows, columns))
        box = list(compose.SIZES.values())[attributes["size"][i]]
        assert box - 2 <= max(height, width) <= box
        place = list(compose.PLACES.values())[attributes["place"][i]]
        for middle, edge in zip((rows.mean(), columns.mean()), place):
            assert abs(middle + 0.5 - 16) < 2 if edge == 1 else (middle - 15.5) * (edge - 1) > 2
        ink = np.unravel_index(far[i].argmax(), (32, 32))
        distance = np.abs(np.array(list(compose.COLOURS.values())) - image[i][ink]).sum(-1)
        assert distance.argmin() == attributes["colour"][i]


def test_blending_is_the_formula():
    coverage = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    out = compose.blend(coverage, np.array([1]), np.array([1]))
    alpha = coverage[0, ..., None] / 255
    expected = alpha * np.array(compose.COLOURS["green"]) + (1 - alpha) * 255
    assert np.abs(out[0] - expected).max() <= 0.5 + 1e-9


def test_glyphs_fill_their_box_and_keep_the_digit(digits):
    images = digits.batch(np.arange(200))["image"][..., 0]
    glyphs = compose.Glyphs.of(images)
    for box, coverage in zip(compose.SIZES.values(), glyphs.coverage):
        assert coverage.shape == (200, box, box)
        rows, columns = (coverage > 0).any(2), (coverage > 0).any(1)
        assert ((rows[:, 0] & rows[:, -1]) | (columns[:, 0] & columns[:, -1])).all()
    # MNIST's digits are 20 pixels long: as large glyphs they are the very pixels, moved.
    ink = images > 32
    exact = 0
    for image, mask, glyph in zip(images, ink, glyphs.coverage[1]):
        (top, bottom), (left, right) = (np.flatnonzero(mask.any(a))[[0, -1]] for a in (1, 0))
        if max(bottom - top, right - left) + 1 == 20:
            crop = image[top : bottom + 1, left : right + 1]
            assert glyph.sum() == crop.sum() and glyph.max() == crop.max()
            exact += 1
    assert exact > 150
    blank = compose.Glyphs.of(np.zeros((1, 28, 28), np.uint8))
    assert not any(coverage.any() for coverage in blank.coverage)


def test_split_takes_450_and_50_of_each_class():
    labels = np.repeat(np.arange(10), 500)[np.random.default_rng(0).permutation(5000)]
    train, test = split_by_class(labels, "train"), split_by_class(labels, "test")
    assert not set(train.tolist()) & set(test.tolist())
    assert np.bincount(labels[train]).tolist() == [450] * 10
    assert np.bincount(labels[test]).tolist() == [50] * 10


def test_vocabulary_has_every_word_a_prompt_uses():
    words = {w for text in compose.vocabulary() for w in text.split()}
    for held_out in (False, True):
        used = {w for text in compose.prompts(1000, 9, held_out)[0] for w in text.split()}
        assert used <= words
