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

import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from diffusion import weights
from diffusion.data import latents, loader, transforms
from diffusion.training import codec
from diffusion.training.parallel import BATCH, make_mesh
from diffusion.wording import Progress
from experiments.evaluate import reconstructions
from experiments.host import cli, cluster
from experiments.run import build, data, networks, training


def encode(config: ConfigDict) -> dict:
    """Writes the latents of `config` to `config.data.dir`; returns their provenance."""
    if "latents" not in config:
        raise ValueError("the config has no `latents` section: use one of a latent diffusion model")
    out = pathlib.Path(config.data.dir)
    section = config.latents
    if not section.data_dir:
        raise ValueError("latents.data_dir is empty: give --config.latents.data_dir=IMAGES")
    scaling = latents.Scaling(section.scaling, section.scale, section.scaling_examples)
    stage = find_first_stage(config)
    network, params = build.autoencoder(config.model.autoencoder), stage.params
    begun = networks.begin(config)
    identity = training.latent_identity(config, begun)["made_from"]
    source, steps = data.open_images(data.images_config(config), "train")
    count = len(source) * section.epochs
    shape = build.sample_shape(config)
    fields: dict = {"mean": ("float16", shape)}
    if config.model.autoencoder.name == "kl":
        fields["logvar"] = ("float16", shape)
    pipeline, tokenizer, hashes = [*steps], None, {}
    if config.data.flip:
        pipeline.append(transforms.FlipOddEpochs())
    if "text_encoder" in config.model:
        length = config.model.text_encoder.max_length
        tokenizer = begun.tokenizer if "text_encoder" in begun.frozen else None
        tokenizer = tokenizer or data.make_tokenizer(section.tokenizer, source, steps)
        null = data.null_tokens(config, tokenizer)
        data.count_cut(source, steps, tokenizer, length)
        kind = "int16" if tokenizer.vocabulary_size < 2**15 else "int32"
        fields["tokens"], hashes = (kind, (length,)), {"tokenizer": tokenizer.sha256}
        pipeline.append(transforms.Tokenize(tokenizer, length))
        if section.contexts:
            fields["context"] = ("float16", (length, config.model.text_encoder.width))
            text = build.text(config, null)
    if build.null_label(config) is not None:
        fields["label"] = ("int32", ())
    plan = latents.Plan(
        out,
        count,
        section.shard_size,
        fields,
        {
            **identity,
            "first_stage": stage.hash,
            **hashes,
            "data_sha256": source.provenance["sha256"],
            "seed": config.seed,
        },
    )

    def begin() -> None:
        if not cluster.is_first():
            return
        plan.begin()
        if not (out / "first_stage" / weights.WEIGHTS).exists():
            weights.save_weights(out / "first_stage", params, config.model.autoencoder.to_dict())
            if tokenizer is not None:
                tokenizer.save(out / "tokenizer.json")

    cluster.together(begin)
    # Each process encodes shards of its own, on its own devices.
    mesh = make_mesh(devices=[d for d in jax.devices() if d.process_index == jax.process_index()])
    size = math.ceil(section.batch_size / mesh.size) * mesh.size
    frozen = {k: v for k, v in begun.frozen.items() if k == "text_encoder"}
    params, frozen = jax.device_put((params, frozen), NamedSharding(mesh, PartitionSpec()))

    @jax.jit
    def encoded(params, frozen, batch):
        x = codec.signed(batch["image"])
        found = network.apply({"params": params}, x, method="encode")
        columns = {"mean": found.mean, "logvar": found.logvar}
        if "context" in fields:
            columns["context"] = text.encode(frozen, {"tokens": batch["tokens"]})["context"]
        return columns

    progress = Progress("latents", count, silent=not cluster.is_first())
    for shard in plan.missing(jax.process_index(), jax.process_count()):
        rows = {name: [] for name in fields}
        for batch in loader.one_pass(
            source, size, pipeline, epochs=section.epochs, start=shard.start, stop=shard.stop
        ):
            given = {k: batch[k] for k in ("image", "tokens") if k in batch}
            given = jax.device_put(given, NamedSharding(mesh, BATCH))
            valid = batch["valid"]
            columns = {**batch, **encoded(params, frozen, given)}
            for name in fields:
                rows[name].append(np.asarray(columns[name])[valid])
        latents.write_shard(plan, shard, {k: np.concatenate(v) for k, v in rows.items()})
        progress.at(shard.stop)
    progress.close()
    cluster.together(lambda: None)  # every shard is there
    cluster.together(lambda: cluster.is_first() and latents.finish(plan, scaling))
    return latents.finish(plan, scaling)


def find_first_stage(config: ConfigDict) -> reconstructions.Stage:
    """The first stage that `latents.first_stage` names: its own run, or any workdir that has one.

    Raises ValueError when there is none, or its model is not the config's.
    """
    directory = pathlib.Path(config.latents.first_stage)
    stage = reconstructions.load(directory, flag="--config.latents.first_stage")
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
