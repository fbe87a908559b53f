"""Config to a run: its data opened and checked, its task, and what the loop is handed.

Everything that a config and its data can be wrong in raises ValueError here, before anything is
written.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import weights
from diffusion.data import latents, loader, sources, synthetic, transforms
from diffusion.data.tokenizers import Tokenizer
from diffusion.interop.perceptual import SOURCES, load_lpips
from diffusion.training.parallel import Parallel, check_batch, make_mesh
from diffusion.training.state import TrainState
from experiments import build

# -- data ----------------------------------------------------------------------------------------


def open_images(config: ConfigDict, split: str) -> tuple[sources.Source, list]:
    """A data set of images and the transforms that make batches of it."""
    data = config.data
    fit = build.choose({"crop": data.image_size, "pad": None}, data.fit, "data.fit")
    if data.name == "signals":
        return synthetic.signals(data.examples, *data.image_size, config.seed, split), []
    if data.name in ("captioned_digits", "moving_digits"):
        source = sources.open_source("captioned_digits", data.dir, split)
        if data.name == "moving_digits":
            frames, side, _ = data.image_size
            return source, [synthetic.MoveDigits.of(source, frames, side, config.seed)]
        compose = transforms.ComposeDigits.of(source, config.seed, data.compose_held_out)
        return source, [compose]
    source = sources.open_source(data.name, data.dir, split, fit)
    pad = [transforms.PadImage(data.image_size)] if data.fit == "pad" else []
    return source, [*pad, transforms.Channels(data.channels)]


def batches(config: ConfigDict, source: Any, steps: list) -> loader.Loader:
    """The training stream of this process."""
    return loader.Loader(
        source,
        config.train.batch_size,
        config.seed,
        steps,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


# -- a run ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """What `experiments/train.py` needs, whichever the task."""

    config: ConfigDict
    task: Any
    parallel: Parallel
    init: Callable[[jax.Array], TrainState]
    frozen: dict[str, Any]
    train_batches: Callable[[], loader.Loader]
    eval_batches: Callable[..., Iterator[dict[str, np.ndarray]]]
    write_files: Callable[[pathlib.Path], None]

    def evaluate(self, state: TrainState, frozen: dict[str, Any]) -> dict[str, float]:
        """Means over the evaluation split, named eval_*; each process reads its rows."""
        totals: dict[str, float] = {}
        for batch in self.eval_batches(jax.process_index(), jax.process_count()):
            sums = _eval_step(self.task)(state, self.parallel.rows(batch), frozen)
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        count = totals.pop("count")
        means = {name: value / count for name, value in totals.items()}
        if hasattr(self.task, "summarise"):
            means = self.task.summarise(means)
        return {f"eval_{name}": value for name, value in means.items()}


_EVAL_STEPS: dict[int, Callable] = {}


def _eval_step(of: Any) -> Callable:
    # One compilation a task object, however often it is evaluated.
    return _EVAL_STEPS.setdefault(id(of), jax.jit(of.eval_step))


def _eval_size(config: ConfigDict, placed: Parallel) -> int:
    """evaluation.batch_size, rounded up to what the devices divide."""
    return -(-config.evaluation.batch_size // placed.devices) * placed.devices


def parallel(config: ConfigDict) -> Parallel:
    made = Parallel(config.parallel.mode, make_mesh(config.parallel.data, config.parallel.fsdp))
    check_batch(config.train.batch_size, config.train.accumulate, made.devices)
    return made


def build_run(config: ConfigDict) -> Run:
    """Opens the data and makes the task. Raises ValueError for whatever does not fit."""
    _check_numbers(config)
    placed = parallel(config)
    if config.data.name == "latents":
        return _latent_run(config, placed)
    made = build.task(config)
    frozen = perceptual_weights(config)
    source, steps = open_images(config, "train")
    keep = transforms.Keep(("image", "label"))
    _check_image(source, [*steps, keep], made.sample_shape)

    def eval_batches(process_index=0, process_count=1):
        held, held_steps = open_images(config, config.data.eval_split)
        stop = min(config.evaluation.examples or len(held), len(held))
        size, where = _eval_size(config, placed), (process_index, process_count)
        return loader.one_pass(held, size, [*held_steps, keep], *where, stop=stop)

    return Run(
        config,
        made,
        placed,
        made.init,
        frozen,
        lambda: batches(config, source, [*steps, keep]),
        eval_batches,
        lambda directory: None,
    )


def perceptual_weights(config: ConfigDict) -> dict[str, Any]:
    """The frozen networks of a first stage's loss: LPIPS, where it counts."""
    if config.task != "autoencoder" or not config.loss.perceptual_weight:
        return {}
    section = config.perceptual
    for key in ("vgg", "heads"):
        if not section[key]:
            raise ValueError(
                f"perceptual.{key} is empty, but loss.perceptual_weight="
                f"{config.loss.perceptual_weight}: fetch {SOURCES} and give --config.perceptual.vgg"
                " and --config.perceptual.heads, or --config.loss.perceptual_weight=0 to go without"
            )
    params, hashes = load_lpips(**section)
    print(f"LPIPS: vgg {hashes['vgg']}, heads {hashes['heads']}", flush=True)
    return {"perceptual": params}


def _latent_run(config: ConfigDict, placed: Parallel) -> Run:
    source = latents.LatentSource(config.data.dir, latent_identity(config))
    directory = pathlib.Path(config.data.dir)
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    made = build.task(config, null_tokens=null_tokens(config, tokenizer))

    def write_files(workdir: pathlib.Path) -> None:
        if not (workdir / "first_stage" / weights.WEIGHTS).exists():
            shutil.copytree(directory / "first_stage", workdir / "first_stage", dirs_exist_ok=True)
            shutil.copy(directory / "tokenizer.json", workdir / "tokenizer.json")

    def init(key):
        return made.init(key, jnp.asarray(source.shift), jnp.asarray(source.scale))

    keep = transforms.Keep(("mean", "logvar", "tokens"))
    return Run(
        config,
        made,
        placed,
        init,
        {},
        lambda: batches(config, source, [keep]),
        lambda *where: loader.one_pass(
            source,
            _eval_size(config, placed),
            [keep],
            *where,
            stop=config.evaluation.examples or None,
        ),
        write_files,
    )


def latent_identity(config: ConfigDict) -> dict[str, Any]:
    """What the provenance of a config's latents must say."""
    made_from = {
        "data": config.latents.data_name,
        "epochs": config.latents.epochs,
        "image_size": config.data.image_size,
        "autoencoder": json.loads(json.dumps(config.model.autoencoder.to_dict())),
    }
    return {"made_from": made_from}


def null_tokens(config: ConfigDict, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The encoded empty caption, once the tokenizer is known to fit the text encoder."""
    text = config.model.text_encoder
    if tokenizer.vocabulary_size > text.vocab_size:
        raise ValueError(
            f"model.text_encoder.vocab_size={text.vocab_size} is under the tokenizer's "
            f"{tokenizer.vocabulary_size} words: raise it to that"
        )
    return tuple(int(token) for token in tokenizer.null(text.max_length))


def _check_numbers(config: ConfigDict) -> None:
    for key in ("steps", "batch_size", "accumulate", "log_every_steps", "save_every_steps"):
        if config.train[key] < 1:
            raise ValueError(f"train.{key}={config.train[key]} must be at least 1")


def _check_image(source: Any, steps: list, shape: tuple[int, ...]) -> None:
    first = loader.fetch(source, *(np.zeros(1, np.int64),) * 3, steps)
    found = first["image"].shape[1:]
    if found != shape:
        raise ValueError(
            f"data.image_size and data.channels say {shape}, but the images of "
            f"data.dir are {found}: set them to that"
        )
