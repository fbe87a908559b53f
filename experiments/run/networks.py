"""The networks of a workdir: what sampling loads, and what another run starts from or keeps frozen.

A workdir has trained networks in checkpoints/, and each frozen one as a folder of its own beside
them: first_stage/ (the autoencoder), text_encoder/, teacher/, denoiser/ (under LoRA or a
ControlNet). A run with `init_from` copies what it keeps frozen into its own workdir, which is then
whole by itself.
"""

import dataclasses
import pathlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion import files, manifest, weights
from diffusion.checkpoint import restore_params
from diffusion.data.tokenizers import Tokenizer
from diffusion.models import lora
from diffusion.training import ema
from experiments.run import build, data, workdir

FOLDERS = {"autoencoder": "first_stage", "text_encoder": "text_encoder", "denoiser": "denoiser"}
FORMER = {"denoiser": "unet"}  # the folder in workdirs made before a denoiser was called so
# Fields of a network that its parameters do not depend on, or in their first values alone.
FREE = ("dtype", "remat", "dropout", "embedding_dropout", "parent", "name")
FREE += ("embedding_std", "condition_std")


@dataclasses.dataclass(frozen=True)
class Networks:
    """`params` by network, low-rank updates merged; `first_stage` is its module, if there is one.

    extra: latent shift and scale, among others. hash and step are those of the checkpoint.
    """

    config: ConfigDict
    params: dict[str, Any]
    extra: dict[str, Any]
    first_stage: Any
    tokenizer: Tokenizer | None
    hash: str
    step: int


def load(
    directory: str | pathlib.Path,
    which: str = "ema",
    step: int | None = None,
    flag: str = "--workdir",
    merged: bool = True,
    tasks: tuple[str, ...] = ("denoiser", "autoencoder"),
) -> Networks:
    """A run's newest checkpoint (or that of `step`) and frozen networks.

    which: "raw", "ema", or "ema_0.1": the average of that length, made of the run's checkpoints.
    Not `merged`: low-rank updates stay apart, as params["lora"].
    Raises ValueError for a folder without a run, a checkpoint, or the average asked for.
    """
    directory = pathlib.Path(directory)
    config = workdir.read_config(directory, flag)
    if config.task not in tasks:
        wanted = " or ".join(map(repr, tasks))
        raise ValueError(
            f"{flag}={directory} holds a run of task={config.task!r}: name one of {wanted}"
        )
    saved = restore_params(directory / "checkpoints", ("params", "ema", "extra"), step)
    params, made_from = dict(saved.items["params"]), saved.hash
    if which == "ema":
        params.update(saved.items["ema"])
    elif which.startswith("ema_"):
        length, tracked = float(which.removeprefix("ema_")), tuple(config.ema.profiles)
        average, made_from = _profile(directory / "checkpoints", tracked, length, saved.step)
        params.update(average)
    elif which != "raw":
        raise ValueError(f"--weights={which} is unknown: use ema or raw")
    first_stage = None
    for name in FOLDERS:
        if name in config.model and name not in params:
            params[name], described, _ = weights.load_weights(folder(directory, name))
            first_stage = (
                build.autoencoder(ConfigDict(described)) if name == "autoencoder" else first_stage
            )
    if config.task == "autoencoder":
        first_stage = build.autoencoder(config.model.autoencoder)
    if "lora" in params and merged:
        scale = build.lora(config).scale
        params["denoiser"] = lora.merge(params["denoiser"], params.pop("lora"), scale)
    if "words" in params and merged:
        new: Any = build.words(config)
        params = new.merged(params)
    path = directory / "tokenizer.json"
    tokenizer = Tokenizer.load(path) if build.reads_captions(config) else None
    return Networks(
        config, params, saved.items["extra"], first_stage, tokenizer, made_from, saved.step
    )


def _profile(
    checkpoints: pathlib.Path, tracked: tuple[float, ...], length: float, step: int
) -> tuple[dict[str, Any], str]:
    """The average of `length` at `step`, by network, of the checkpoints up to it; and their hash.

    Read one at a time: as much memory as two. ValueError where the run kept no profiles, or none
    on both sides of the length.
    """
    if not tracked:
        raise ValueError(
            f"--ema_length={length:g} is made of averages that were kept while training, but "
            "ema.profiles=() kept none: train with two, such as (0.05, 0.1)"
        )
    steps = [s for s in sorted(manifest.finished(checkpoints.absolute())) if s <= step]
    extras = [restore_params(checkpoints, ("extra",), s) for s in steps]
    done = [s - int(x.items["extra"]["skipped_steps"]) for s, x in zip(steps, extras)]
    snapshots = [(s, n, of) for s, n in zip(steps, done) if n for of in tracked]
    try:
        lengths, times = [of for *_, of in snapshots], [n for _, n, _ in snapshots]
        counts = ema.combination(lengths, times, length, done[-1])
    except ValueError as error:
        raise ValueError(f"--ema_{error}") from error
    total: Any = None
    for i, (at, _, of) in enumerate(snapshots):
        if i % len(tracked) == 0:
            stored = restore_params(checkpoints, ("profiles",), at).items["profiles"]
        part = jax.tree.map(lambda x, c=counts[i]: c * x, stored[ema.profile_name(of)])
        total = part if total is None else jax.tree.map(np.add, total, part)
    found = jax.tree.map(lambda x: x.astype(np.float32), total)
    return found, files.digest([extra.hash for extra in extras])[:16]


def folder(directory: pathlib.Path, name: str) -> pathlib.Path:
    """Where a workdir keeps a frozen network."""
    today = directory / FOLDERS.get(name, name)
    former = directory / FORMER.get(name, today.name)
    return former if former.is_dir() else today


@dataclasses.dataclass(frozen=True)
class Stage:
    """A first stage with its weights (the average where it has one), and the data it was for."""

    config: ConfigDict
    network: Any
    params: Any
    step: int
    hash: str


def load_stage(directory: pathlib.Path, step: int | None = None, flag: str = "--workdir") -> Stage:
    """Of a first stage's own run (the checkpoint of `step`, or the newest), or one kept frozen by a
    latent run or a converted pipeline.

    Raises ValueError for a run that has none.
    """
    config = data.images_config(workdir.read_config(directory, flag))
    if config.task == "autoencoder":
        saved = restore_params(directory / "checkpoints", ("params", "ema"), step)
        params = {**saved.items["params"], **saved.items["ema"]}["autoencoder"]
        found = saved.step, saved.hash
    elif "autoencoder" in config.model:
        params, _, sha256 = weights.load_weights(directory / "first_stage")
        found = 0, sha256[:16]
    else:
        raise ValueError(
            f"{flag}={directory} has no first stage: name a run of task='autoencoder', or of "
            "latent diffusion"
        )
    return Stage(config, build.autoencoder(config.model.autoencoder), params, *found)


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What a run takes from `init_from`: parameters to start from and to keep frozen, by network
    (of a ControlNet, those that it shares with the U-Net), and what goes with them."""

    start: dict[str, Any] = dataclasses.field(default_factory=dict)
    frozen: dict[str, Any] = dataclasses.field(default_factory=dict)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: Tokenizer | None = None

    def check(self, config: ConfigDict, directory: pathlib.Path) -> None:
        """ValueError where the run's own folder keeps others."""
        for name, params in self.frozen.items():
            weights.check_same(folder(directory, name), params, f"init_from={config.init_from}")

    def write(self, config: ConfigDict, directory: pathlib.Path) -> None:
        """The frozen networks into the run's own folder, once."""
        for name, params in self.frozen.items():
            path = folder(directory, name)
            if not (path / weights.WEIGHTS).exists():
                weights.save_weights(path, params, config.model[name].to_dict())


def begin(config: ConfigDict) -> Beginning:
    """Reads `init_from`. ValueError where it lacks what the config keeps frozen, or differs."""
    trained = build.trained(config)
    frozen = [name for name in FOLDERS if name in config.model and name not in trained]
    if config.data.name == "latents":
        frozen = [name for name in frozen if name != "autoencoder"]  # it comes with the latents
    if not config.init_from:
        if frozen or "teacher" in config.model:
            raise ValueError(
                f"init_from is empty, but the config keeps the {[*frozen, 'teacher'][0]} frozen: "
                "name a workdir that has one"
            )
        return Beginning()
    found = load(config.init_from, flag="--config.init_from")
    taken = config.init_networks or tuple(found.params)
    missing = [name for name in frozen if name not in found.params or name not in taken]
    if missing:
        raise ValueError(
            f"init_from={config.init_from} has no {missing[0]}, which the config keeps frozen: "
            "name a workdir that has one"
        )
    params = {name: tree for name, tree in found.params.items() if name in taken}
    if "controlnet" in trained and "controlnet" not in params:
        params["controlnet"] = _encoder(params["denoiser"])
    start = {name: params[name] for name in trained if name in params}
    for name in {*frozen, *start} & set(FOLDERS):
        _check_same(config, found.config, name)
    kept_frozen = {name: params[name] for name in frozen}
    if "teacher" in config.model:
        _check_same(config, found.config, "teacher")
        kept_frozen["teacher"] = found.params["denoiser"]
    kept = {k: v for k, v in found.extra.items() if k in ("latent_shift", "latent_scale")}
    tokenizer = found.tokenizer if "text_encoder" in params else None
    if "words" in trained:
        tokenizer, start["words"] = _new_word(config, tokenizer, params["text_encoder"])
    return Beginning(start, kept_frozen, kept, tokenizer)


def _new_word(config: ConfigDict, tokenizer: Tokenizer | None, encoder: Any) -> tuple[Any, Any]:
    """The tokenizer that knows the word to be learned, and the rows that it begins from."""
    new: Any = build.words(config)
    if tokenizer is None:
        raise ValueError(f"init_from={config.init_from} reads no captions: name one that does")
    tokens = tokenizer.backend.encode(new.start, add_special_tokens=False).ids
    if len(tokens) != 1:
        raise ValueError(
            f"model.words.start={new.start!r} is {len(tokens)} tokens, but must be one, "
            "whose row the new one begins from: give a common word, such as what it is a kind of"
        )
    row = np.asarray(encoder["token_embedding"]["embedding"])[tokens[0]]
    with build.naming("model.words"):
        grown = tokenizer.with_words({new.word: new.vectors})
    return grown, {"embedding": np.repeat(row[None], new.vectors, axis=0)}


def _encoder(network: dict[str, Any]) -> dict[str, Any]:
    """What a ControlNet copies of a U-Net (`models/controlnet.py`)."""
    decoder = ("up_", "norm_out", "conv_out")
    return {name: tree for name, tree in network.items() if not name.startswith(decoder)}


def _check_same(config: ConfigDict, other: ConfigDict, name: str) -> None:
    make = {
        "denoiser": build.denoiser_network,
        "text_encoder": build.text_encoder,
        "autoencoder": lambda c: build.autoencoder(c.model.autoencoder),
    }
    if name == "teacher":  # it was a denoiser there
        ours, theirs = build.teacher(config), build.denoiser_network(other)
    else:
        ours, theirs = make[name](config), make[name](other)
    if found := difference(ours, theirs):
        field, ours, theirs = found
        raise ValueError(
            f"init_from={config.init_from} has model.{name}.{field}={theirs}, but the config "
            f"says {ours}: use the same network in both"
        )


def difference(ours: Any, theirs: Any) -> tuple[str, Any, Any] | None:
    """The first field, with both values, in which two modules' parameters differ; None: in none."""
    for field in dataclasses.fields(ours):
        added = field.name in ("second_time", "guidance_width") and getattr(ours, field.name)
        if field.name not in FREE and not added:
            a, b = (getattr(module, field.name, None) for module in (ours, theirs))
            if isinstance(a, nn.Module) and isinstance(b, nn.Module):  # of two text encoders
                if found := difference(a, b):
                    return f"{field.name}.{found[0]}", *found[1:]
                continue
            if a != b and _said(ours, field.name) != _said(theirs, field.name):
                return field.name, a, b
    return None if type(ours) is type(theirs) else ("name", type(ours), type(theirs))


def _said(module: Any, field: str) -> Any:
    """A field's value in the one form of those that say the same."""
    value = getattr(module, field, None)
    if field in ("heads", "head_dim") and hasattr(module, "head_shape"):  # by number, or by width
        used = [*module.attention[:-1], module.attention[-1] or module.mid_attention]
        return [module.head_shape(level) for level, attends in enumerate(used) if attends]
    if hasattr(module, "per_level"):  # one value for all levels, or one a level
        return module.per_level(value)
    if field == "attention" and not value:  # () is nowhere
        return (False,) * len(module.multipliers)
    return module.latent_channels if field == "embed_channels" else value
