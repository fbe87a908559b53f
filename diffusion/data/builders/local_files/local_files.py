"""A tensorflow-datasets builder of whatever `readers` reads, under the config's name for it."""

import io
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow_datasets as tfds

from diffusion.data.builders.local_files.readers import Example, Files
from diffusion.wording import Progress

VERSION = "1.0.0"


def builder(name: str, files: Files, data_dir: str | pathlib.Path) -> Any:
    """The builder of data set `name` ("set" or "set/variant") from `files`."""
    set_name, _, variant = name.partition("/")

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Images that the user had on disk."""

        VERSION = tfds.core.Version(VERSION)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=variant)] if variant else []
        code_path = None  # see captioned_digits

        def _info(self) -> tfds.core.DatasetInfo:
            return self.dataset_info_from_configs(
                description=f"{name}, from the user's own files.", features=_features(files)
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {
                split: self._generate_examples(read, Progress(f"{split} examples", None))
                for split, read in files.splits.items()
            }

        def _generate_examples(
            self, read: Callable[[], Iterator[Example]], progress: Progress
        ) -> Iterator[tuple[int, Example]]:
            for row, example in enumerate(read()):
                yield row, {**example, "image": io.BytesIO(example["image"])}
                progress.at(row + 1)
            progress.close()

    Builder.name = set_name
    return Builder(data_dir=str(data_dir), file_format="array_record")


def _features(files: Files) -> tfds.features.FeaturesDict:
    kinds = {
        "image": tfds.features.Image(shape=files.shape),
        "label": tfds.features.ClassLabel(num_classes=files.classes),
        "caption": tfds.features.Text(),
    }
    return tfds.features.FeaturesDict({key: kinds[key] for key in files.keys})
