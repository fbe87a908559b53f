"""Boxes as taming's tokens, maps of labels, and a folder's own, cropped as its images are."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from diffusion.data import annotations, folder, layouts
from diffusion.data.builders.captioned_digits import compose
from diffusion.data.sources import MemorySource

RNG = np.random.default_rng(0)
DIGITS = MemorySource(
    {"image": RNG.integers(0, 256, (12, 28, 28, 1), np.uint8), "label": np.arange(12) % 10}
)


def batch(source, epoch=0):
    index = np.arange(len(source))
    return {**source.batch(index), "index": index, "epoch": np.full_like(index, epoch)}


def theirs(boxes, length, vocabulary):
    """ObjectsBoundingBoxConditionalBuilder of taming-transformers, without its shuffling."""
    sections, none = int(math.sqrt(vocabulary)), vocabulary - 1

    def coordinates(x, y):
        return round(y * (sections - 1)) * sections + round(x * (sections - 1))

    found = []
    for label, x, y, w, h in boxes:
        found += [int(label), coordinates(x, y), coordinates(x + w, y + h)]
    found += [none] * (length - 2 - len(found))
    return [*found, coordinates(0, 0), coordinates(1, 1)]


def test_tokens_are_tamings():
    boxes = [[17, 0.11, 0.2, 0.31, 0.4], [3, 0.0, 0.5, 0.9, 0.5]]
    found = layouts.tokens(np.array([boxes]), 92, 8192)
    assert found[0].tolist() == theirs(boxes, 92, 8192)
    none = layouts.tokens(np.zeros((1, 0, 5)), 92, 8192)
    assert none[0].tolist() == theirs([], 92, 8192)


def test_boxes_of_an_upright_image_are_cropped_above_and_below(tmp_path):
    Image.fromarray(np.zeros((40, 20, 3), np.uint8)).save(tmp_path / "a.png")
    boxes = np.array([[1, 0, 0.25, 1, 0.25], [2, 0, 0, 1, 0.2]], np.float32)
    found = annotations._cropped(boxes, tmp_path / "a.png")
    np.testing.assert_allclose(found, [[1, 0, 0, 1, 0.5]], atol=1e-6)


def test_two_digits_lie_in_their_boxes_and_their_order_is_drawn():
    two = layouts.TwoDigits.of(DIGITS, 3)
    made = two(batch(DIGITS))
    assert made["image"].shape == (12, 32, 32, 3) and made["layout"].shape == (12, 2, 5)
    np.testing.assert_array_equal(made["layout"][:, 0, 0], DIGITS.columns["label"])
    for picture, boxes in zip(made["image"], made["layout"]):
        rest = picture.copy()
        for _, left, top, width, height in boxes:
            (left, top, width, height) = np.rint(np.array([left, top, width, height]) * 32).astype(
                int
            )
            assert rest[top : top + height, left : left + width].max() > 0
            rest[top : top + height, left : left + width] = 0
        assert rest.max() == 0
    assert not np.array_equal(two(batch(DIGITS, 1))["layout"], made["layout"])
    said = layouts.Tokens(11, 1024, 0)(made)["tokens"]
    one = {k: v[4:5] for k, v in made.items()}
    np.testing.assert_array_equal(layouts.Tokens(11, 1024, 0)(one)["tokens"], said[4:5])
    first = {tuple(sorted((row[0], row[3]))) for row in said}
    labels = {tuple(sorted(row)) for row in made["layout"][..., 0].astype(int).tolist()}
    assert first == labels and (said[:, 0] != made["layout"][:, 0, 0]).any()
    assert (said[:, 6:9] == 1023).all()


def test_centred_digits_are_large_and_in_the_centre():
    glyphs = compose.Glyphs.of(DIGITS.columns["image"][..., 0])
    found = layouts.CentreDigits(glyphs, 0)(batch(DIGITS))["image"]
    ground = found[:, :1, :1]
    inked = (found != ground).any(-1)
    assert not inked[:, [0, 5, 26, 31]].any() and not inked[:, :, [0, 5, 26, 31]].any()
    assert inked[:, 6:26, 6:26].mean((1, 2)).min() > 0.2


def test_segments_are_of_the_digits_own_pixels():
    glyphs = compose.Glyphs.of(DIGITS.columns["image"][..., 0])
    attributes = np.stack([np.arange(12) % 10, *[np.zeros(12, int)] * 4], 1)
    made = layouts.SegmentDigits(glyphs)({**batch(DIGITS), "attributes": attributes})
    assert made["segments"].shape == (12, 32, 32) and made["segments"].dtype == np.uint8
    for i, found in enumerate(made["segments"]):
        assert set(np.unique(found)) == {0, 1 + i % 10}


def test_a_folders_boxes_and_maps_are_cropped_as_its_images(tmp_path):
    images, maps = tmp_path / "images", tmp_path / "maps"
    images.mkdir(), maps.mkdir()
    labels = np.repeat(np.arange(4, dtype=np.uint8), 10)[None].repeat(20, 0)
    for name in ("a", "b"):
        Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(images / f"{name}.jpg")
        Image.fromarray(labels).save(maps / f"{name}.png")
    rows = [
        {"file_name": "a.jpg", "boxes": [[2, 0.25, 0.0, 0.25, 1.0], [1, 0.8, 0, 0.2, 1]]},
        {"file_name": "b.jpg", "boxes": []},
    ]
    lines = tmp_path / "boxes.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows))
    source = folder.open_folder(images, "train", 10)
    found = annotations.Segments(maps, images, source.rows, 10)(batch(source))
    np.testing.assert_array_equal(found["segments"][0, 0], [1] * 5 + [2] * 5)
    found = annotations.Boxes.of(lines, images, source.rows, 3, 5)(batch(source))["layout"]
    np.testing.assert_allclose(found[0, 0], [2, 0, 0, 0.5, 1], atol=1e-6)
    assert (found[0, 1:, 0] == -1).all() and (found[1, :, 0] == -1).all()
    Image.fromarray(labels[:, :30]).save(maps / "b.png")
    with pytest.raises(ValueError, match=r"b.png has 20x30 labels, but its image 20x40 pixels"):
        annotations.Segments(maps, images, source.rows, 10)(batch(source))
    lines.write_text(json.dumps(rows[0]))
    with pytest.raises(ValueError, match=r"has no line of .*b.jpg: add one"):
        annotations.Boxes.of(lines, images, source.rows, 3, 5)
    rows[0]["boxes"][0][1] = 0.9
    lines.write_text(json.dumps(rows[0]))
    with pytest.raises(ValueError, match=r"line 1: box=2,0.9.* is not inside the picture"):
        annotations.Boxes.of(lines, images, source.rows, 3, 5)


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ("1,0.5,0,0.6,1", "is not inside the picture"),
        ("1,0.5,0,0,1", "is not inside the picture"),
        ("7,0,0,1,1", r"has a label outside 0\.\.6"),
        ("1.5,0,0,1,1", "has a label outside"),
        ("one,0,0,1,1", "must be label,left,top,width,height"),
        ("1,0,0,1", "must be label,left,top,width,height"),
    ],
)
def test_what_is_no_box_is_refused(box, words):
    with pytest.raises(ValueError, match=f"^box={box} {words}"):
        layouts.parse([box], 7)


def test_what_the_data_lack_and_the_model_does_not_know_is_refused():
    for call, words in (
        (lambda: layouts.objects(93), "max_length=93 must be three tokens an object"),
        (lambda: layouts.Tokens(11, 1024, 0)({}), "but the data have none: add data.boxes"),
        (lambda: layouts.CheckSegments(5)({}), "but the data have none: add data.segments"),
        (
            lambda: layouts.CheckSegments(5)({"segments": np.array([[[5]]])}),
            "a map has the label 5, but model.rescaler.classes=5",
        ),
        (
            lambda: layouts.Tokens(5, 1024, 0)({"layout": np.zeros((1, 2, 5))}),
            "has 2 boxes, but model.text_encoder.max_length=5 reads 1",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
