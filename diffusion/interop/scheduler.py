"""Diffusers' scheduler_config.json: the schedule of betas and how to sample, both ways.

beta_schedule  linear, scaled_linear, squaredcos_cap_v2    ddpm_linear, scaled_linear, cosine
prediction_type  epsilon, sample, v_prediction             eps, x0, v
_class_name  DDIM, PNDM (skip_prk_steps or not), DDPM,     ddim, plms or pndm, ddpm,
    EulerDiscrete, EulerAncestralDiscrete, HeunDiscrete,   euler, euler_ancestral, heun,
    DPMSolverMultistep, UniPCMultistep                     dpmpp_2m, unipc
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.files import read_json
from diffusion.interop.files import require

BETAS = {"linear": "ddpm_linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
SAMPLERS = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "plms",
    "DDPMScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
}
# Where a missing key means something else than in DDIMScheduler.
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "PNDMScheduler": {"set_alpha_to_one": False, "clip_sample": False},
    "EulerDiscreteScheduler": {"timestep_spacing": "linspace", "clip_sample": False},
    "EulerAncestralDiscreteScheduler": {"timestep_spacing": "linspace", "clip_sample": False},
    "HeunDiscreteScheduler": {"timestep_spacing": "linspace", "clip_sample": False},
    "DPMSolverMultistepScheduler": {"timestep_spacing": "linspace", "clip_sample": False},
    "UniPCMultistepScheduler": {"timestep_spacing": "linspace", "clip_sample": False},
}
DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "clip_sample": True,
    "rescale_betas_zero_snr": False,
}
# What there is no equal of here.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "trained_betas": (None,),
    "thresholding": (False,),
    "use_karras_sigmas": (None, False),
    "use_exponential_sigmas": (None, False),
    "use_beta_sigmas": (None, False),
    "beta_schedule": ("linear", *BETAS),
    "prediction_type": ("epsilon", *PREDICTIONS),
}


@dataclass(frozen=True)
class Scheduler:
    """`schedule`: name and arguments of one of `process/schedules.py`; `sampler` and
    `options` likewise of `process/samplers`; `clip`: predicted x0 to [-1, 1]."""

    schedule: dict[str, Any]
    prediction: str
    sampler: str
    options: dict[str, Any]
    clip: bool


def read_scheduler(directory: str | Path) -> Scheduler:
    """From `scheduler_config.json` in `directory`. ValueError naming the file and the key."""
    path = Path(directory) / "scheduler_config.json"
    config = read_json(path, "fetch it again")
    named = config.get("_class_name")
    if named not in SAMPLERS:
        raise ValueError(
            f"{path}: _class_name={named!r} is unknown: only {', '.join(SAMPLERS)} are known"
        )
    require(config, SUPPORTED, path)
    config = {**DEFAULTS, **CLASS_DEFAULTS.get(named, {}), **config}
    sampler = SAMPLERS[named]
    if sampler == "plms" and not config.get("skip_prk_steps"):
        sampler = "pndm"
    return Scheduler(
        _schedule(config),
        PREDICTIONS[config["prediction_type"]],
        sampler,
        _options(config, sampler),
        bool(config["clip_sample"]),
    )


def _schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    name = BETAS[config["beta_schedule"]]
    schedule = {"name": name, "num_steps": config["num_train_timesteps"]}
    if name != "cosine":
        schedule |= {"beta_start": config["beta_start"], "beta_end": config["beta_end"]}
    if config["rescale_betas_zero_snr"]:
        schedule["zero_terminal_snr"] = True
    return schedule


def _options(config: Mapping[str, Any], sampler: str) -> dict[str, Any]:
    spacing = config["timestep_spacing"]
    options: dict[str, Any] = {"spacing": spacing}
    if spacing == "leading" and config["steps_offset"]:
        options["steps_offset"] = config["steps_offset"]
    if sampler in ("ddim", "plms", "pndm") and not config["set_alpha_to_one"]:
        options["final"] = "first"
    return options


def scheduler_config(scheduler: Scheduler) -> dict[str, Any]:
    """What Diffusers reads. ValueError naming what it has no word for."""
    betas = {ours: theirs for theirs, ours in BETAS.items()}
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    classes = {ours: theirs for theirs, ours in SAMPLERS.items()} | {"pndm": "PNDMScheduler"}
    schedule, options = scheduler.schedule, scheduler.options
    known = {"num_train_timesteps": schedule.get("num_steps", 1000)}
    for key, table, value in (
        ("process.schedule.name", betas, schedule["name"]),
        ("process.prediction", predictions, scheduler.prediction),
    ):
        if value not in table:
            raise ValueError(f"{key}={value!r} cannot be written for Diffusers: it has no such one")
    config = {
        **known,
        # A sampler that Diffusers lacks does not change the model: DDIM samples it.
        "_class_name": classes.get(scheduler.sampler, "DDIMScheduler"),
        "beta_schedule": betas[schedule["name"]],
        "prediction_type": predictions[scheduler.prediction],
        "clip_sample": scheduler.clip,
        "rescale_betas_zero_snr": bool(schedule.get("zero_terminal_snr", False)),
        "timestep_spacing": options.get("spacing", "leading"),
        "steps_offset": options.get("steps_offset", 0),
        "set_alpha_to_one": options.get("final", "clean") != "first",
    }
    if "beta_start" in schedule or schedule["name"] != "cosine":
        defaults = {"ddpm_linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
        start, end = defaults[schedule["name"]]
        config["beta_start"] = schedule.get("beta_start", start)
        config["beta_end"] = schedule.get("beta_end", end)
    if scheduler.sampler == "plms":
        config["skip_prk_steps"] = True
    if config["timestep_spacing"] not in ("leading", "linspace", "trailing"):
        config |= {"timestep_spacing": "trailing", "steps_offset": 0}
    return config
