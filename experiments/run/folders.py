"""A config's folder of images: opened, and what is known of the images besides."""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from diffusion.data import annotations, folder, layouts, subjects
from experiments.run import fits


def opened(config: ConfigDict, split: str) -> folder.FolderSource:
    """The folder's split."""
    data = config.data
    if not data.dir:
        raise ValueError("data.dir is empty: name a folder of images, --config.data.dir=DIR")
    given = fits.side(config), data.channels, data.max_bad_images, fits.how(config, split)
    return folder.open_folder(data.dir, split, *given)


def told(config: ConfigDict, source: folder.FolderSource) -> list:
    """The transforms that crop, and add what else is known of the images: maps, boxes, prompts."""
    root, found = pathlib.Path(config.data.dir), fits.cropped(config, source)
    if config.task != "denoiser":  # others are told nothing
        return found
    if config.data.segments:
        maps = pathlib.Path(config.data.segments)
        found.append(annotations.Segments(maps, root, source.rows, fits.side(config)))
    if config.data.boxes:
        most = layouts.objects(config.model.text_encoder.max_length)
        file = pathlib.Path(config.data.boxes)
        found.append(
            annotations.Boxes.of(file, root, source.rows, most, config.conditioning.layout)
        )
    return found + _prompts(config, source)


def _prompts(config: ConfigDict, source: folder.FolderSource) -> list:
    """Of one subject: prompts in place of captions."""
    data, word = config.data, config.model.words.word if "words" in config.model else ""
    if data.prompts and source.captions is not None:
        raise ValueError(
            f"data.prompts={data.prompts} are for images without captions, but those of data.dir="
            f"{data.dir} have some: leave one of them out"
        )
    found: list[Any] = []
    if data.prompts:
        prompts = tuple(text.replace("{}", word) for text in data.prompts)
        if word and not all(word in text for text in prompts):
            raise ValueError(
                f"data.prompts={data.prompts} do not all name the word {word!r} that is learned: "
                "write {} where it stands"
            )
        found.append(subjects.Prompts(prompts, config.seed))
    return found


def prior(config: ConfigDict) -> list:
    """The transform that puts pictures of a subject's class into half of what is trained on: of no
    other stream, since samples are compared with the subject's alone."""
    data = config.data
    if not data.prior_dir:
        if data.prior_prompts or data.prior_weight != 1.0:
            raise ValueError(
                f"data.prior_prompts={data.prior_prompts} and data.prior_weight="
                f"{data.prior_weight} are of data.prior_dir, which is empty: name its folder"
            )
        return []
    if "latents" in config or data.name != "folder":
        raise ValueError(
            f"data.prior_dir={data.prior_dir} is of a folder of images, and is not stored with "
            "latents: set data.name='folder' and train online"
        )
    if not data.prompts or not data.prior_prompts or config.train.batch_size % 2:
        raise ValueError(
            f"data.prior_dir={data.prior_dir} needs data.prompts, data.prior_prompts and an even "
            f"train.batch_size, half of which is the class's, but they are {data.prompts}, "
            f"{data.prior_prompts} and {config.train.batch_size}: give them"
        )
    if data.prior_weight < 0:
        raise ValueError(f"data.prior_weight={data.prior_weight} must be at least 0")
    size = fits.side(config), data.channels, data.max_bad_images
    alike = fits.how(fits.centred(config), "train")  # of one framing; a crop is drawn of neither
    pictures = folder.open_folder(data.prior_dir, "train", *size, alike)
    prompts = tuple(data.prior_prompts)
    return [subjects.Prior(pictures, prompts, data.prior_weight, config.seed)]
