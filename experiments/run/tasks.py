"""Config to tasks: what trains, whole. Everything that a config can be wrong in raises ValueError
here or in `build.py`, before anything is written.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffusion.models import target
from diffusion.models.discriminator import PatchDiscriminator
from diffusion.models.image_encoder import DigitClassifier
from diffusion.models.initialisation import torch_defaults
from diffusion.models.noisy_classifier import NoisyClassifier
from diffusion.models.perceptual import LPIPS
from diffusion.process import consistency, few_steps, latent_consistency, losses
from diffusion.training import augment
from diffusion.training.adversarial import Adversary
from diffusion.training.autoencoder import Autoencoder
from diffusion.training.classifier import Classifier
from diffusion.training.denoiser import Denoiser
from experiments.run import aligned, build, given

INITIALISATIONS = {"ddpm": lambda key, params: params, "torch": torch_defaults}

METHODS: dict[str, type[few_steps.Method]] = {
    "meanflow": few_steps.MeanFlow,
    "consistency": consistency.Consistency,
    "scm": consistency.ContinuousConsistency,
    "progressive": consistency.Progressive,
    "lcm": latent_consistency.LatentConsistency,
}


def denoiser(config: ConfigDict, null_tokens: tuple[int, ...] = ()) -> Denoiser:
    networks = build.trained(config)
    noising, shape = build.schedule(config), build.sample_shape(config)
    _check_output(config, shape[-1])
    images = config.data.name != "latents"
    if config.data.flip and images and ("controlnet" in config.model or config.conditioning.concat):
        raise ValueError(
            "data.flip=True would not mirror a ControlNet's hints, nor what "
            f"conditioning.concat={config.conditioning.concat!r} joins: set it to False"
        )
    augmented = augmentation(config)
    objective, draw, history = learning(config, noising, shape)
    build.settings(
        config
    )  # a sampler that the schedule cannot serve is refused now, not after training
    return aligned.denoiser(config)(
        network=build.denoiser_network(config),
        sample_shape=shape,
        objective=objective,
        draw=draw,
        loss_history=history,
        coupled=_coupled(config),
        optimizer=build.optimizer(config, networks),
        ema=build.ema(config, networks),
        conditions=given.told(config, null_tokens),
        lora=build.lora(config),
        words=build.words(config),
        controlnets=build.controlnets(config),
        autoencoder=build.online_autoencoder(config),
        teacher=build.teacher(config),
        drop_condition=config.conditioning.drop,
        flip=config.data.flip,
        augment=augmented,
        accumulate=config.train.accumulate,
    )


def augmentation(config: ConfigDict) -> augment.Augment | None:
    """EDM's, where the config asks for it and its network can be told."""
    p = config.data.augment
    if not p:
        return None
    told = getattr(build.denoiser_network(config), "augment_dim", 0)
    pixels = config.data.name != "latents" and "autoencoder" not in config.model
    other = config.data.flip or config.conditioning.concat or config.conditioning.layout
    if told != augment.NUMBERS or not pixels or other or len(build.image_shape(config)) != 3:
        raise ValueError(
            f"data.augment={p} is of pictures in pixels, without data.flip or other pictures to "
            f"match, for a network of model.denoiser.augment_dim={augment.NUMBERS} (kind "
            "'song_unet'): set it to 0, or the others so"
        )
    with build.naming("data"):
        return augment.Augment(p)


def learning(config: ConfigDict, noising: Any, shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """The objective, the draw of its times and noise, and the history of losses that t is drawn
    by, or None."""
    section, history = config.process.objective, None
    told = {"schedule": noising, "prediction": config.process.prediction}
    if config.process.method != "denoise":
        known = {"denoise": None, **METHODS}  # as the refusal of another names them
        make = build.choose(known, config.process.method, "process.method")
        _check_method(config)
        told["times"] = config.process.times
        method = build.construct(make, section, "process.objective", **told)
        draw = method.draw
        objective = target.forward_mode()(method.loss) if method.forward_mode else method.loss
    else:
        told["variance"] = config.process.variance
        objective = build.construct(losses.objective, section, "process.objective", **told)
        resample = config.process.times == "second_moment"
        history = losses.second_moment_history(noising) if resample else None
        times = None if resample else config.process.times or None

        def draw(keys, x0, step):
            return losses.draw(keys, noising, x0, times)

    one = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    with build.naming("process"):  # checks names
        jax.eval_shape(lambda key, x0: draw(key[None], x0, 0), jax.random.key(0), one)
    return objective, draw, history


def _coupled(config: ConfigDict) -> bool:
    """Whether noise and pictures are paired by optimal transport; refused of parts of a batch."""
    known = {"independent": False, "optimal": True}
    coupled = build.choose(known, config.process.coupling, "process.coupling")
    schedule, parts = config.process.schedule.name, config.train.accumulate
    bad = {
        f"process.schedule.name={schedule!r}, whose paths are no straight lines: use 'flow'": (
            schedule != "flow"
        ),
        "parallel.mode='pmap', whose steps see parts of a batch: use 'jit'": (
            config.parallel.mode == "pmap"
        ),
        f"train.accumulate={parts}, which sees parts of a batch: set it to 1": parts > 1,
    }
    for reason in (reason for reason, wrong in bad.items() if coupled and wrong):
        raise ValueError(f"process.coupling='optimal' with {reason}")
    return coupled


def _check_method(config: ConfigDict) -> None:
    """What the methods of few steps need of the rest of the config."""
    method, section = config.process.method, config.process.objective
    if config.process.variance == "learned":
        raise ValueError(
            f"process.variance='learned' with process.method={method!r}, which learns no "
            "variance: choose fixed_large"
        )
    if "controlnet" in config.model:
        raise ValueError(f"model.controlnet with process.method={method!r}: take the one away")
    # Under low-rank updates the network without them is the teacher.
    frozen = "teacher" in config.model or "lora" in config.model
    if ("teacher" in section and bool(section.teacher)) != frozen:
        raise ValueError(
            "process.objective.teacher says what the network model.teacher (with model.lora, the "
            "one that is adapted) predicts: give both, or neither"
        )
    jumps = method == "meanflow" or ("clean" in section and section.clean < 1)
    if jumps != getattr(build.denoiser_network(config), "second_time", False):
        raise ValueError(
            f"model.denoiser.second_time={not jumps} with process.method={method!r}, whose network "
            f"is{'' if jumps else ' not'} told where a jump ends: set it to {jumps}"
        )
    text = "text_encoder" in config.model and config.conditioning.train_text_encoder
    if "teacher" in config.model and (text or "class_embedder" in config.model):
        raise ValueError(
            "conditioning.train_text_encoder=True with model.teacher, which reads what it was "
            "trained with: set it to False (and use no class_embedder)"
        )


def _check_output(config: ConfigDict, channels: int) -> None:
    variance, found = config.process.variance, config.model.denoiser.out_channels
    needed = channels * (2 if variance == "learned" else 1)
    if found != needed:
        raise ValueError(
            f"model.denoiser.out_channels={found}, but data of {channels} channels with "
            f"process.variance={variance!r} needs {needed}: set one or the other"
        )
    if getattr(build.denoiser_network(config), "ncsnpp", False) and config.optim.weight_decay:
        raise ValueError(
            f"optim.weight_decay={config.optim.weight_decay} would shrink the frequencies of "
            "model.denoiser.ncsnpp, which are not trained: set it to 0"
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
        perceptual=LPIPS(dtype, 0.5 * loss.perceptual_dropout) if loss.perceptual_weight else None,
        perceptual_weight=loss.perceptual_weight,
        initialise=build.choose(INITIALISATIONS, config.initialisation, "initialisation"),
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


CLASSIFIERS: dict[str, Any] = {"digits": DigitClassifier, "noisy_unet": NoisyClassifier}


def classifier(config: ConfigDict) -> Classifier:
    section, more = config.model.classifier, {}
    make = build.choose(CLASSIFIERS, section.kind, "model.classifier.kind")
    noised = make is NoisyClassifier
    if noised != ("process" in config):
        raise ValueError(
            f"model.classifier.kind={section.kind!r} {'without' if noised else 'with'} a "
            "process.schedule: 'noisy_unet' alone reads noised pictures; start from "
            "configs/adm_classifier.py"
        )
    shape = build.sample_shape(config)
    if shape != build.image_shape(config) and not (noised and config.data.name == "latents"):
        raise ValueError(
            f"data.name={config.data.name!r} with model.autoencoder: a 'noisy_unet' alone reads "
            "latents, and only stored ones; set data.name='latents', or leave the autoencoder out"
        )
    if noised:
        remat = None if config.parallel.remat == "none" else config.parallel.remat
        more = {
            "remat": remat,
            "dtype": build.choose(build.DTYPES, config.model.dtype, "model.dtype"),
        }
    return Classifier(
        network=build.construct(make, section, "model.classifier", **more),
        sample_shape=shape,
        noising=build.schedule(config) if noised else None,
        flip=config.data.flip,
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
