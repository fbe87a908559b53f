"""Diffusers' scheduler_config.json: the schedule of betas and how to sample, both ways.

beta_schedule  linear, scaled_linear, squaredcos_cap_v2    ddpm_linear, scaled_linear, cosine
prediction_type  epsilon, sample, v_prediction             eps, x0, v
_class_name  DDIM, PNDM (skip_prk_steps or not), DDPM,     ddim, plms or pndm, ddpm,
    EulerDiscrete, EulerAncestralDiscrete, HeunDiscrete,   euler, euler_ancestral, heun,
    DPMSolverMultistep, UniPCMultistep                     dpmpp_2m, dpmpp_3m, dpmpp_2m_sde, unipc
    LMSDiscrete, DEISMultistep, KDPM2Discrete, LCM, TCD    lms, deis, dpm2, lcm, tcd
use_karras_sigmas, ..._exponential_..., ..._beta_...       spacing; the schedule's `between`
FlowMatchEulerDiscrete: flow, its shift and time_scale; velocity, by euler at "even" times

Every key is honoured, harmless, or refused by name. Harmless is one that its class does not take,
which Diffusers leaves out as well, and one that has no effect with the others' values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.files import read_json
from diffusion.interop import scheduler_keys as keys
from diffusion.interop.files import naming
from diffusion.interop.scheduler_keys import BETAS, CLASSES, FINAL, PREDICTIONS, SAMPLERS, VARIANCES

# Diffusers' spacings where they are not those of the same name here.
OPEN = {"leading": "open", "linspace": "uniform", "trailing": "trailing"}
EVEN = {"linspace": "even"}
SPACINGS: dict[str, dict[str, str]] = {
    **dict.fromkeys(("dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc", "deis"), OPEN),
    **dict.fromkeys(("euler", "euler_ancestral", "heun", "lms", "dpm2"), EVEN),
}
BY_LEVEL = {f"use_{kind}_sigmas": kind for kind in ("karras", "exponential", "beta")}
BY_LEVEL["use_lu_lambdas"] = "exponential"
LEVEL = ("euler", "euler_ancestral", "heun", "lms", "dpm2")  # work in sigma / alpha, as k-diffusion


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
    classes = {**CLASSES, keys.FLOW_MATCH: keys.FLOW_MATCH_KEYS}
    if named not in classes:
        raise ValueError(
            f"{path}: _class_name={named!r} is unknown: only {', '.join(classes)} are known"
        )
    known = classes[named]
    config = {**{key: default for key, (default, _) in known.items()}, **config}
    everywhere = {key for table in classes.values() for key in table}
    for key, value in config.items():
        if key not in everywhere and not key.startswith("_"):
            raise ValueError(f"{path}: {key}={value!r} is no key of a scheduler that is known here")
        allowed = known.get(key, (None, None))[1]
        default = known.get(key, (None,))[0]
        if not _alike(value, default):
            raise ValueError(
                f"{path}: {key}={value!r} of {named} must be like {default!r}: mend it"
            )
        if allowed is not None and value not in allowed:
            raise ValueError(
                f"{path}: {key}={value!r} of {named} is not supported: only "
                f"{', '.join(map(repr, allowed))}"
            )
    with naming(path):
        if named == keys.FLOW_MATCH:
            schedule = keys.flow_schedule(config)
            return Scheduler(schedule, "velocity", "euler", {"spacing": "even"}, False)
        return _read(config, known, path)


def _alike(value: Any, default: Any) -> bool:
    """Whether a value is of its default's type; a whole number is a float as well."""
    if default is None or isinstance(default, list):
        return True
    kinds = (int, float) if type(default) is float else (type(default),)
    return isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool)


def _read(config: dict[str, Any], known: Mapping[str, Any], path: Path) -> Scheduler:
    sampler = _sampler(config, path)
    _check(config, path)
    return Scheduler(
        _schedule(config, sampler),
        PREDICTIONS[config["prediction_type"]],
        sampler,
        _options(config, sampler, known),
        _clips(config, sampler, path),
        VARIANCES[config.get("variance_type") or "fixed_small"],
    )


def _check(config: Mapping[str, Any], path: Path) -> None:
    """What no single key tells."""
    spacing, named, wrong = config["timestep_spacing"], config["_class_name"], ""
    by_level = [key for key in BY_LEVEL if config.get(key) and key in CLASSES[named]]
    if len(by_level) > 1:
        wrong = f"{by_level[0]}=True and {by_level[1]}=True exclude each other"
    elif by_level and named[:3] == "DPM" and config["beta_schedule"] == "squaredcos_cap_v2":
        wrong = f"{by_level[0]}=True cuts times by float32's last bit with squaredcos_cap_v2"
    elif by_level and config.get("rescale_betas_zero_snr"):
        wrong = f"{by_level[0]}=True has no end with rescale_betas_zero_snr=True"
    betas, total = config.get("trained_betas"), config["num_train_timesteps"]
    if betas and len(betas) != total:
        wrong = f"trained_betas has {len(betas)} entries, and num_train_timesteps={total}"
    ends = [config["beta_start"], config["beta_end"]]
    used = betas or ends * (config["beta_schedule"] != "squaredcos_cap_v2")  # which has none
    if not all(0 < beta <= 1 for beta in used):
        wrong = f"beta_start={ends[0]}, beta_end={ends[1]} and trained_betas must lie in (0, 1]"
    if not 0 <= config["steps_offset"] < total:
        wrong = f"steps_offset={config['steps_offset']} is not below num_train_timesteps={total}"
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


def _schedule(config: Mapping[str, Any], sampler: str) -> dict[str, Any]:
    name = BETAS[config["beta_schedule"]]
    between = _between(config, sampler)
    if config.get("trained_betas"):
        return {"name": "betas", "betas": [float(b) for b in config["trained_betas"]], **between}
    schedule = {"name": name, "num_steps": config["num_train_timesteps"]}
    if name != "cosine":  # which has no ends
        schedule |= {"beta_start": config["beta_start"], "beta_end": config["beta_end"]}
    if config.get("rescale_betas_zero_snr"):
        schedule["zero_terminal_snr"] = True
    return schedule | between


def _by_level(config: Mapping[str, Any]) -> str | None:
    """The key that spaces levels, not times."""
    taken = CLASSES[config["_class_name"]]
    return next((key for key in BY_LEVEL if key in taken and config.get(key)), None)


def _between(config: Mapping[str, Any], sampler: str) -> dict[str, str]:
    """What the network is told of a time between whole ones."""
    key = _by_level(config)
    if sampler == "dpm2" or (key and sampler in LEVEL):
        return {"between": "log"}
    return {"between": "log_round"} if key else {}


def _options(config: Mapping[str, Any], sampler: str, known: Mapping[str, Any]) -> dict[str, Any]:
    spacing = config["timestep_spacing"]
    if sampler in ("lcm", "tcd"):
        more = {} if sampler == "tcd" else {"timestep_scaling": config["timestep_scaling"]}
        return {"original_steps": config["original_inference_steps"], **more}
    options: dict[str, Any] = {"spacing": SPACINGS.get(sampler, {}).get(spacing, spacing)}
    key = _by_level(config)
    if key and sampler in LEVEL:
        options = {"spacing": BY_LEVEL[key], "span": options["spacing"]}
    elif key:  # between the schedule's own ends
        options, spacing = {"spacing": BY_LEVEL[key]}, ""
    if spacing == "leading" and config["steps_offset"]:
        options["steps_offset"] = config["steps_offset"]
    if "set_alpha_to_one" in known and not config["set_alpha_to_one"]:
        options["final"] = "first"
    if "final_sigmas_type" in known and config["final_sigmas_type"] != "zero":
        options["final"] = FINAL[config["final_sigmas_type"]]
    if sampler in LEVEL and spacing != "leading":
        options["prior"] = "level"
    if sampler == "ddim" and config["clip_sample"]:
        options["clip"] = float(config["clip_sample_range"])
    if "solver_order" in known:
        own = sampler in ("unipc", "deis") and config["solver_order"] != 2
        if config["solver_order"] == 1 or own:
            options["order"] = config["solver_order"]
        if not config["lower_order_final"]:
            options["lower_order_final"] = False
    if sampler == "unipc" and config["solver_type"] == "bh1":
        options["variant"] = "bh1"
    return options


def _clips(config: Mapping[str, Any], sampler: str, path: Path) -> bool:
    """x0 to [-1, 1] before it is used; DDIM has an option for what Diffusers does there."""
    if sampler not in ("ddpm", "heun", "lcm") or not config["clip_sample"]:
        return False
    if config["clip_sample_range"] != 1:
        raise ValueError(
            f"{path}: clip_sample_range={config['clip_sample_range']} is not supported: only 1.0"
        )
    return True


def scheduler_config(scheduler: Scheduler) -> dict[str, Any]:
    """What Diffusers reads. ValueError naming what it has no word for."""
    if scheduler.schedule["name"] == "flow":
        return keys.flow_config(scheduler.schedule, scheduler.prediction, scheduler.clip)
    betas = {ours: theirs for theirs, ours in BETAS.items()} | {"betas": "linear"}
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    schedule, options = scheduler.schedule, scheduler.options
    for key, table, value in (
        ("process.schedule.name", betas, schedule["name"]),
        ("process.prediction", predictions, scheduler.prediction),
    ):
        if value not in table:
            raise ValueError(f"{key}={value!r} cannot be written for Diffusers: it has no such one")
    if "betas" not in schedule and schedule.get("time_scale", 1) != 1:
        raise ValueError(
            f"process.schedule.time_scale={schedule['time_scale']} cannot be written for "
            "Diffusers: its networks are told t"
        )
    # A sampler that Diffusers lacks does not change the model: DDIM samples it.
    named = {ours: theirs for theirs, ours in SAMPLERS.items()} | {"plms": "PNDMScheduler"}
    named |= dict.fromkeys(("dpmpp_3m", "dpmpp_2m_sde"), "DPMSolverMultistepScheduler")
    name = named.get(scheduler.sampler, "DDIMScheduler")
    by_level, spacing, options = _written_spacing(scheduler, name)
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
        "original_inference_steps": options.get("original_steps", 50),
        "timestep_scaling": options.get("timestep_scaling", 10.0),
    }
    config |= by_level | _written_betas(schedule)
    if name == "DEISMultistepScheduler":
        config |= {"algorithm_type": "deis", "solver_type": "logrho"}
    if name == "DPMSolverMultistepScheduler":  # whose variance is that of a network of 6 channels
        config["variance_type"] = None
    return {key: value for key, value in config.items() if key in CLASSES[name] or key[0] == "_"}


def _written_spacing(scheduler: Scheduler, name: str) -> tuple[dict[str, bool], str, dict]:
    """The key of a spacing by levels, if it is one, and `timestep_spacing`, the options as if of
    the times between whose levels it is."""
    options = scheduler.options
    keys = {ours: theirs for theirs, ours in BY_LEVEL.items() if theirs != "use_lu_lambdas"}
    key = keys.get(options.get("spacing", ""))
    if key:
        options = {**options, "spacing": options.get("span", "uniform")}
        if key == "use_exponential_sigmas" and scheduler.schedule.get("between") == "log_round":
            key = "use_lu_lambdas"
    default = "leading" if name in ("DDIMScheduler", "PNDMScheduler") else "linspace"
    own, named = options.get("spacing") or default, {"stride": "leading"}
    named |= {ours: theirs for theirs, ours in SPACINGS.get(scheduler.sampler, {}).items()}
    spacing = named.get(own, own)
    if spacing not in (CLASSES[name]["timestep_spacing"][1] or ()):
        spacing = "trailing"
    return {key: True} if key else {}, spacing, options


def _written_betas(schedule: Mapping[str, Any]) -> dict[str, Any]:
    if schedule["name"] == "betas":
        betas = schedule["betas"]
        return {"trained_betas": betas, "num_train_timesteps": len(betas)}
    ends = {"ddpm_linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
    ends = ends.get(schedule["name"], ())  # cosine has none
    return {key: schedule.get(key, end) for key, end in zip(("beta_start", "beta_end"), ends)}
