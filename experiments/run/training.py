"""Config to a run: its data opened and checked, its task, and what the loop is handed.

Everything that a config and its data can be wrong in raises ValueError here, before anything is
written.
"""

import dataclasses
import functools
import json
import logging
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import weights
from diffusion.data import (
    folder,
    latents,
    loader,
    sources,
    synthetic,
    transforms,
)
from diffusion.data.tokenizers import Tokenizer
from diffusion.interop.perceptual import SOURCES, load_lpips
from diffusion.training.parallel import Parallel, check_batch, make_mesh
from diffusion.training.state import TrainState
from experiments.run import build, captions, checks, networks

log = logging.getLogger(__name__)

# -- data ----------------------------------------------------------------------------------------


def open_images(config: ConfigDict, split: str) -> tuple[sources.Source, list]:
    """A data set of images and the transforms that make batches of it."""
    data = config.data
    fit = build.choose({"crop": data.image_size, "pad": None}, data.fit, "data.fit")
    if data.name == "signals":
        return synthetic.signals(data.examples, *data.image_size, config.seed, split), []
    if data.name in ("captioned_digits", "moving_digits", "recoloured_digits"):
        source = sources.open_source("captioned_digits", data.dir, split)
        if data.name == "moving_digits":
            frames, side, _ = data.image_size
            return source, [synthetic.MoveDigits.of(source, frames, side, config.seed)]
        compose = transforms.ComposeDigits.of(source, config.seed, data.compose_held_out)
        if data.name == "recoloured_digits":
            return source, [transforms.RecolourDigits(compose, data.colour)]
        return source, [compose]
    if data.name == "folder":
        if not data.dir:
            raise ValueError("data.dir is empty: name a folder of images, --config.data.dir=DIR")
        return folder.open_folder(
            data.dir, split, data.image_size, data.channels, data.max_bad_images
        ), []
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
    start: dict[str, Any] = dataclasses.field(default_factory=dict)  # of `init_from`

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
    checks.check(config)
    _check_numbers(config)
    try:
        placed = parallel(config)
        make = _latent_run if config.data.name == "latents" else _image_run
        return make(config, placed)
    except (ValueError, OSError):
        raise
    except Exception as error:  # of a network, a schedule, ... that no check of ours foresaw
        log.debug("no run", exc_info=True)
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        raise ValueError(f"the config builds no run ({reason}): undo what was set last") from error


def _image_run(config: ConfigDict, placed: Parallel) -> Run:
    begun = networks.begin(config) if config.task == "denoiser" else networks.Beginning()
    frozen = {**begun.frozen, **perceptual_weights(config)}
    source, steps = open_images(config, "train")
    tokenizer, tokens, extra = None, (), begun.extra
    if "text_encoder" in config.model:
        tokenizer = begun.tokenizer or captions.make_tokenizer(
            config.online.tokenizer, source, steps
        )
        tokens = null_tokens(config, tokenizer)
        captions.count_cut(source, steps, tokenizer, len(tokens))
    if "online" in config and not extra:
        channels = build.sample_shape(config)[-1]
        scale = np.full(channels, config.online.scale, np.float32)
        extra = {"latent_shift": np.zeros_like(scale), "latent_scale": scale}
    ends = _ends(config, tokenizer, len(tokens))
    made = build.task(config, **({"null_tokens": tokens} if tokenizer else {}))
    _check_image(source, [*steps, *ends], build.image_shape(config))

    def eval_batches(process_index=0, process_count=1):
        held, held_steps = open_images(config, config.data.eval_split)
        stop = min(config.evaluation.examples or len(held), len(held))
        size, where = _eval_size(config, placed), (process_index, process_count)
        return loader.one_pass(held, size, [*held_steps, *ends], *where, stop=stop)

    def write_files(directory: pathlib.Path) -> None:
        begun.write(config, directory)
        if tokenizer is not None and not (directory / "tokenizer.json").exists():
            tokenizer.save(directory / "tokenizer.json")

    return Run(
        config,
        made,
        placed,
        functools.partial(made.init, **{k: jnp.asarray(v) for k, v in extra.items()}),
        frozen,
        lambda: batches(config, source, [*steps, *ends]),
        eval_batches,
        write_files,
        begun.start,
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


def _ends(config: ConfigDict, tokenizer: Tokenizer | None, length: int) -> list:
    """The transforms that come last: tokens, control pictures, and nothing that is not used."""
    ends: list = []
    if tokenizer is not None:
        ends.append(transforms.Tokenize(tokenizer, length))
    if config.task == "denoiser" and "controlnet" in config.model:
        _check_hints(config)
        kinds = {"edges": transforms.Edges()}
        ends.append(build.choose(kinds, config.conditioning.control, "conditioning.control"))
    return [*ends, transforms.Keep(("image", "label", "tokens", "hint"))]


def _check_hints(config: ConfigDict) -> None:
    """Control pictures are as large as the images; the ControlNet makes them as small as x."""
    widths = tuple(config.model.controlnet.hint_widths)
    factor = build.image_shape(config)[0] // build.sample_shape(config)[0]
    if 2 ** (len(widths) - 1) != factor:
        raise ValueError(
            f"model.controlnet.hint_widths={widths} makes pictures {2 ** (len(widths) - 1)} times "
            f"smaller, but what is diffused is {factor} times smaller than the images: give it "
            f"{factor.bit_length()} widths"
        )


def _latent_run(config: ConfigDict, placed: Parallel) -> Run:
    if "controlnet" in config.model:
        raise ValueError("model.controlnet is given images, but data.name='latents' has none")
    begun, tokens = networks.begin(config), ()
    source = latents.LatentSource(config.data.dir, latent_identity(config, begun))
    directory = pathlib.Path(config.data.dir)
    if "text_encoder" in config.model:
        tokens = null_tokens(config, Tokenizer.load(directory / "tokenizer.json"))
    made = build.task(config, **({"null_tokens": tokens} if tokens else {}))

    def write_files(workdir: pathlib.Path) -> None:
        begun.write(config, workdir)
        if tokens and not (workdir / "tokenizer.json").exists():
            Tokenizer.load(directory / "tokenizer.json").save(workdir / "tokenizer.json")
        if not (workdir / "first_stage" / weights.WEIGHTS).exists():
            copy = workdir / ".first_stage.tmp"  # killed amid the copy, it is made again
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(directory / "first_stage", copy)
            shutil.rmtree(workdir / "first_stage", ignore_errors=True)
            copy.rename(workdir / "first_stage")

    def init(key):
        return made.init(key, jnp.asarray(source.shift), jnp.asarray(source.scale))

    context = ("context",) if config.latents.contexts else ()
    keep = transforms.Keep(("mean", "logvar", "tokens", *context, "label"))
    return Run(
        config,
        made,
        placed,
        init,
        begun.frozen,
        lambda: batches(config, source, [keep]),
        lambda *where: loader.one_pass(
            source,
            _eval_size(config, placed),
            [keep],
            *where,
            stop=config.evaluation.examples or None,
        ),
        write_files,
        begun.start,
    )


def latent_identity(config: ConfigDict, begun: networks.Beginning) -> dict[str, Any]:
    """What the provenance of a config's latents must say."""
    made_from: dict[str, Any] = {
        "data": config.latents.data_name,
        "epochs": config.latents.epochs,
        "image_size": config.data.image_size,
        "autoencoder": json.loads(json.dumps(config.model.autoencoder.to_dict())),
    }
    if text := begun.frozen.get("text_encoder"):
        # Tokens are its tokenizer's, and what may be stored of it is its own.
        made_from["tokenizer"] = begun.tokenizer.sha256 if begun.tokenizer else None
        if config.latents.contexts:
            made_from["text_encoder"] = weights.params_hash(text)
    elif config.latents.contexts:
        raise ValueError(
            "latents.contexts=True is of a frozen text encoder, but the config has none: set it to "
            "False"
        )
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
    at_least_one = ("steps", "batch_size", "accumulate", "log_every_steps", "save_every_steps")
    for section, keys, least in (
        ("train", (*at_least_one, "keep_checkpoints"), 1),
        ("train", ("keep_every_steps",), 0),
        ("evaluation", ("batch_size",), 1),
        ("evaluation", ("every_steps", "examples", "preview"), 0),
    ):
        for key in keys:
            if config[section][key] < least:
                raise ValueError(f"{section}.{key}={config[section][key]} must be at least {least}")
    spikes = config.train.max_loss_deviations
    if spikes and config.task == "autoencoder" and config.loss.adversarial:
        raise ValueError(
            f"train.max_loss_deviations={spikes} takes the discriminator's start, a leap that "
            "lasts, for a spike: set it to 0"
        )
    if config.train.keep_best and not config.evaluation.every_steps:
        raise ValueError(
            f"train.keep_best={config.train.keep_best!r} needs evaluations: set "
            "evaluation.every_steps, best to train.save_every_steps"
        )


def _check_image(source: Any, steps: list, shape: tuple[int, ...]) -> None:
    first = loader.fetch(source, *(np.zeros(1, np.int64),) * 3, steps)
    found = first["image"].shape[1:]
    if found != shape:
        raise ValueError(
            f"data.image_size and data.channels say {shape}, but the images of "
            f"data.dir are {found}: set them to that"
        )
