"""The keys of Diffusers' scheduler files, by class: defaults, and values that have an equal here.

Where a value has none, `scheduler.py` refuses it by name.
"""

from collections.abc import Mapping
from typing import Any

SAMPLERS = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "DDPMScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
    "LMSDiscreteScheduler": "lms",
    "DEISMultistepScheduler": "deis",
    "KDPM2DiscreteScheduler": "dpm2",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
}
BETAS = {"linear": "ddpm_linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
SPACED = ("leading", "linspace", "trailing")
OFF = (None, False)

# What every class takes: (its default, the values there is an equal of here; None: any).
COMMON: dict[str, tuple[Any, tuple | None]] = {
    "num_train_timesteps": (1000, None),
    "beta_start": (0.0001, None),
    "beta_end": (0.02, None),
    "beta_schedule": ("linear", tuple(BETAS)),
    "trained_betas": (None, None),
    "prediction_type": ("epsilon", tuple(PREDICTIONS)),
    "steps_offset": (0, None),
}
ZERO_SNR: dict[str, tuple[Any, tuple | None]] = {"rescale_betas_zero_snr": (False, None)}
# Without thresholding its ratio and greatest value have no effect.
THRESHOLD = {
    "thresholding": (False, OFF),
    "dynamic_thresholding_ratio": (0.995, None),
    "sample_max_value": (1.0, None),
}
SIGMAS: dict[str, tuple[Any, tuple | None]] = {
    f"use_{kind}_sigmas": (False, None) for kind in ("karras", "exponential", "beta")
}
# Where Diffusers cuts times to whole ones: the least and the greatest by float32's last bit.
WHOLE = SIGMAS | dict.fromkeys(("use_exponential_sigmas", "use_beta_sigmas"), (False, OFF))
FLOW = {  # without its sigmas the shift has no effect
    "use_flow_sigmas": (False, OFF),
    "flow_shift": (1.0, None),
    "use_dynamic_shifting": (False, OFF),
    "time_shift_type": ("exponential", None),
}
ENDS = {"sigma_min": (None, OFF), "sigma_max": (None, OFF)}
VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",  # the same by way of its logarithm
    "fixed_large": "fixed_large",
    "learned_range": "learned",
}
FEW: dict[str, tuple[Any, tuple | None]] = {
    **(COMMON | ZERO_SNR | THRESHOLD),
    "beta_start": (0.00085, None),
    "beta_end": (0.012, None),
    "beta_schedule": ("scaled_linear", tuple(BETAS)),
    "original_inference_steps": (50, None),
    "clip_sample": (False, None),
    "clip_sample_range": (1.0, None),
    # Of no effect: the last time is stepped to itself, and the times are counted from the others'.
    "set_alpha_to_one": (True, None),
    "timestep_spacing": ("leading", None),
    "timestep_scaling": (10.0, None),
}
FINAL = {"zero": "clean", "sigma_min": "first"}
# Of rectified flow, which has no betas; without dynamic shifting five of its keys have no effect.
FLOW_MATCH = "FlowMatchEulerDiscreteScheduler"
FLOW_MATCH_KEYS: dict[str, tuple[Any, tuple | None]] = {
    "num_train_timesteps": (1000, None),
    "shift": (1.0, None),
    "use_dynamic_shifting": (False, OFF),
    "base_shift": (0.5, None),
    "max_shift": (1.15, None),
    "base_image_seq_len": (256, None),
    "max_image_seq_len": (4096, None),
    "time_shift_type": ("exponential", ("exponential", "linear")),
    "invert_sigmas": (False, OFF),
    "shift_terminal": (None, OFF),
    "stochastic_sampling": (False, OFF),
    **{f"use_{kind}_sigmas": (False, OFF) for kind in ("karras", "exponential", "beta")},
}
CLASSES: dict[str, dict[str, tuple[Any, tuple | None]]] = {
    "DDIMScheduler": {
        **(COMMON | ZERO_SNR | THRESHOLD),
        # With "linspace" it steps to the level of t - T // n, which is no next time.
        "timestep_spacing": ("leading", ("leading", "trailing")),
        "clip_sample": (True, None),
        "clip_sample_range": (1.0, None),
        "set_alpha_to_one": (True, None),
    },
    "DDPMScheduler": {
        **(COMMON | ZERO_SNR | THRESHOLD),
        "timestep_spacing": ("leading", SPACED),
        "clip_sample": (True, None),
        "clip_sample_range": (1.0, None),
        "variance_type": ("fixed_small", tuple(VARIANCES)),
    },
    "PNDMScheduler": {
        **COMMON,
        "timestep_spacing": ("leading", ("leading", "trailing")),  # as DDIM's
        "prediction_type": ("epsilon", ("epsilon",)),  # it combines v, where eps is combined here
        "set_alpha_to_one": (False, None),
        "skip_prk_steps": (False, None),
    },
    "EulerDiscreteScheduler": {
        **(COMMON | ZERO_SNR | SIGMAS | ENDS),
        "timestep_spacing": ("linspace", SPACED),
        "interpolation_type": ("linear", ("linear",)),
        "timestep_type": ("discrete", ("discrete",)),
        "final_sigmas_type": ("zero", ("zero",)),  # it gives x / alpha there
    },
    "EulerAncestralDiscreteScheduler": {
        **(COMMON | ZERO_SNR),
        "prediction_type": ("epsilon", ("epsilon", "v_prediction")),  # it refuses samples itself
        "timestep_spacing": ("linspace", SPACED),
    },
    "HeunDiscreteScheduler": {
        **(COMMON | SIGMAS),
        "beta_start": (0.00085, None),
        "beta_end": (0.012, None),
        "timestep_spacing": ("linspace", SPACED),
        "clip_sample": (False, None),
        "clip_sample_range": (1.0, None),
    },
    "DPMSolverMultistepScheduler": {
        **(COMMON | ZERO_SNR | WHOLE | THRESHOLD | FLOW),
        "timestep_spacing": ("linspace", SPACED),
        "algorithm_type": ("dpmsolver++", ("dpmsolver++", "sde-dpmsolver++")),
        "solver_order": (2, (1, 2, 3)),
        "solver_type": ("midpoint", ("midpoint", "logrho", "bh1", "bh2")),  # all of them the first
        "lower_order_final": (True, None),
        "euler_at_final": (False, OFF),
        "use_lu_lambdas": (False, None),
        "lambda_min_clipped": (float("-inf"), (float("-inf"),)),
        "variance_type": (None, OFF),
        "final_sigmas_type": ("zero", tuple(FINAL)),
    },
    "UniPCMultistepScheduler": {
        **(COMMON | ZERO_SNR | WHOLE | THRESHOLD | FLOW | ENDS),
        "timestep_spacing": ("linspace", SPACED),
        "predict_x0": (True, (True,)),
        "solver_order": (2, (1, 2, 3)),
        "solver_type": ("bh2", ("bh1", "bh2", "midpoint", "heun", "logrho")),  # the last three: bh2
        "lower_order_final": (True, None),
        "disable_corrector": ([], ([], None)),
        "solver_p": (None, OFF),
        "shift_terminal": (None, OFF),
        "final_sigmas_type": ("zero", tuple(FINAL)),
    },
    "LMSDiscreteScheduler": {**(COMMON | SIGMAS), "timestep_spacing": ("linspace", SPACED)},
    "DEISMultistepScheduler": {
        **(COMMON | WHOLE | THRESHOLD | FLOW),
        "timestep_spacing": ("linspace", SPACED),
        "algorithm_type": ("deis", ("deis",)),
        "solver_order": (2, (1, 2, 3)),
        "solver_type": ("logrho", ("logrho",)),
        "lower_order_final": (True, None),
    },
    "KDPM2DiscreteScheduler": {
        **(COMMON | SIGMAS),
        "use_karras_sigmas": (False, OFF),  # it rounds whole times then, and half-way ones not
        "beta_start": (0.00085, None),
        "beta_end": (0.012, None),
        "prediction_type": ("epsilon", ("epsilon", "v_prediction")),  # it refuses samples itself
        "timestep_spacing": ("linspace", SPACED),
    },
    "LCMScheduler": FEW,
    "TCDScheduler": FEW,  # which clips nothing
}


def flow_schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rectified flow of `FLOW_MATCH_KEYS`, as `process/schedules.py` has it."""
    scale, shift = config["num_train_timesteps"], config["shift"]
    if not scale >= 2 or not 0 < shift < float("inf"):
        raise ValueError(
            f"num_train_timesteps={scale} must be at least 2 and shift={shift} above 0: fetch it "
            "again"
        )
    return {"name": "flow", "time_scale": scale, "shift": shift}


def flow_config(schedule: Mapping[str, Any], prediction: str, clip: bool) -> dict[str, Any]:
    """Its file; whichever the sampler, Diffusers takes Euler's steps. ValueError for another."""
    scale, shift = schedule.get("time_scale", 1000), schedule.get("shift", 1)
    if prediction != "velocity" or scale != int(scale) or scale < 2 or clip:
        raise ValueError(
            f"process.prediction={prediction!r} with process.schedule.time_scale={scale} and "
            f"sample.clip={clip} cannot be written for Diffusers, whose flow predicts a velocity "
            "at a whole number of times and clips nothing: keep this run's own checkpoint"
        )
    return {"_class_name": FLOW_MATCH, "num_train_timesteps": int(scale), "shift": float(shift)}
