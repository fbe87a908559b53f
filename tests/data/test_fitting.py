"""Pictures made square as the papers' code did it, each beside that code in this file's words."""

import numpy as np
import pytest
from PIL import Image

from configs import common_ddpm
from diffusion.data import fitting, folder, loader, transforms
from experiments.run import data

CUBIC, LANCZOS, BOX = (getattr(Image.Resampling, n) for n in ("BICUBIC", "LANCZOS", "BOX"))


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def theirs_opencv(pixels, height, width):
    """INTER_LINEAR of uint8 in OpenCV's modules/imgproc/src/resize.cpp: weights of eleven bits,
    rows first, then columns; a weight outside the picture is nought."""

    def taps(n, m):
        for i in range(n):
            at = np.float32((i + 0.5) * (m / n) - 0.5)
            first = int(np.floor(at))
            near = at - first
            if first < 0:
                first, near = 0, 0.0
            if first >= m - 1:
                first, near = m - 1, 0.0
            yield first, min(first + 1, m - 1), round((1 - near) * 2048), round(near * 2048)

    x = pixels.astype(np.int64)
    rows = np.stack([x[:, a] * u + x[:, b] * v for a, b, u, v in taps(width, x.shape[1])], 1)
    both = np.stack([rows[a] * u + rows[b] * v for a, b, u, v in taps(height, x.shape[0])])
    return ((both + (1 << 21)) >> 22).astype(np.uint8)


@pytest.mark.parametrize("shape", [(64, 64), (61, 47), (20, 90)])
def test_opencvs_bilinear_does_not_smooth(shape):
    pixels = np.asarray(picture(*shape[::-1]))
    ours = fitting.opencv_bilinear(pixels, (16, 24)).astype(int)
    difference = np.abs(ours - theirs_opencv(pixels, 16, 24))
    assert difference.max() <= 1 and difference.mean() < 0.06  # weights of eleven bits
    four = fitting.opencv_bilinear(pixels[:, :, 0], tuple(n // 4 for n in shape))
    if shape == (64, 64):  # of 4 x 4 pixels the mean of the middle four, not of all
        x = pixels[:, :, 0].astype(float).reshape(16, 4, 16, 4)[:, 1:3, :, 1:3]
        np.testing.assert_allclose(four, x.mean((1, 3)), atol=0.51)


def theirs_box(image, size):
    """ADM's centre crop."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(n // 2 for n in image.size), BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(n * scale) for n in image.size), CUBIC)
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def test_each_name_is_its_papers():
    image = picture(90, 70)
    square = image.crop((10, 0, 80, 70))
    for resize, wanted in {
        "bicubic": square.resize((16, 16), CUBIC),
        "lanczos": square.resize((16, 16), LANCZOS),
        "box": theirs_box(image, 16),
        "opencv": theirs_opencv(np.asarray(image), 16, 21)[:, 2:18],
    }.items():
        found = np.asarray(fitting.fit(image, 16, fitting.How(resize)), int)
        assert np.abs(found - np.asarray(wanted)).max() <= (resize == "opencv"), resize
    whole = fitting.fit(image, 16, fitting.How("opencv", 28, whole=True))
    assert whole.size == (36, 28)
    inner = fitting.fit(image, 16, fitting.How("opencv", 28))
    np.testing.assert_array_equal(inner, np.asarray(whole)[6:22, 10:26])


def test_sizes_are_of_the_whole_picture_and_of_the_square_in_it(tmp_path):
    """As Diffusers' train_text_to_image_sdxl.py has them: the size before, the place after."""
    (tmp_path / "train").mkdir()
    image = picture(90, 70)
    exif = image.getexif()
    exif[0x0112] = 6  # upright it is 70 wide and 90 high
    image.save(tmp_path / "train/0.png", exif=exif)
    for given, at in {
        ("box", 28): (10, 6),
        ("opencv", 20): (5, 2),
        ("bicubic", 0): (2, 0),
        ("bicubic", 16): (2, 0),
    }.items():
        how = fitting.How(*given, sized=True)
        batch = folder.open_folder(tmp_path, "train", 16, how=how).batch(np.array([0]))
        assert batch["sizes"].tolist() == [[90, 70, *at, 16, 16]], given
    drawn = fitting.How("bicubic", 28, whole=True, sized=True)
    source = folder.open_folder(tmp_path, "train", 16, how=drawn)
    (whole,) = source.batch(np.array([0]))["image"]
    for epoch in range(3):
        steps = [transforms.RandomCrop(16, 5)]
        batch = loader.fetch(source, *(np.array([n]) for n in (0, epoch, 0)), steps)
        (height, width, top, left, *target), (found,) = batch["sizes"][0], batch["image"]
        np.testing.assert_array_equal(found, whole[top : top + 16, left : left + 16])
        assert (height, width, *target) == (90, 70, 16, 16) and top + left > 0
    assert "sizes" not in folder.open_folder(tmp_path, "train", 16).batch(np.array([0]))


def test_crops_are_drawn_for_each_epoch_and_lie_anywhere(tmp_path):
    for i in range(3):
        (tmp_path / "train").mkdir(exist_ok=True)
        picture(24 + 8 * i, 16, i).save(tmp_path / "train" / f"{i}.png")
    how = fitting.How(whole=True)
    source = folder.open_folder(tmp_path, "train", 16, how=how)
    crop, index = transforms.RandomCrop(16, 5), np.array([2, 0, 2])

    def at(epoch, which=index):
        return loader.fetch(source, which, np.full_like(which, epoch), which, [crop])["image"]

    made = at(0)
    assert made.shape == (3, 16, 16, 3)
    np.testing.assert_array_equal(made[0], made[2])
    np.testing.assert_array_equal(at(0, index[:1])[0], made[0])  # whatever is beside it
    pixels = np.asarray(picture(24, 16, 0))
    places = set()
    for epoch in range(60):
        found = at(epoch, index[1:2])[0]
        places |= {x for x in range(9) if np.array_equal(pixels[:, x : x + 16], found)}
    assert places == {*range(9)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data.resize": "nearest"}, "data.resize='nearest' is unknown"),
        ({"data.crop": "corner"}, "data.crop='corner' is unknown"),
        ({"data.shorter_side": 8}, "data.shorter_side=8 is under data.image_size=32"),
        ({"data.crop": "random", "data.boxes": "b.jsonl"}, "would not crop data.boxes"),
        ({"data.fit": "pad", "data.resize": "box"}, "data.resize='box' is of pictures that are"),
        ({"data.name": "digits", "data.crop": "random"}, "data.crop='random' is of pictures"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(change, words, tmp_path):
    config = common_ddpm.ddpm("folder", flip=False)
    config.data.dir = str(tmp_path)
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=words):
        data.open_images(config.lock(), "train")
