"""Config to REPA: its task (`training/alignment.py`), and its frozen network's weights."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from diffusion import files, interop, weights
from diffusion.models.dinov2 import DinoV2
from diffusion.models.image_encoder import DigitClassifier
from diffusion.training.alignment import Aligned
from diffusion.training.denoiser import Denoiser
from experiments.run import build, networks

KEPT = "features.json"  # in a workdir: the hash of what its features were begun with
FEATURES: dict[str, Any] = {"digits": DigitClassifier, "dinov2": DinoV2}


def denoiser(config: ConfigDict) -> Callable[..., Denoiser]:
    """The task's constructor: `Denoiser`, or with `align.weight` an `Aligned` one."""
    told = config.align
    if not told.weight and told.features:
        raise ValueError(
            f"align.features={told.features!r} with align.weight=0, which aligns nothing: set the "
            "weight (0.5 in the paper), or no features"
        )
    if not told.weight:
        return Denoiser
    wrong = {
        f"model.denoiser.kind={config.model.denoiser.kind!r}, which has no tokens": (
            config.model.denoiser.kind not in ("transformer", "mmdit")
        ),
        "data.name='latents', which has no pictures": config.data.name == "latents",
        f"process.method={config.process.method!r}": config.process.method != "denoise",
        f"data.augment={config.data.augment}": bool(config.data.augment),
        "no model.features": "features" not in config.model,
        "model.lora or model.words": "lora" in config.model or "words" in config.model,
    }
    if not 0 < told.weight < float("inf") or any(wrong.values()):
        why = next((reason for reason, bad in wrong.items() if bad), "nothing else amiss")
        raise ValueError(
            f"align.weight={told.weight} with {why}: it is finite and above 0 for a transformer "
            "that learns to denoise pictures beside model.features; set it to 0, or the others so"
        )
    return functools.partial(
        _aligned,
        features=network(config),
        block=told.block,
        projector_width=told.width,
        weight=told.weight,
    )


def _aligned(**given: Any) -> Aligned:
    with build.naming("align"):
        return Aligned(**given)


def network(config: ConfigDict) -> Any:
    """The frozen network that sees features."""
    section = config.model.features
    return build.construct(
        build.choose(FEATURES, section.kind, "model.features.kind"), section, "model.features"
    )


def frozen(config: ConfigDict) -> dict[str, Any]:
    """Its parameters, of `align.features`: a classifier's run, or DINOv2 as Transformers has it.

    ValueError where there is none, or another network.
    """
    if config.task != "denoiser" or not config.align.weight:
        return {}
    place, ours = config.align.features, network(config)
    if not place or not pathlib.Path(place).is_dir():
        raise ValueError(
            f"align.features={place!r} is no folder, but align.weight={config.align.weight}: name "
            "a classifier's workdir, or a directory of Transformers' Dinov2Model"
        )
    if config.model.features.kind == "dinov2":
        theirs, params = interop.load_dinov2(place)
    else:
        found = networks.load(place, flag="--config.align.features", tasks=("classifier",))
        section = found.config.model.classifier
        theirs = build.construct(
            build.choose(FEATURES, section.kind, "model.classifier.kind"),
            section,
            "model.classifier",
        )
        params = found.params["classifier"]
    if differs := networks.difference(ours, theirs):
        field, here, there = differs
        raise ValueError(
            f"align.features={place} has {field}={there}, but model.features.{field}={here}: use "
            "the same network in both"
        )
    return {"features": params}


def identity(frozen: dict[str, Any]) -> dict[str, str]:
    """The hash of the features' network among frozen ones; {} where there is none."""
    return {"sha256": weights.params_hash(frozen["features"])} if "features" in frozen else {}


def check_kept(config: ConfigDict, directory: pathlib.Path, now: dict[str, str]) -> None:
    """ValueError where the run in `directory` was begun with other features."""
    if not now:
        return
    print(f"features: {now['sha256'][:16]}, of {config.align.features}", flush=True)
    kept = directory / KEPT
    if kept.exists() and files.read_json(kept, "delete it") != now:
        raise ValueError(
            f"{kept} is of the features that the run was begun with, but align.features="
            f"{config.align.features} holds others now: give those, or use another --workdir"
        )
