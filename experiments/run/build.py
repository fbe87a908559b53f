"""Config to objects: the only tables from a name to a constructor.

Everything that a config can be wrong in raises ValueError here, before anything is written.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from diffusion.models.autoencoder import AutoencoderKL, VQModel
from diffusion.models.controlnet import ControlNet
from diffusion.models.embedders import ClassEmbedder
from diffusion.models.lora import Lora
from diffusion.models.mmdit import MMDiT
from diffusion.models.song import SongUNet
from diffusion.models.t5 import T5Encoder
from diffusion.models.text_encoder import TextPair, TextTransformer
from diffusion.models.transformer import Transformer
from diffusion.models.unet import UNet
from diffusion.models.words import Words
from diffusion.process import schedules
from diffusion.sampling.settings import Settings
from diffusion.training import optim
from diffusion.training.ema import Ema
from diffusion.training.state import Optimizer

SCHEDULES: dict[str, Callable[..., schedules.Schedule]] = {
    "ddpm_linear": schedules.ddpm_linear,
    "scaled_linear": schedules.scaled_linear,
    "cosine": schedules.cosine,
    "sigmoid": schedules.sigmoid,
    "edm": schedules.edm,
    "trigflow": schedules.trigflow,
    "flow": schedules.flow,
    "betas": schedules.from_betas,  # betas: one a step
}
DENOISERS: dict[str, Any] = {
    "unet": UNet,
    "song_unet": SongUNet,
    "transformer": Transformer,
    "mmdit": MMDiT,
}
AUTOENCODERS: dict[str, Any] = {"kl": AutoencoderKL, "vq": VQModel}
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}


# -- small parts ---------------------------------------------------------------------------------


def choose(table: dict[str, Any], name: str, key: str) -> Any:
    if name not in table:
        raise ValueError(f"{key}={name!r} is unknown: use one of {sorted(table)}")
    return table[name]


def options(section: ConfigDict | dict[str, Any]) -> dict[str, Any]:
    """A section's keys but its name or kind as keyword arguments, lists made tuples."""
    items = {k: v for k, v in section.items() if k not in ("name", "kind")}
    return {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in items.items()}


def construct(make: Callable[..., Any], section: ConfigDict | dict, key: str, **more: Any) -> Any:
    """`make` of a section's keys; a key that it lacks is refused by name, and so is a value."""
    try:
        with naming(key, more):
            return make(**options(section), **more)
    except TypeError as error:
        name = getattr(make, "__name__", key)
        raise ValueError(f"{key} has a key that {name} lacks ({error})") from error


@contextlib.contextmanager
def naming(key: str, above: Collection[str] = ()) -> Iterator[None]:
    """The library's errors begin with its argument, "eta=2 ..."; here with the key of the config,
    "sample.options.eta=2 ...". Arguments `above` stand in the section around `key`."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        argument = re.match(r"(\w+)=", text)
        if argument is None:
            raise ValueError(f"{key}: {text}") from error
        home = key.rpartition(".")[0] if argument[1] in above else key
        raise ValueError(f"{home}.{text}") from error


def schedule(config: ConfigDict) -> schedules.Schedule:
    section = config.process.schedule
    make = choose(SCHEDULES, section.name, "process.schedule.name")
    rest = {k: v for k, v in section.items() if k not in ("zero_terminal_snr", "between")}
    made = construct(make, rest, "process.schedule")
    if "zero_terminal_snr" in section and section.zero_terminal_snr:
        with naming("process.schedule"):
            made = schedules.zero_terminal_snr(made)
    if "between" in section:
        with naming("process.schedule"):
            made = dataclasses.replace(made, between=section.between)
    return made


def settings(config: ConfigDict) -> Settings:
    """How `config.sample` finds x_0."""
    others = ("options", "batch_size", "autoguidance", "guidance_classifier")
    section = {k: v for k, v in config.sample.items() if k not in others}
    process = {"prediction": config.process.prediction, "variance": config.process.variance}
    own = options(config.sample.options) if "options" in config.sample else {}
    noising = schedule(config)
    with naming("sample.options", [field.name for field in dataclasses.fields(Settings)]):
        return Settings(noising, **process, options=own, **options(section))


def _compute(config: ConfigDict) -> dict[str, Any]:
    return {"dtype": choose(DTYPES, config.model.dtype, "model.dtype")}


def denoiser_network(config: ConfigDict, name: str = "denoiser") -> Any:
    section = config.model[name]
    make = choose(DENOISERS, section.kind, f"model.{name}.kind")
    remat = None if config.parallel.remat == "none" else config.parallel.remat
    return construct(make, section, f"model.{name}", remat=remat, **_compute(config))


def teacher(config: ConfigDict) -> Any:
    """The frozen network that a denoiser of few steps learns from; None: it learns from data."""
    return denoiser_network(config, "teacher") if "teacher" in config.model else None


def autoencoder(section: ConfigDict, dtype: Any = None, remat: bool = False) -> Any:
    cls = choose(AUTOENCODERS, section.name, "model.autoencoder.name")
    return construct(cls, section, "model.autoencoder", dtype=dtype, remat=remat)


def text_encoder(config: ConfigDict) -> TextTransformer | TextPair | None:
    """One, or where `model.text_encoder_2` is there the pair, which is one network, of
    `model.text_encoder_3` as well where that is there."""
    if "text_encoder" not in config.model:
        return None
    compute, first = _compute(config), config.model.text_encoder.to_dict()
    own = {}
    if "text_encoder_3" in config.model:
        last = config.model.text_encoder_3.to_dict()
        own = {"third_length": last.pop("max_length"), "first_projection": first.pop("projection")}
        own["third"] = construct(T5Encoder, last, "model.text_encoder_3", **compute)
    made = construct(TextTransformer, first, "model.text_encoder", **compute)
    if "text_encoder_2" not in config.model:
        return made
    key, section = "text_encoder_2", config.model.text_encoder_2.to_dict()
    own |= {name: section.pop(name) for name in ("projection", "end") if name in section}
    second = construct(TextTransformer, section, f"model.{key}", **compute)
    if made.max_length != second.max_length:
        raise ValueError(
            f"model.{key}.max_length={second.max_length} must be model.text_encoder's "
            f"{made.max_length}: their outputs stand beside each other"
        )
    return TextPair(made, second, **own)


def caption_length(config: ConfigDict) -> int:
    """Tokens of a caption, of all text encoders where there are several."""
    third = config.model.text_encoder_3 if "text_encoder_3" in config.model else None
    own = config.model.text_encoder.max_length * (1 + ("text_encoder_2" in config.model))
    return own + (third.max_length if third and third.layers else 0)


def class_embedder(config: ConfigDict) -> ClassEmbedder | None:
    if "class_embedder" not in config.model:
        return None
    key = "class_embedder"
    return construct(ClassEmbedder, config.model[key], f"model.{key}", **_compute(config))


def lora(config: ConfigDict) -> Lora | None:
    return construct(Lora, config.model.lora, "model.lora") if "lora" in config.model else None


def words(config: ConfigDict) -> Words | None:
    return construct(Words, config.model.words, "model.words") if "words" in config.model else None


def controlnets(config: ConfigDict) -> tuple[ControlNet, ...]:
    if "controlnet" not in config.model:
        return ()
    fields = {**options(config.model.denoiser), **options(config.model.controlnet)}
    return (construct(ControlNet, ConfigDict(fields), "model.controlnet", **_compute(config)),)


def online_autoencoder(config: ConfigDict) -> Any:
    """The frozen first stage of a task that is given images; None where it is given latents."""
    if "autoencoder" not in config.model or config.data.name == "latents":
        return None
    return autoencoder(config.model.autoencoder, choose(DTYPES, config.model.dtype, "model.dtype"))


def trained(config: ConfigDict) -> tuple[str, ...]:
    """Names of the networks that a denoiser's config trains; the others are frozen."""
    adapters = tuple(name for name in ("lora", "controlnet", "words") if name in config.model)
    if len(adapters) > 1:
        both = f"model.{adapters[0]} and model.{adapters[1]}"
        raise ValueError(f"{both} are both there: train one at a time")
    if adapters:
        if not config.init_from:
            raise ValueError(f"init_from is empty, but model.{adapters[0]} adapts a trained run")
        return adapters
    text = "text_encoder" in config.model and config.conditioning.train_text_encoder
    own = tuple(name for name in ("class_embedder", "rescaler") if name in config.model)
    own += ("projector",) * bool(config.align.weight)
    return (*own, *("text_encoder",) * text, "denoiser")


def null_label(config: ConfigDict) -> int | None:
    """The null class, which the data's are before; None: no classes.

    It is the last that the condition knows, or where all of them are the data's, one beyond.
    """
    embedder = class_embedder(config)
    classes = denoiser_network(config).num_classes if embedder is None else embedder.num_classes
    return None if classes is None else classes - int(config.conditioning.null_label)


def reads_captions(config: ConfigDict) -> bool:
    """Whether it has a text encoder, and that reads captions and not boxes."""
    return "text_encoder" in config.model and not config.conditioning.layout


def optimizer(config: ConfigDict, networks: tuple[str, ...], clip_apart: bool = False) -> Optimizer:
    """One transformation a network; `clip_apart` bounds each one's gradient by itself."""
    section = config.optim
    rate = optim.learning_rate(
        section.learning_rate, section.warmup_steps, section.decay_steps, section.decay
    )
    names = ("name", "b1", "b2", "eps", "weight_decay", "momentum")
    make = optim.make_transform(rate, **{name: section[name] for name in names})
    if clip_apart and section.clip_norm:
        make = optax.chain(optax.clip_by_global_norm(section.clip_norm), make)
    clip_norm = 0.0 if clip_apart else section.clip_norm
    spikes = config.train.max_loss_deviations
    by_element = section.name in optim.BY_ELEMENT
    return Optimizer({name: make for name in networks}, rate, clip_norm, spikes, by_element)


def ema(config: ConfigDict, networks: tuple[str, ...]) -> Ema:
    if not 0 <= config.ema.decay < 1:
        raise ValueError(f"ema.decay={config.ema.decay} is outside [0, 1): 0 keeps no average")
    if unknown := sorted(set(config.ema.networks) - set(networks)):
        raise ValueError(
            f"ema.networks names {unknown[0]!r}, but {', '.join(networks)} are trained"
        )
    averaged, profiles = tuple(config.ema.networks) or networks, tuple(config.ema.profiles)
    with naming("ema"):
        return Ema(
            config.ema.decay,
            config.ema.ramp,
            averaged if config.ema.decay or profiles else (),
            profiles,
            config.ema.ramp_share,
        )


def image_shape(config: ConfigDict) -> tuple[int, ...]:
    """(*space, channels) of what the data holds; one number is the side of a square image."""
    size = config.data.image_size
    space = (size, size) if isinstance(size, int) else tuple(size)
    if not space or min(space) < 1:
        raise ValueError(f"data.image_size={size} must be at least 1 pixel a side")
    return (*space, config.data.channels)


def sample_shape(config: ConfigDict) -> tuple[int, ...]:
    """(*space, channels) of what is diffused: the image, or its latent."""
    shape = image_shape(config)
    if "autoencoder" not in config.model:
        return shape
    first = autoencoder(config.model.autoencoder)
    if any(side % first.downsampling for side in shape[:-1]):
        raise ValueError(
            f"data.image_size={config.data.image_size} is not a multiple of the first stage's "
            f"downsampling factor {first.downsampling}: choose one that is"
        )
    return (*[side // first.downsampling for side in shape[:-1]], first.latent_channels)
