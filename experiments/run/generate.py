"""From a denoiser's workdir to pictures: what sampling, evaluation and previews share.

Example i of a run of samples is a function of (seed, i) and its prompt alone: its noise is keyed by
fold_in(key(seed), i), so neither batch size nor device count changes it.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from diffusion.data.tokenizers import Tokenizer
from diffusion.process import gaussian, samplers
from diffusion.process import keys as ks
from diffusion.training import codec, conditions
from diffusion.training.denoiser import Denoiser
from diffusion.training.parallel import BATCH, make_mesh, to_host
from experiments.run import build, data, networks, pipelines


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
    found = networks.load(directory, which, step)
    config, tokens = found.config, ()
    if config.task != "denoiser":
        raise ValueError(
            f"--workdir={directory} holds a run of task={config.task!r}: name one of 'denoiser'"
        )
    if "denoiser" not in config.model:
        raise ValueError(
            f"--workdir={directory} holds a text encoder alone: name a run of a denoiser, or give "
            "this one to a config's init_from"
        )
    if found.tokenizer is not None:
        tokens = data.null_tokens(config, found.tokenizer)
    task = build.task(config, null_tokens=tokens)
    return Model(
        config,
        task,
        found.params,
        found.extra,
        found.first_stage,
        found.tokenizer,
        found.hash,
        found.step,
    )


def denoise_fn(model: Model, params: Any, condition: Any, empty: Any, scale: float) -> Any:
    """denoise(x_t, t) -> x0 with classifier-free guidance, both halves in one network call.

    With a learned variance, (x0, variance output).
    """
    schedule = build.schedule(model.config)
    prediction = model.config.process.prediction
    learned = model.config.process.variance == "learned"

    def denoiser(cond):
        def network(x_t, t):
            return model.task.predict(params, x_t, t, cond)

        return gaussian.make_denoise(network, schedule, prediction, learned_variance=learned)

    if scale == 1.0 or empty is None:
        return build.bounded(model.config, denoiser(condition))
    both = denoiser(jax.tree.map(paired, condition, empty))

    def guided(x_t, t):
        pairs = both(paired(x_t, x_t), paired(t, t))
        cond, uncond = (jax.tree.map(lambda x, i=i: x[i::2], pairs) for i in (0, 1))
        guide = build.guided(model.config, lambda *_: cond, lambda *_: uncond, scale)
        return guide(x_t, t)

    return build.bounded(model.config, guided)


def paired(a: jax.Array, b: jax.Array) -> jax.Array:
    """(n, ...) twice to (2 n, ...), a0 b0 a1 b1 ...: pairs stay on the device that holds them."""
    return jnp.stack([a, b], axis=1).reshape(2 * len(a), *a.shape[1:])


def decode(
    model: Model, params: Any, x: jax.Array, tile: int = 0, rounded: bool = True
) -> jax.Array:
    """What was diffused, (batch, *space, channels), to pixels uint8; a series to float32.

    `tile` > 0: in tiles of so many pixels (`models/tiling.py`). Not `rounded`: float32 in [0, 1].
    """
    x = codec.decode(model.first_stage, params, model.extra, x, tile)
    if x.ndim == 3:  # a series is no picture: it stays as it is
        return x
    return codec.to_uint8(x) if rounded else jnp.clip((x + 1) / 2, 0, 1)


def make_sampler(
    model: Model,
    sampler: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    trajectory: bool = False,
    strength: float = 1.0,
    tile: int = 0,
    rounded: bool = True,
) -> Any:
    """A compiled function (params, indices, batch, seed) -> uint8 images [, images of each step].

    `batch` holds "tokens" (n, length) and "label" (n,) where the model is given them, "negative"
    tokens in place of the empty caption, and what `pipelines.columns` makes.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"--strength={strength} must lie in (0, 1]: 1 keeps nothing of the image")
    method = build.sampler(model.config, strength, sampler=sampler, steps=steps)
    scale = model.config.sample.guidance_scale if guidance_scale is None else guidance_scale
    task = model.task

    @jax.jit
    def run(params, indices, batch, seed):
        keys = ks.numbered(jax.random.key(seed), indices)
        first, noise = (ks.stream(keys, i) for i in (0, 1))
        params = task.merged(params)
        given = pipelines.extend(model, params, batch)
        condition, empty = {**task.condition(params, batch), **given}, None
        if nothing := conditions.null(task.conditions, params, batch):
            empty = {**task.condition(params, {**batch, **nothing}), **given}
        denoise = denoise_fn(model, params, condition, empty, scale)
        denoise = pipelines.keep_known(model, params, batch, denoise)
        x = ks.normal(first, (len(indices), *task.sample_shape))  # of (seed, i) alone
        x = pipelines.start(model, method, params, batch, x)
        result = samplers.sample(method, denoise, x, noise, trajectory=trajectory)
        if not trajectory:
            return pipelines.paste(batch, decode(model, params, result, tile, rounded))
        x0, xs = result
        return decode(model, params, x0, tile), jax.vmap(lambda x: decode(model, params, x))(xs)

    return run


def images(
    model: Model,
    num: int,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    negative: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    given: Mapping[str, np.ndarray] | None = None,
    start: int = 0,
    run: Any = None,
    **options: Any,
) -> Iterator[np.ndarray]:
    """Yields uint8 batches, images `start` to `num`, prompt i % len(prompts) for image i.

    So for negative prompts, labels and the rows of `given` (`pipelines.columns`). A ragged last
    batch is padded, so one compilation serves all. Spread over all devices. `run`: what
    `make_sampler` gave for the same networks and `options`, already compiled, perhaps.
    """
    if num < 1:
        raise ValueError(f"--num={num} must be at least 1")
    mesh = make_mesh()
    size = sampling_batch(model, num, batch_size)
    columns = dict(given or {})
    tokens = encode(model, prompts)
    if tokens is not None:
        columns["tokens"] = tokens
    if negative:
        columns["negative"] = _negative(model, negative)
    columns |= _labels(model, labels)
    run = run or make_sampler(model, **options)
    params = jax.device_put(model.params, NamedSharding(mesh, PartitionSpec()))
    split = NamedSharding(mesh, BATCH)
    for first in range(start, num, size):
        indices = np.minimum(np.arange(first, first + size), num - 1)
        batch = {name: rows[indices % len(rows)] for name, rows in columns.items()}
        placed = jax.device_put((indices.astype(np.int32), batch), split)
        yield to_host(run(params, *placed, seed))[: min(size, num - first)]


def sampling_batch(model: Model, num: int, batch_size: int | None = None) -> int:
    """How many images `images` makes at a time: what all devices divide."""
    size, devices = min(batch_size or model.config.sample.batch_size, num), make_mesh().size
    return -(-size // devices) * devices


def _negative(model: Model, negative: Sequence[str]) -> np.ndarray:
    tokens = encode(model, negative)
    if tokens is None:
        raise ValueError("--negative_prompt was given, but the model reads no captions")
    return tokens


def _labels(model: Model, labels: Sequence[int] | None) -> dict[str, np.ndarray]:
    """The labels as a column; each class in turn where none is named."""
    condition = model.task.conditions.get("label")
    if condition is None:
        if labels:
            raise ValueError("--label was given, but the model knows no classes: leave it out")
        return {}
    null = condition.null_label
    wrong = [label for label in labels or () if not 0 <= label <= null]
    if wrong:
        raise ValueError(f"--label={wrong[0]} must lie in 0..{null}")
    return {"label": np.array(labels or range(null), np.int32)}


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
    tokens, cut = model.tokenizer.encode_and_mark(
        prompts, model.config.model.text_encoder.max_length
    )
    if cut.any():
        print(f"note: {int(cut.sum())} prompts were longer than the text encoder reads", flush=True)
    return tokens
