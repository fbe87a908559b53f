"""Streams a data set through a first stage and stores the latents, with where they came from.

    python -m experiments.encode_latents --config=configs/X_ldm.py

Reads `config.latents`: the data set, the first stage's workdir, how many epochs of compositions;
writes shards, the tokenizer, a copy of the first stage and provenance.json to `config.data.dir`.
Run again, it goes on with the shards that are missing. With `latents.contexts` a shard also holds
what the frozen text encoder of `init_from` makes of each caption, as float16.
"""

import math
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from diffusion import weights
from diffusion.data import latents, loader, transforms
from diffusion.training import codec
from diffusion.training.parallel import BATCH, make_mesh
from diffusion.wording import Progress
from experiments.host import cli, cluster
from experiments.run import assemble, build, data, given, networks


def encode(config: ConfigDict) -> dict:
    """Writes the latents of `config` to `config.data.dir`; returns their provenance."""
    if "latents" not in config:
        raise ValueError("the config has no `latents` section: use one of a latent diffusion model")
    section = config.latents
    if not section.data_dir:
        raise ValueError("latents.data_dir is empty: give --config.latents.data_dir=IMAGES")
    scaling = latents.Scaling(section.scaling, section.scale, section.scaling_examples)
    stage, begun = find_first_stage(config), networks.begin(config)
    if cluster.is_first():
        print(f"first stage: {config.latents.first_stage}, {stage.step:,} steps", flush=True)
    identity = assemble.latent_identity(config, begun)["made_from"]
    source, steps = data.open_images(data.images_config(config), "train")
    words = _words(config, begun, source, steps)
    made_from = {**identity, "first_stage": stage.hash}
    if words is not None:
        made_from["tokenizer"] = words.sha256
    made_from |= {"data_sha256": source.provenance["sha256"], "seed": config.seed}
    plan = latents.Plan(
        pathlib.Path(config.data.dir),
        len(source) * section.epochs,
        section.shard_size,
        _fields(config, words),
        made_from,
    )
    cluster.together(lambda: cluster.is_first() and _begin(plan, stage, words))
    pipeline = [*steps]
    if config.data.flip:
        pipeline.append(transforms.FlipOddEpochs())
    pipeline.extend(given.joined(config))
    if words is not None:
        pipeline.append(transforms.Tokenize(words, build.caption_length(config)))
    # Each process encodes shards of its own, on its own devices.
    mesh = make_mesh(devices=[d for d in jax.devices() if d.process_index == jax.process_index()])
    size = math.ceil(section.batch_size / mesh.size) * mesh.size
    columns = _encoder(config, stage, begun, words, mesh)
    progress = Progress("latents", plan.count, silent=not cluster.is_first())
    for shard in plan.missing(jax.process_index(), jax.process_count()):
        rows: dict[str, list[np.ndarray]] = {name: [] for name in plan.fields}
        of_shard = {"epochs": section.epochs, "start": shard.start, "stop": shard.stop}
        for batch in loader.ahead(loader.one_pass(source, size, pipeline, **of_shard)):
            found = {**batch, **columns(batch)}
            for name in plan.fields:
                rows[name].append(np.asarray(found[name])[batch["valid"]])
        latents.write_shard(plan, shard, {k: np.concatenate(v) for k, v in rows.items()})
        progress.at(shard.stop)
    progress.close()
    cluster.together(lambda: None)  # every shard is there
    cluster.together(lambda: cluster.is_first() and latents.finish(plan, scaling))
    return latents.finish(plan, scaling)


def _words(config: ConfigDict, begun: networks.Beginning, source: Any, steps: list) -> Any:
    """The tokenizer of the captions: a frozen text encoder's, or one made of them; None: none."""
    if not build.reads_captions(config):
        return None
    frozen = begun.tokenizer if "text_encoder" in begun.frozen else None
    words = frozen or data.make_tokenizer(config.latents.tokenizer, source, steps)
    data.count_cut(source, steps, words, build.caption_length(config))
    return words


def _fields(config: ConfigDict, words: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What an example has on disk."""
    shape = build.sample_shape(config)
    fields: dict[str, tuple[str, tuple[int, ...]]] = {"mean": ("float16", shape)}
    if config.model.autoencoder.name == "kl":
        fields["logvar"] = ("float16", shape)
    if words is not None:
        length = build.caption_length(config)
        fields["tokens"] = ("int16" if words.vocabulary_size < 2**15 else "int32", (length,))
        if config.latents.contexts:
            fields["context"] = ("float16", (length, config.model.text_encoder.width))
    if data.sized(config):
        fields["sizes"] = ("int32", (6,))
    if build.null_label(config) is not None:
        fields["label"] = ("int32", ())
    if config.conditioning.layout:
        fields["tokens"] = ("int32", (config.model.text_encoder.max_length,))
    kind, side = config.conditioning.concat, build.image_shape(config)[0]
    if kind == "low_resolution":
        fields["small"] = ("uint8", (given.small_size(config),) * 2 + (config.data.channels,))
    elif kind == "semantic":
        fields["segments"] = ("uint8", (side, side))
    elif kind:
        fields |= {"masked": ("float16", shape), "mask": ("uint8", (*shape[:2], 1))}
    return fields


def _begin(plan: latents.Plan, stage: networks.Stage, words: Any) -> None:
    plan.begin()
    if not (plan.directory / "first_stage" / weights.WEIGHTS).exists():
        described = stage.config.model.autoencoder.to_dict()
        weights.save_weights(plan.directory / "first_stage", stage.params, described)
        if words is not None:
            words.save(plan.directory / "tokenizer.json")


def _encoder(
    config: ConfigDict, stage: networks.Stage, begun: networks.Beginning, words: Any, mesh: Mesh
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A batch to the columns that networks make of it."""
    network = build.autoencoder(config.model.autoencoder)
    text = given.text(config, data.null_tokens(config, words)) if words is not None else None
    frozen = {k: v for k, v in begun.frozen.items() if k == "text_encoder"}
    placed = jax.device_put((stage.params, frozen), NamedSharding(mesh, PartitionSpec()))
    contexts = text is not None and config.latents.contexts

    @jax.jit
    def run(params, frozen, batch):
        found = network.apply({"params": params}, codec.signed(batch["image"]), method="encode")
        columns = {"mean": found.mean, "logvar": found.logvar}
        if "mask" in batch:
            encode = lambda x: network.apply({"params": params}, x, method="encode").mean  # noqa: E731
            columns["masked"] = given.concat(config).ready(batch, encode, {})["masked"]
            columns["mask"] = batch["mask"][:, :: network.downsampling, :: network.downsampling]
        if contexts:
            columns["context"] = text.encode(frozen, {"tokens": batch["tokens"]})["context"]
        return columns

    def columns(batch):
        read = {k: batch[k] for k in ("image", "tokens", "mask") if k in batch}
        return run(*placed, jax.device_put(read, NamedSharding(mesh, BATCH)))

    return columns


def find_first_stage(config: ConfigDict) -> networks.Stage:
    """The first stage that `latents.first_stage` names: its own run, or any workdir that has one.

    Raises ValueError when there is none, or its model is not the config's.
    """
    directory = pathlib.Path(config.latents.first_stage)
    stage = networks.load_stage(directory, flag="--config.latents.first_stage")
    wanted = build.autoencoder(config.model.autoencoder)
    if found := networks.difference(wanted, stage.network):
        key, ours, theirs = found
        raise ValueError(
            f"latents.first_stage={directory} was trained with model.autoencoder.{key}={theirs},"
            f" but the config says {ours}: use the same first stage in both"
        )
    return stage


def define(add: cli.Flags) -> None:
    add.config("A config of latent diffusion.")
    cluster.define(add)


@cluster.joined
def main(values: flags.FlagValues) -> None:
    config = cli.require(values, "config")
    made = encode(config)
    if not cluster.is_first():
        return
    std = ", ".join(f"{value:.3f}" for value in made["statistics"]["std"])
    print(f"{made['count']} latents in {config.data.dir}, per-channel std {std}")


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
