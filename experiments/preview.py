"""Pictures of a run in progress, for the writers: samples of a denoiser, reconstructions of a first
stage. Keyed by name; uint8 (images, height, width, channels)."""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import weights
from diffusion.data.tokenizers import Tokenizer
from diffusion.training.autoencoder import Autoencoder
from diffusion.training.denoiser import Denoiser
from diffusion.training.parallel import to_host
from diffusion.training.state import TrainState
from experiments import build, generate, runs
from experiments import pictures as sheets


def pictures(run: runs.Run, state: TrainState, directory: pathlib.Path) -> dict[str, np.ndarray]:
    """What there is to see of `state`; empty for a task without pictures."""
    if isinstance(run.task, Autoencoder):
        return _reconstructions(run, state)
    if isinstance(run.task, Denoiser):
        return _samples(run, state, directory)
    return {}


def _reconstructions(run: runs.Run, state: TrainState) -> dict[str, np.ndarray]:
    image = next(run.eval_batches())["image"][: run.config.evaluation.preview]
    params = {"params": state.inference_params["autoencoder"]}
    x = jnp.asarray(image, jnp.float32) / 127.5 - 1
    z = run.task.network.apply(params, x, method="encode").mean
    decoded = generate.to_uint8(run.task.network.apply(params, z, method="decode"))
    return {"images": image, "reconstructions": to_host(decoded)}


def _samples(run: runs.Run, state: TrainState, directory: pathlib.Path) -> dict[str, np.ndarray]:
    params: dict[str, Any] = {**to_host(state.inference_params), **run.frozen}
    first_stage, tokenizer, prompts, given = None, None, None, {}
    if "autoencoder" in run.config.model:
        params["autoencoder"], described, _ = weights.load_weights(directory / "first_stage")
        first_stage = build.autoencoder(ConfigDict(described))
    seen = next(run.eval_batches())
    if run.task.text_encoder is not None:
        tokenizer = Tokenizer.load(directory / "tokenizer.json")
        prompts = tokenizer.decode(seen["tokens"])
    if "hint" in seen:
        given = {"hint_0": seen["hint"], "hint_scale_0": np.ones(1, np.float32)}
    model = generate.Model(
        run.config, run.task, params, to_host(dict(state.extra)), first_stage, tokenizer
    )
    num = run.config.evaluation.preview
    batches = generate.images(model, num, prompts, given=given)
    return {"samples": sheets.as_images(np.concatenate(list(batches)))}
