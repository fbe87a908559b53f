"""Figures drawn by matplotlib: what they draw, and the text they carry."""

import numpy as np
import pytest
from PIL import Image

from diffusion import pictures
from diffusion.pictures import Line, Panel


@pytest.fixture
def drawn(monkeypatch):
    """Every matplotlib figure made, before it is saved."""
    made, axes = [], pictures._axes

    def kept(*arguments):
        made.append(axes(*arguments))
        return made[-1]

    monkeypatch.setattr(pictures, "_axes", kept)
    return made


def test_logged_numbers_become_a_line():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "other": 1}, {"step": 3, "loss": None}]
    rows.append({"step": 4, "loss": 0.5})
    assert pictures.logged(rows, "loss") == Line([1, 4], [2.0, 0.5], "loss")


def test_a_figure_draws_every_panel_and_carries_how_it_was_made(drawn, tmp_path):
    path = tmp_path / "figure.png"
    spans = Line([1.0, 10.0], [2.0, 3.0], "ema", low=[1.0, 2.5], high=[4.0, 3.5])
    settings = {"xlabel": "steps", "xscale": "log", "xticks": [1, 10], "xticklabels": ["1", "10"]}
    panels = [
        Panel([Line([1, 2], [3.0, 4.0], "a"), Line([1, 2], [5.0, 6.0], "b")], {"title": "two"}, 2),
        None,
        Panel([spans], settings),
    ]
    pictures.figure(path, panels, columns=2, size=(3.0, 2.0), made={"workdir": "run"})
    (_, axes) = drawn[0]
    assert axes.shape == (2, 2)
    two, blank, last, rest = axes.flat
    assert two.get_title() == "two" and not blank.axison and not rest.axison and last.axison
    assert [text.get_text() for text in two.get_legend().get_texts()] == ["a", "b"]
    curves = [line for line in two.get_lines() if len(line.get_xdata()) == 2]
    assert [list(line.get_ydata()) for line in curves[:2]] == [[3, 4], [5, 6]]
    assert len({line.get_linestyle() for line in curves[:2]}) == 2
    assert any(list(line.get_xdata()) == [2, 2] for line in two.get_lines()), "the mark"
    assert last.get_legend() is None and last.get_xscale() == "log"
    (bars,) = last.collections
    assert [s[:, 1].tolist() for s in bars.get_segments()] == [[1.0, 4.0], [2.5, 3.5]]
    with Image.open(path) as image:
        assert image.size == (540, 360) and image.info["workdir"] == "run"


def test_categories_are_not_joined(drawn, tmp_path):
    line = Line(["ours", "peer"], [2.0, 1.0], low=[1.5, 0.5], high=[3.0, 1.5])
    pictures.figure(tmp_path / "figure.png", [Panel([line], {})], columns=1)
    assert drawn[0][1].flat[0].get_lines()[0].get_linestyle() == "None"


def test_captions_stand_under_their_images(drawn, tmp_path):
    pixels = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (10, 200, 90)])
    path = tmp_path / "grid.png"
    pictures.captioned(path, pixels, ["a", "b", "c"], columns=2, made={"seed": "3"})
    axes = drawn[0][1]
    assert [axis.get_title() for axis in axes.flat] == ["a", "b", "c", ""]
    assert [int(axis.images[0].get_array().mean()) for axis in axes.flat[:3]] == [10, 200, 90]
    with Image.open(path) as image:
        assert image.info["generated"] == "true" and image.info["seed"] == "3"
