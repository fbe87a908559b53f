"""Diffusers' scheduler_config.json: the schedule of betas and how to sample, both ways.

beta_schedule  linear, scaled_linear, squaredcos_cap_v2    ddpm_linear, scaled_linear, cosine
prediction_type  epsilon, sample, v_prediction             eps, x0, v
_class_name  DDIM, PNDM (skip_prk_steps or not), DDPM,     ddim, plms or pndm, ddpm,
    EulerDiscrete, EulerAncestralDiscrete, HeunDiscrete,   euler, euler_ancestral, heun,
    DPMSolverMultistep, UniPCMultistep                     dpmpp_2m, dpmpp_3m, dpmpp_2m_sde, unipc

Every key is honoured, harmless, or refused by name. Harmless is one that its class does not take,
which Diffusers leaves out as well, and one that has no effect with the others' values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.files import read_json
from diffusion.interop.scheduler_keys import BETAS, CLASSES, FINAL, PREDICTIONS, VARIANCES

SAMPLERS = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "DDPMScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
}
# Diffusers' spacings where they are not those of the same name here.
OPEN = {"leading": "open", "linspace": "uniform", "trailing": "trailing"}
EVEN = {"linspace": "even"}
SPACINGS: dict[str, dict[str, str]] = {
    **dict.fromkeys(("dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc"), OPEN),
    **dict.fromkeys(("euler", "euler_ancestral", "heun"), EVEN),
}


@dataclass(frozen=True)
class Scheduler:
    """`schedule`: name and arguments of one of `process/schedules.py`; `sampler` and
    `options` likewise of `process/samplers`; `clip`: predicted x0 to [-1, 1]; `variance`: of DDPM's
    steps, or what the network has learned.
    """

    schedule: dict[str, Any]
    prediction: str
    sampler: str
    options: dict[str, Any]
    clip: bool
    variance: str = "fixed_large"


def read_scheduler(directory: str | Path, **replaced: Any) -> Scheduler:
    """From `scheduler_config.json` in `directory`. ValueError naming the file and the key.

    `replaced`: what a pipeline sets whatever the file says.
    """
    path = Path(directory) / "scheduler_config.json"
    config = read_json(path, "fetch it again") | replaced
    named = str(config.get("_class_name")).removeprefix("Flax")
    config["_class_name"] = named
    if named not in CLASSES:
        raise ValueError(
            f"{path}: _class_name={named!r} is unknown: only {', '.join(CLASSES)} are known"
        )
    known = CLASSES[named]
    config = {**{key: default for key, (default, _) in known.items()}, **config}
    everywhere = {key for keys in CLASSES.values() for key in keys}
    for key, value in config.items():
        if key not in everywhere and not key.startswith("_"):
            raise ValueError(f"{path}: {key}={value!r} is no key of a scheduler that is known here")
        allowed = known.get(key, (None, None))[1]
        if allowed is not None and value not in allowed:
            raise ValueError(
                f"{path}: {key}={value!r} of {named} is not supported: only "
                f"{', '.join(map(repr, allowed))}"
            )
    sampler = _sampler(config, path)
    _check(config, path)
    return Scheduler(
        _schedule(config),
        PREDICTIONS[config["prediction_type"]],
        sampler,
        _options(config, sampler, known),
        _clips(config, sampler, path),
        VARIANCES[config.get("variance_type") or "fixed_small"],
    )


def _check(config: Mapping[str, Any], path: Path) -> None:
    """What no single key tells."""
    spacing, named, wrong = config["timestep_spacing"], config["_class_name"], ""
    last = spacing == "trailing" or (spacing == "leading" and config["steps_offset"])
    if config.get("variance_type") == "fixed_large" and named == "DDPMScheduler" and last:
        wrong = f"variance_type='fixed_large' with timestep_spacing={spacing!r} ends with noise"
    endless = named == "UniPCMultistepScheduler" and config["final_sigmas_type"] == "zero"
    if endless and not config["lower_order_final"]:
        wrong = "lower_order_final=False with final_sigmas_type='zero' has an infinite last step"
    if wrong:
        raise ValueError(f"{path}: {wrong}: it is not supported")


def _sampler(config: Mapping[str, Any], path: Path) -> str:
    sampler, order = SAMPLERS[config["_class_name"]], config.get("solver_order")
    if sampler == "pndm" and config["skip_prk_steps"]:
        return "plms"
    if sampler != "dpmpp_2m":
        return sampler
    sde = config["algorithm_type"] == "sde-dpmsolver++"
    if sde and order == 3:
        raise ValueError(f"{path}: solver_order=3 is not supported with sde-dpmsolver++: only 1, 2")
    return "dpmpp_2m_sde" if sde else "dpmpp_3m" if order == 3 else "dpmpp_2m"


def _schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    name = BETAS[config["beta_schedule"]]
    schedule = {"name": name, "num_steps": config["num_train_timesteps"]}
    if name != "cosine":  # which has no ends
        schedule |= {"beta_start": config["beta_start"], "beta_end": config["beta_end"]}
    if config.get("rescale_betas_zero_snr"):
        schedule["zero_terminal_snr"] = True
    return schedule


def _options(config: Mapping[str, Any], sampler: str, known: Mapping[str, Any]) -> dict[str, Any]:
    spacing = config["timestep_spacing"]
    options: dict[str, Any] = {"spacing": SPACINGS.get(sampler, {}).get(spacing, spacing)}
    if spacing == "leading" and config["steps_offset"]:
        options["steps_offset"] = config["steps_offset"]
    if "set_alpha_to_one" in known and not config["set_alpha_to_one"]:
        options["final"] = "first"
    if "final_sigmas_type" in known and config["final_sigmas_type"] != "zero":
        options["final"] = FINAL[config["final_sigmas_type"]]
    if sampler in ("euler", "euler_ancestral", "heun") and spacing != "leading":
        options["prior"] = "level"
    if sampler == "ddim" and config["clip_sample"]:
        options["clip"] = float(config["clip_sample_range"])
    if "solver_order" in known:
        if config["solver_order"] == 1 or (sampler == "unipc" and config["solver_order"] != 2):
            options["order"] = config["solver_order"]
        if not config["lower_order_final"]:
            options["lower_order_final"] = False
    if sampler == "unipc" and config["solver_type"] == "bh1":
        options["variant"] = "bh1"
    return options


def _clips(config: Mapping[str, Any], sampler: str, path: Path) -> bool:
    """x0 to [-1, 1] before it is used; DDIM has an option for what Diffusers does there."""
    if sampler not in ("ddpm", "heun") or not config["clip_sample"]:
        return False
    if config["clip_sample_range"] != 1:
        raise ValueError(
            f"{path}: clip_sample_range={config['clip_sample_range']} is not supported: only 1.0"
        )
    return True


def scheduler_config(scheduler: Scheduler) -> dict[str, Any]:
    """What Diffusers reads. ValueError naming what it has no word for."""
    betas = {ours: theirs for theirs, ours in BETAS.items()}
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    schedule, options = scheduler.schedule, scheduler.options
    for key, table, value in (
        ("process.schedule.name", betas, schedule["name"]),
        ("process.prediction", predictions, scheduler.prediction),
    ):
        if value not in table:
            raise ValueError(f"{key}={value!r} cannot be written for Diffusers: it has no such one")
    if schedule.get("time_scale", 1) != 1:
        raise ValueError(
            f"process.schedule.time_scale={schedule['time_scale']} cannot be written for "
            "Diffusers: its networks are told t"
        )
    # A sampler that Diffusers lacks does not change the model: DDIM samples it.
    named = {ours: theirs for theirs, ours in SAMPLERS.items()} | {"plms": "PNDMScheduler"}
    named |= dict.fromkeys(("dpmpp_3m", "dpmpp_2m_sde"), "DPMSolverMultistepScheduler")
    name = named.get(scheduler.sampler, "DDIMScheduler")
    spacings = SPACINGS.get(scheduler.sampler, {})
    default = "leading" if name in ("DDIMScheduler", "PNDMScheduler") else "linspace"
    spacing = {ours: theirs for theirs, ours in spacings.items()}.get(
        options.get("spacing", ""), options.get("spacing", default)
    )
    spacing = "leading" if spacing == "stride" else spacing
    if spacing not in (CLASSES[name]["timestep_spacing"][1] or ()):
        spacing = "trailing"
    config = {
        "_class_name": name,
        "num_train_timesteps": schedule.get("num_steps", 1000),
        "beta_schedule": betas[schedule["name"]],
        "prediction_type": predictions[scheduler.prediction],
        "clip_sample": scheduler.clip or "clip" in options,
        "clip_sample_range": options.get("clip", 1.0),
        "rescale_betas_zero_snr": bool(schedule.get("zero_terminal_snr", False)),
        "timestep_spacing": spacing,
        "steps_offset": options.get("steps_offset", 0) if spacing == "leading" else 0,
        "set_alpha_to_one": options.get("final", "clean") != "first",
        "final_sigmas_type": "sigma_min" if options.get("final") == "first" else "zero",
        "skip_prk_steps": scheduler.sampler == "plms",
        "solver_order": options.get("order", 3 if scheduler.sampler == "dpmpp_3m" else 2),
        "lower_order_final": options.get("lower_order_final", True),
        "solver_type": options.get("variant", "bh2") if name[:5] == "UniPC" else "midpoint",
        "algorithm_type": ("sde-" if scheduler.sampler == "dpmpp_2m_sde" else "") + "dpmsolver++",
        "variance_type": "learned_range" if scheduler.variance == "learned" else scheduler.variance,
    }
    if schedule["name"] != "cosine":
        start, end = {"ddpm_linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}[
            schedule["name"]
        ]
        config["beta_start"] = schedule.get("beta_start", start)
        config["beta_end"] = schedule.get("beta_end", end)
    if name == "DPMSolverMultistepScheduler":  # whose variance is that of a network of 6 channels
        config["variance_type"] = None
    return {key: value for key, value in config.items() if key in CLASSES[name] or key[0] == "_"}
