"""Config to tasks: what trains, whole. Everything that a config can be wrong in raises ValueError
here or in `build.py`, before anything is written.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffusion.models.discriminator import PatchDiscriminator
from diffusion.models.image_encoder import DigitClassifier
from diffusion.models.perceptual import LPIPS
from diffusion.process import losses
from diffusion.training.adversarial import Adversary
from diffusion.training.autoencoder import Autoencoder
from diffusion.training.classifier import Classifier
from diffusion.training.denoiser import Denoiser
from experiments.run import build


def denoiser(config: ConfigDict, null_tokens: tuple[int, ...] = ()) -> Denoiser:
    networks = build.trained(config)
    noising, shape = build.schedule(config), build.sample_shape(config)
    variance, resample = config.process.variance, config.process.times == "second_moment"
    _check_output(config, shape[-1])
    if "controlnet" in config.model and config.data.flip:
        raise ValueError("data.flip=True would not mirror a ControlNet's hints: set it to False")
    joined = {"": 0, "inpaint": 1 + shape[-1], "low_resolution": config.data.channels}
    joined["past"] = _years(config, shape)
    objective = build.construct(
        losses.objective,
        config.process.objective,
        "process.objective",
        schedule=noising,
        prediction=config.process.prediction,
        variance=variance,
    )
    draw = functools.partial(
        losses.draw, schedule=noising, times=None if resample else config.process.times or None
    )
    one = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    with build.naming("process"):  # checks names
        jax.eval_shape(lambda key, x0: draw(key[None], x0=x0), jax.random.key(0), one)
    build.settings(
        config
    )  # a sampler that the schedule cannot serve is refused now, not after training
    return Denoiser(
        network=build.denoiser_network(config),
        sample_shape=shape,
        objective=objective,
        draw=lambda keys, x0: draw(keys, x0=x0),
        loss_history=losses.second_moment_history(noising) if resample else None,
        optimizer=build.optimizer(config, networks),
        ema=build.ema(config, networks),
        conditions=build.told(config, null_tokens),
        lora=build.lora(config),
        controlnets=build.controlnets(config),
        concat_channels=build.choose(joined, config.conditioning.concat, "conditioning.concat"),
        autoencoder=build.online_autoencoder(config),
        drop_condition=config.conditioning.drop,
        flip=config.data.flip,
        accumulate=config.train.accumulate,
    )


def _years(config: ConfigDict, shape: tuple[int, ...]) -> int:
    """How many channels the past of a window becomes."""
    if config.conditioning.concat == "past" and (len(shape) != 2 or config.data.past % shape[0]):
        raise ValueError(
            f"conditioning.concat='past' is of series whose past is some windows long, but "
            f"data.past={config.data.past} and data.image_size={config.data.image_size}: give a "
            "multiple of the window"
        )
    return config.data.past // shape[0] * shape[-1]


def _check_output(config: ConfigDict, channels: int) -> None:
    variance, found = config.process.variance, config.model.denoiser.out_channels
    needed = channels * (2 if variance == "learned" else 1)
    if found != needed:
        raise ValueError(
            f"model.denoiser.out_channels={found}, but data of {channels} channels with "
            f"process.variance={variance!r} needs {needed}: set one or the other"
        )


def first_stage(config: ConfigDict) -> Autoencoder:
    loss, dtype = config.loss, build.choose(build.DTYPES, config.model.dtype, "model.dtype")
    network = build.autoencoder(config.model.autoencoder, dtype, config.parallel.remat != "none")
    opponent = adversary(config, dtype)
    networks = ("autoencoder",) if opponent is None else ("autoencoder", "discriminator")
    quantised = config.model.autoencoder.name == "vq"
    for key in ("kl_weight", "codebook_weight", "perceptual_weight"):
        if key in loss and not 0 <= loss[key] < float("inf"):
            raise ValueError(f"loss.{key}={loss[key]} must be finite and 0 or more")
    if loss.reseed_every_steps < 0 or (loss.reseed_every_steps and not quantised):
        raise ValueError(
            f"loss.reseed_every_steps={loss.reseed_every_steps} must be 0 (never), or above 0 with "
            "model.autoencoder.name='vq'"
        )
    return Autoencoder(
        network=network,
        sample_shape=build.image_shape(config),
        optimizer=build.optimizer(config, networks, clip_apart=opponent is not None),
        ema=build.ema(config, ("autoencoder",)),
        reconstruction=loss.reconstruction,
        reduction=loss.reduction,
        regularizer_weight=loss.codebook_weight if quantised else loss.kl_weight,
        perceptual=LPIPS(dtype=dtype) if loss.perceptual_weight else None,
        perceptual_weight=loss.perceptual_weight,
        adversary=opponent,
        reseed_every_steps=loss.reseed_every_steps,
        batch_size=config.train.batch_size,
        flip=config.data.flip,
        accumulate=config.train.accumulate,
    )


def adversary(config: ConfigDict, dtype: Any) -> Adversary | None:
    """The discriminator and its loss; None where `loss.adversarial` is ""."""
    loss = config.loss
    if not loss.adversarial:
        return None
    section = config.model.discriminator
    return Adversary(
        build.construct(PatchDiscriminator, section, "model.discriminator", dtype=dtype),
        loss.adversarial,
        loss.adversarial_weight,
        loss.adversarial_start_steps,
        loss.adversarial_warmup_steps,
    )


def classifier(config: ConfigDict) -> Classifier:
    return Classifier(
        network=build.construct(DigitClassifier, config.model.classifier, "model.classifier"),
        sample_shape=build.image_shape(config),
        optimizer=build.optimizer(config, ("classifier",)),
        ema=build.ema(config, ("classifier",)),
        accumulate=config.train.accumulate,
    )


TASKS: dict[str, Callable[..., Any]] = {
    "denoiser": denoiser,
    "autoencoder": first_stage,
    "classifier": classifier,
}


def task(config: ConfigDict, **arguments: Any) -> Any:
    """The task of a config; its shapes are checked by tracing, no array is made."""
    made = build.choose(TASKS, config.task, "task")(config, **arguments)
    try:
        jax.eval_shape(made.init, jax.random.key(0))
    except ValueError as error:
        raise ValueError(f"data.image_size={config.data.image_size} or model.*: {error}") from error
    return made
