"""From a denoiser's workdir to a pipeline: what sampling, evaluation and previews share."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from diffusion import files, interop
from diffusion.models.second_time import told_guidance
from diffusion.sampling import guide
from diffusion.sampling.pipeline import Pipeline
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
    return _autoguided(made, config.sample.autoguidance) if config.sample.autoguidance else made


def pipeline(config: ConfigDict, task: Any, params: dict[str, Any], **given: Any) -> Pipeline:
    """What a config says of sampling, around networks."""
    how = build.settings(config)
    return Pipeline(task, how, params, **given, batch_size=config.sample.batch_size)


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
        return model.with_controlnet(net, params)
    except ValueError as error:
        raise ValueError(f"--controlnet={directory}: {error}") from error
