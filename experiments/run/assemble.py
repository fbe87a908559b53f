"""Config to a run: its data opened and checked, its task, and what the loop is handed.

Everything that a config and its data can be wrong in raises ValueError here, before anything is
written.
"""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import files, weights
from diffusion.data import folder, latents, loader, transforms
from diffusion.data.sources import Batch
from diffusion.data.tokenizers import Tokenizer
from diffusion.interop.perceptual import SOURCES, load_lpips
from diffusion.training.parallel import Parallel, check_batch, make_mesh
from diffusion.training.state import TrainState
from experiments.host import cli
from experiments.run import aligned, build, checks, data, fits, folders, given, networks, tasks

# What joins x_t's channels, and what Stable Diffusion XL is told of a picture.
TOLD = ("small", "mask", "segments", "past", "sizes")


@dataclasses.dataclass(frozen=True)
class Run:
    """What `experiments/train.py` needs, whichever the task.

    data, held_out: a source and the transforms that make batches of it; of the training split, and
    a function to those of the evaluation split.
    arguments: of the task's `init`. start: parameters from `init_from`, by network. check_files:
    ValueError where a workdir keeps other networks, or another tokenizer, than are given now;
    write_files writes what it does not keep yet.
    """

    config: ConfigDict
    task: Any
    parallel: Parallel
    data: tuple[Any, list]
    held_out: Callable[[], tuple[Any, list]]
    frozen: dict[str, Any]
    arguments: dict[str, Any]
    start: dict[str, Any]
    check_files: Callable[[pathlib.Path], None]
    write_files: Callable[[pathlib.Path], None]

    def init(self, key: jax.Array) -> TrainState:
        return self.task.init(key, **{k: jnp.asarray(v) for k, v in self.arguments.items()})

    def train_batches(self) -> loader.Loader:
        """The training stream of this process."""
        (source, steps), where = self.data, (jax.process_index(), jax.process_count())
        return loader.Loader(source, self.config.train.batch_size, self.config.seed, steps, *where)

    def eval_batches(self, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """The evaluation split once, in batches that the devices divide."""
        source, steps = self.held_out()
        wanted, devices = self.config.evaluation, self.parallel.devices
        size = -(-wanted.batch_size // devices) * devices
        stop = min(wanted.examples or len(source), len(source))
        return loader.one_pass(source, size, steps, process_index, process_count, stop=stop)


def parallel(config: ConfigDict) -> Parallel:
    made = Parallel(config.parallel.mode, make_mesh(config.parallel.data, config.parallel.fsdp))
    check_batch(config.train.batch_size, config.train.accumulate, made.devices)
    return made


def build_run(config: ConfigDict, directory: pathlib.Path | None = None) -> Run:
    """Opens the data and makes the task. Raises ValueError for whatever does not fit, what the
    workdir `directory` keeps already included."""
    checks.check(config)
    try:
        placed = parallel(config)
        make = _latent_run if config.data.name == "latents" else _image_run
        run = make(config, placed)
        if directory is not None:
            run.check_files(directory)
        return run
    except (ValueError, OSError):
        raise
    except Exception as error:  # of a network, a schedule, ... that no check of ours foresaw
        raise cli.bug("the config builds no run", error) from error


def _begun(config: ConfigDict) -> networks.Beginning:
    return networks.begin(config) if config.task == "denoiser" else networks.Beginning()


def _image_run(config: ConfigDict, placed: Parallel) -> Run:
    begun = _begun(config)
    frozen = {**begun.frozen, **perceptual_weights(config), **aligned.frozen(config)}
    source, steps = data.open_images(config, "train")
    steps = [*steps, *folders.prior(config)]
    tokenizer, tokens, extra = None, (), begun.extra
    if build.reads_captions(config):
        tokenizer = begun.tokenizer or data.make_tokenizer(config.online.tokenizer, source, steps)
        tokens = data.null_tokens(config, tokenizer)
        data.count_cut(source, steps, tokenizer, len(tokens))
    if "online" in config and not extra:
        channels = build.sample_shape(config)[-1]
        scale = np.full(channels, config.online.scale, np.float32)
        extra = {"latent_shift": np.zeros_like(scale), "latent_scale": scale}
    ends = _ends(config, tokenizer, len(tokens))
    made = tasks.task(config, **({"null_tokens": tokens} if tokenizer else {}))
    _check_example(config, made, source, [*steps, *ends])

    @functools.cache
    def held_out():
        held, held_steps = data.open_images(config, config.data.eval_split)
        return held, [*held_steps, *ends]

    if config.evaluation.every_steps:
        held_out()  # a split that is missing is refused now, not after thousands of steps

    features = aligned.identity(frozen)

    def check_files(directory: pathlib.Path) -> None:
        begun.check(config, directory)
        aligned.check_kept(config, directory, features)
        given_by = f"init_from={config.init_from}" if begun.tokenizer else None
        _check_tokenizer(directory, tokenizer, given_by or f"data.dir={config.data.dir}")

    def write_files(directory: pathlib.Path) -> None:
        begun.write(config, directory)
        if tokenizer is not None and not (directory / "tokenizer.json").exists():
            tokenizer.save(directory / "tokenizer.json")
        if features:
            files.write_json(directory / aligned.KEPT, features)

    stream = source, [*steps, *ends]
    of_files = check_files, write_files
    return Run(config, made, placed, stream, held_out, frozen, extra, begun.start, *of_files)


def _check_tokenizer(directory: pathlib.Path, tokenizer: Tokenizer | None, of: str) -> None:
    path = directory / "tokenizer.json"
    if tokenizer is not None and path.exists() and Tokenizer.load(path).sha256 != tokenizer.sha256:
        raise ValueError(
            f"{path} is the tokenizer that the run was begun with, but {of} has another now: give "
            "that again, or use another --workdir"
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
    if config.task == "denoiser":
        ends.extend(given.joined(config))
    return [*ends, transforms.Keep(("image", "label", "tokens", "hint", "weight", *TOLD))]


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
    begun, tokenizer, tokens = _begun(config), None, ()
    source = latents.LatentSource(config.data.dir, latent_identity(config, begun))
    directory = pathlib.Path(config.data.dir)
    if build.reads_captions(config):
        tokenizer = Tokenizer.load(directory / "tokenizer.json")
        tokens = data.null_tokens(config, tokenizer)
    made = tasks.task(config, **({"null_tokens": tokens} if tokens else {}))

    def check_files(workdir: pathlib.Path) -> None:
        begun.check(config, workdir)
        _check_tokenizer(workdir, tokenizer, f"data.dir={directory}")
        if (workdir / "first_stage" / weights.WEIGHTS).exists():
            params, _, _ = weights.load_weights(directory / "first_stage")
            weights.check_same(workdir / "first_stage", params, f"data.dir={directory}")

    def write_files(workdir: pathlib.Path) -> None:
        begun.write(config, workdir)
        if tokenizer is not None and not (workdir / "tokenizer.json").exists():
            tokenizer.save(workdir / "tokenizer.json")
        if not (workdir / "first_stage" / weights.WEIGHTS).exists():
            with files.whole_folder(workdir / "first_stage", weights.FILES) as copy:
                shutil.copytree(directory / "first_stage", copy, dirs_exist_ok=True)

    context = ("context",) if config.latents.contexts else ()
    names = ("mean", "logvar", "tokens", *context, "label", "masked", *TOLD)
    stream = source, [transforms.Keep(names)]
    scaling = {"latent_shift": source.shift, "latent_scale": source.scale}
    return Run(
        config,
        made,
        placed,
        stream,
        lambda: stream,
        begun.frozen,
        scaling,
        begun.start,
        check_files,
        write_files,
    )


def latent_identity(config: ConfigDict, begun: networks.Beginning) -> dict[str, Any]:
    """What the provenance of a config's latents must say. ValueError for what they cannot hold."""
    folders.prior(config)
    made_from: dict[str, Any] = {
        "data": config.latents.data_name,
        "epochs": config.latents.epochs,
        "image_size": config.data.image_size,
        "autoencoder": config.model.autoencoder.to_dict(),
    }
    made_from |= fits.changed(config) | ({"sizes": True} if data.sized(config) else {})
    if config.data.prompts:
        made_from["prompts"] = list(config.data.prompts)
    if config.task == "denoiser" and given.reads(config):
        names = ("concat", "downscale", "degradation", "masks", "layout")
        made_from["conditioning"] = {name: config.conditioning[name] for name in names}
    if text := begun.frozen.get("text_encoder"):
        # Tokens are its tokenizer's, and what may be stored of it is its own.
        made_from["tokenizer"] = begun.tokenizer.sha256 if begun.tokenizer else None
        if config.latents.contexts:
            made_from["text_encoder"] = weights.params_hash(text)
        other = [name for name in ("text_encoder_2", "words") if name in config.model]
        if config.latents.contexts and other:
            raise ValueError(
                "latents.contexts=True stores what one frozen text encoder puts out, but "
                f"model.{other[0]} is there: set it to False"
            )
    elif config.latents.contexts:
        raise ValueError(
            "latents.contexts=True is of a frozen text encoder, but the config has none: set it to "
            "False"
        )
    return {"made_from": made_from}


def _check_example(config: ConfigDict, task: Any, source: Any, steps: list) -> None:
    """The first example has the shape and the label that the task reads."""
    first = loader.fetch(source, *(np.zeros(1, np.int64),) * 3, steps)
    found, shape = first["image"].shape[1:], build.image_shape(config)
    if found != shape:
        raise ValueError(
            f"data.image_size and data.channels say {shape}, but the images of "
            f"data.dir are {found}: set them to that"
        )
    classes = None
    if config.task == "classifier":
        classes = task.network.classes
    elif config.task == "denoiser":
        classes = build.null_label(config)  # the classes before it
    if classes is None:
        return
    if "label" not in first:
        raise ValueError(
            f"the config tells {classes} classes apart, but the data of data.dir={config.data.dir} "
            "have no labels: give data that have some, such as a folder of a sub-folder a class"
        )
    if isinstance(source, folder.FolderSource) and source.classes > classes:
        raise ValueError(
            f"data.dir={config.data.dir} has images of {source.classes} classes, but the config "
            f"tells {classes} apart: leave some out, or give the network as many"
        )
