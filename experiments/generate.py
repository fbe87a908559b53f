"""From a denoiser's workdir to pictures: what sampling, evaluation and previews share.

Example i of a run of samples is a function of (seed, i) and its prompt alone: its noise is keyed by
fold_in(key(seed), i), so neither batch size nor device count changes it.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from diffusion import weights
from diffusion.checkpoint import restore_params
from diffusion.data.tokenizers import Tokenizer
from diffusion.process import gaussian, guidance, samplers
from diffusion.training.denoiser import Denoiser
from diffusion.training.parallel import BATCH, make_mesh, to_host
from experiments import build, runs, workdir


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained denoiser, with all it needs to make pictures. `params` holds every network."""

    config: ConfigDict
    task: Denoiser
    params: dict[str, Any]
    extra: dict[str, Any]
    first_stage: Any = None
    tokenizer: Tokenizer | None = None
    checkpoint_hash: str = ""
    step: int = 0


def load(directory: str | pathlib.Path, which: str = "ema", step: int | None = None) -> Model:
    """A run's newest checkpoint (or that of `step`); `which` is "ema" or "raw" weights.

    Raises ValueError for a workdir without a run, a checkpoint, or the average asked for.
    """
    directory = pathlib.Path(directory)
    config = workdir.read_config(directory)
    if config.task != "denoiser":
        raise ValueError(
            f"--workdir={directory} holds a run of task={config.task!r}: name one of 'denoiser'"
        )
    if which not in ("ema", "raw"):
        raise ValueError(f"--weights={which} is unknown: use ema or raw")
    saved = restore_params(directory / "checkpoints", ("params", "ema", "extra"), step)
    params = dict(saved.items["params"])
    if which == "ema":
        params.update(saved.items["ema"])
    first_stage, tokenizer, tokens = None, None, ()
    if "autoencoder" in config.model:
        params["autoencoder"], described, _ = weights.load_weights(directory / "first_stage")
        first_stage = build.autoencoder(ConfigDict(described))
    if "text_encoder" in config.model:
        tokenizer = Tokenizer.load(directory / "tokenizer.json")
        tokens = runs.null_tokens(config, tokenizer)
    task = build.task(config, null_tokens=tokens)
    return Model(
        config, task, params, saved.items["extra"], first_stage, tokenizer, saved.hash, saved.step
    )


def denoise_fn(model: Model, params: Any, condition: Any, empty: Any, scale: float) -> Any:
    """denoise(x_t, t) -> x0 with classifier-free guidance, both halves in one network call.

    With a learned variance, (x0, variance output).
    """
    schedule = build.schedule(model.config)
    prediction = model.config.process.prediction
    learned = model.config.process.variance == "learned"
    clip = guidance.clip_x0 if model.config.sample.clip else (lambda f: f)

    def denoiser(cond):
        def network(x_t, t):
            return model.task.unet.apply({"params": params["unet"]}, x_t, t, **cond)

        return gaussian.make_denoise(network, schedule, prediction, learned_variance=learned)

    if scale == 1.0 or not condition:
        return clip(denoiser(condition))
    both = denoiser(jax.tree.map(lambda c, u: jnp.concatenate([c, u]), condition, empty))

    def guided(x_t, t):
        halves = both(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]))
        cond, uncond = (jax.tree.map(lambda h, i=i: jnp.split(h, 2)[i], halves) for i in (0, 1))
        return guidance.classifier_free(lambda *_: cond, lambda *_: uncond, scale)(x_t, t)

    return clip(guided)


def decode(model: Model, params: Any, x: jax.Array) -> jax.Array:
    """What was diffused, (batch, *space, channels), to pixels uint8; a series to float32."""
    if "latent_scale" in model.extra:
        x = x / jnp.asarray(model.extra["latent_scale"]).reshape(*[1] * (x.ndim - 1), -1)
        x = x + jnp.asarray(model.extra["latent_shift"]).reshape(*[1] * (x.ndim - 1), -1)
    if model.first_stage is not None:
        x = model.first_stage.apply({"params": params["autoencoder"]}, x, method="decode")
    return x if x.ndim == 3 else to_uint8(x)  # a series is no picture: it stays as it is


def to_uint8(x: jax.Array) -> jax.Array:
    """[-1, 1] to 0..255, rounded to nearest."""
    return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)


def make_sampler(
    model: Model,
    sampler: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    trajectory: bool = False,
) -> Any:
    """A compiled function (params, indices, batch, seed) -> uint8 images [, images of each step].

    `batch` holds "tokens" (n, length) and "label" (n,) where the model is given them.
    """
    method = build.sampler(model.config, sampler=sampler, steps=steps)
    scale = model.config.sample.guidance_scale if guidance_scale is None else guidance_scale
    task = model.task

    @functools.partial(jax.jit, static_argnames=())
    def run(params, indices, batch, seed):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)
        start, noise = (jax.vmap(jax.random.fold_in, (0, None))(keys, i) for i in (0, 1))
        x = method.prior_std * gaussian.normal(start, (len(indices), *task.sample_shape))
        condition = task.condition(params, batch, None, train=False)
        empty = task.condition(params, _null(task, batch), None, train=False)
        denoise = denoise_fn(model, params, condition, empty, scale)
        result = samplers.sample(method, denoise, x, noise, trajectory=trajectory)
        if not trajectory:
            return decode(model, params, result)
        x0, xs = result
        return decode(model, params, x0), jax.vmap(lambda x: decode(model, params, x))(xs)

    return run


def _null(task: Denoiser, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    null = dict(batch)
    if "tokens" in batch:
        tokens = jnp.asarray(task.null_tokens, jnp.int32)
        null["tokens"] = jnp.broadcast_to(tokens, batch["tokens"].shape)
    if "label" in batch and task.null_label is not None:
        null["label"] = jnp.full_like(batch["label"], task.null_label)
    return null


def images(
    model: Model,
    num: int,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    **options: Any,
) -> Iterator[np.ndarray]:
    """Yields uint8 batches, `num` images in all, prompt i % len(prompts) for image i.

    A ragged last batch is padded, so one compilation serves all. Spread over all devices.
    """
    if num < 1:
        raise ValueError(f"--num={num} must be at least 1")
    mesh = make_mesh()
    size = min(batch_size or model.config.sample.batch_size, num)
    size = -(-size // mesh.size) * mesh.size
    tokens = encode(model, prompts)
    run = make_sampler(model, **options)
    params = jax.device_put(model.params, NamedSharding(mesh, PartitionSpec()))
    split = NamedSharding(mesh, BATCH)
    for first in range(0, num, size):
        indices = np.minimum(np.arange(first, first + size), num - 1)
        batch = {} if tokens is None else {"tokens": tokens[indices % len(tokens)]}
        placed = jax.device_put((indices.astype(np.int32), batch), split)
        yield to_host(run(params, *placed, seed))[: min(size, num - first)]


def encode(model: Model, prompts: Sequence[str] | None) -> np.ndarray | None:
    """Prompts to tokens; None for a model that reads none.

    Raises ValueError for prompts the model cannot use, and for an empty list.
    """
    if model.tokenizer is None:
        if prompts:
            raise ValueError(
                "--prompt was given, but the model reads no captions: leave it out, or use a "
                "run of a text-conditional config"
            )
        return None
    prompts = [""] if prompts is None else list(prompts)
    if not prompts:
        raise ValueError("the list of prompts is empty: give --prompt=... or a file of lines")
    unknown = model.tokenizer.unknown(prompts)
    if unknown:
        print(f"note: words the tokenizer does not know: {', '.join(unknown[:10])}", flush=True)
    tokens, cut = model.tokenizer.encode_and_mark(prompts, len(model.task.null_tokens))
    if cut.any():
        print(f"note: {int(cut.sum())} prompts were longer than the text encoder reads", flush=True)
    return tokens


def image_hash(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]
