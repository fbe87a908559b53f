"""From a denoiser's workdir to a pipeline: what sampling, evaluation and previews share."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diffusion import files, interop, weights
from diffusion.models.second_time import told_guidance
from diffusion.sampling import added, guide
from diffusion.sampling.pipeline import Pipeline
from experiments.host import cli
from experiments.run import build, data, networks, tasks, workdir


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained denoiser: `pipeline` with the weights of checkpoint `step`."""

    config: ConfigDict
    pipeline: Pipeline
    checkpoint_hash: str = ""
    step: int = 0


def load(
    directory: str | pathlib.Path,
    which: str = "ema",
    step: int | None = None,
    sample: Mapping[str, Any] | None = None,
) -> Model:
    """A run's newest checkpoint (or that of `step`); `which` is "ema" or "raw" weights.

    `sample`: keys that replace those of the config's `sample`, unless they are None. Raises
    ValueError for a workdir without a run, a checkpoint, or the average asked for.
    """
    found = networks.load(directory, which, step, tasks=("denoiser",))
    config, tokens = ConfigDict(found.config.to_dict()), ()
    if "denoiser" not in config.model:
        raise ValueError(
            f"--workdir={directory} holds a text encoder alone: name a run of a denoiser, or give "
            "this one to a config's init_from"
        )
    if found.tokenizer is not None:
        tokens = data.null_tokens(config, found.tokenizer)
    config.sample.update({k: v for k, v in (sample or {}).items() if v is not None})
    task = tasks.task(config.lock(), null_tokens=tokens)
    given = {"extra": found.extra, "first_stage": found.first_stage, "tokenizer": found.tokenizer}
    made = Model(config, pipeline(config, task, found.params, **given), found.hash, found.step)
    made = _autoguided(made, config.sample.autoguidance) if config.sample.autoguidance else made
    judge = config.sample.guidance_classifier
    return _classified(made, judge) if judge else made


def pipeline(config: ConfigDict, task: Any, params: dict[str, Any], **given: Any) -> Pipeline:
    """What a config says of sampling, around networks."""
    how = build.settings(config)
    return Pipeline(task, how, params, **given, batch_size=config.sample.batch_size)


GUIDED = ("autoguidance", "guidance_classifier", "classifier_scale")


def define_guided(add: cli.Flags) -> None:
    """Flags of guidance by other runs, named as keys of `sample` are."""
    add.add(
        "string", "autoguidance", None, "A worse run, or DIR/checkpoints/STEP, to guide away from."
    )
    add.add("string", "guidance_classifier", None, "A run of configs/adm_classifier.py.")
    add.add("float", "classifier_scale", None, "Of its gradient.")


def guided(values: Any) -> dict[str, Any]:
    """The keys of those flags."""
    return {name: values[name].value for name in GUIDED}


def _classified(model: Model, directory: str) -> Model:
    """Guided by a run of `configs/adm_classifier.py`. ValueError for one of other pictures, noise
    or classes."""
    key = f"sample.guidance_classifier={directory}"
    found = networks.load(directory, flag="sample.guidance_classifier", tasks=("classifier",))
    if found.config.model.classifier.kind != "noisy_unet":
        raise ValueError(
            f"{key} reads pictures without noise: name a run of configs/adm_classifier.py"
        )
    net, pipeline = tasks.task(found.config).network, model.pipeline
    label: Any = pipeline.task.conditions.get("label")
    for what, ours, theirs in (
        ("data.image_size", pipeline.task.sample_shape, build.sample_shape(found.config)),
        ("process.schedule", *(c.process.schedule.to_dict() for c in (model.config, found.config))),
        ("classes", net.classes if label is None else label.null_label, net.classes),
    ):
        if ours != theirs:
            raise ValueError(
                f"{key} has {what}={theirs}, but the denoiser has {ours}: name a classifier of the "
                "same"
            )
    if not _same_latents(pipeline.params, found.params, pipeline.extra, found.extra):
        raise ValueError(
            f"{key} reads latents of another first stage, or scaled otherwise: train it on the "
            "denoiser's own"
        )
    params = {**pipeline.params, "classifier": found.params["classifier"]}
    guided = dataclasses.replace(pipeline, classifier=net, params=params)
    both = files.digest([model.checkpoint_hash, found.hash])[:16]
    return dataclasses.replace(model, pipeline=guided, checkpoint_hash=both)


def _same_latents(ours: Mapping, theirs: Mapping, *extra: Mapping) -> bool:
    """By weights of the first stage, shift and scale; both without any are the same."""
    hashes = {weights.params_hash(params.get("autoencoder", {})) for params in (ours, theirs)}
    scaling = [[np.asarray(e.get(f"latent_{k}", ())) for k in ("shift", "scale")] for e in extra]
    return len(hashes) == 1 and all(map(np.array_equal, *scaling))


def _autoguided(model: Model, directory: str) -> Model:
    """Led away from a worse run, or one of a run's checkpoints (DIR/checkpoints/STEP)."""
    place, step, key = pathlib.Path(directory), None, f"sample.autoguidance={directory}"
    if place.parent.name == "checkpoints" and place.name.isdigit():
        place, step = place.parent.parent, int(place.name)
    try:
        averaged = workdir.read_config(place, "sample.autoguidance").ema.decay
        worse = load(place, "ema" if averaged else "raw", step, {"autoguidance": ""})
        guided = guide.guided(model.pipeline, worse.pipeline)
    except ValueError as error:
        raise ValueError(str(error) if key in str(error) else f"{key}: {error}") from error
    both = files.digest([model.checkpoint_hash, worse.checkpoint_hash])[:16]
    return dataclasses.replace(model, pipeline=guided, checkpoint_hash=both)


def evaluations(model: Pipeline) -> int:
    """Of the network, for one picture: for guidance it is asked twice, unless it is told."""
    once = model.how.guidance_scale == 1 or told_guidance(model.task.network)
    return model.how.method().evaluations * (1 if once else 2)


def with_controlnet(model: Pipeline, directory: str | pathlib.Path) -> Pipeline:
    """Steered by a ControlNet: Diffusers' directory, its authors' file, or the workdir of a run."""
    directory = pathlib.Path(directory)
    if (directory / "checkpoints").is_dir():
        found = networks.load(directory, flag="--controlnet")
        nets = build.controlnets(found.config)
        if not nets:
            raise ValueError(f"--controlnet={directory} holds a run without a ControlNet")
        net, params = nets[0], found.params["controlnet"]
    else:
        net, params = interop.load_controlnet(directory)
    try:
        return added.with_controlnet(model, net, params)
    except ValueError as error:
        raise ValueError(f"--controlnet={directory}: {error}") from error
