"""A scheduler file that is read samples as Diffusers does: final latents of a closed-form network.

The network is the posterior mean of data N(mu, 1/4), told in the scheduler's own prediction. Both
sides compute in float64, Diffusers from its float32 tables: they agree to some 1e-6.
"""

import importlib
import itertools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from diffusion.interop import scheduler
from diffusion.process import samplers
from diffusion.process.samplers import step_noise
from experiments.run import build

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

RNG = np.random.default_rng(0)
X, MU = RNG.normal(size=(2, 4, 4, 3)), 0.8 * RNG.normal(size=(1, 4, 4, 3))
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KEYS = jax.random.split(jax.random.key(0), 2)
SIGMAS = [{f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta")]
# class: what is varied besides spacing, offset, prediction and steps
CLASSES = {
    "DDIMScheduler": [
        {"clip_sample": clip, "clip_sample_range": size, "set_alpha_to_one": one}
        for clip, size, one in ((False, 1.0, True), (False, 1.0, False), (True, 0.7, True))
    ],
    "DDPMScheduler": [
        {"variance_type": kind, "clip_sample": clip}
        for kind, clip in (
            *(("fixed_small", False), ("fixed_small_log", False), ("fixed_large", False)),
            ("fixed_small", True),
        )
    ],
    "PNDMScheduler": [
        {"skip_prk_steps": skip, "set_alpha_to_one": one}
        for skip, one in ((True, False), (False, False), (True, True))
    ],
    "EulerDiscreteScheduler": [{}, *SIGMAS],
    "EulerAncestralDiscreteScheduler": [{}],
    "HeunDiscreteScheduler": [{}, {"clip_sample": True}, *SIGMAS],
    "DPMSolverMultistepScheduler": [
        {},
        {"solver_order": 1},
        {"solver_order": 3},
        {"algorithm_type": "sde-dpmsolver++"},
        {"final_sigmas_type": "sigma_min"},
        {"lower_order_final": False},
        {"euler_at_final": False, "solver_type": "logrho"},
        {"use_karras_sigmas": True},
        {"use_lu_lambdas": True},
        {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
    ],
    "UniPCMultistepScheduler": [
        {},
        {"solver_order": 1},
        {"solver_order": 3},
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {"solver_type": "midpoint"},
        {"use_karras_sigmas": True},
    ],
    "LMSDiscreteScheduler": [{}, *SIGMAS],
    "DEISMultistepScheduler": [
        *({}, {"solver_order": 1}, {"solver_order": 3}, {"lower_order_final": False}),
        {"use_karras_sigmas": True},
    ],
    "KDPM2DiscreteScheduler": [{}, *SIGMAS[1:]],
    "LCMScheduler": [
        *({}, {"clip_sample": True}, {"original_inference_steps": 100, "timestep_scaling": 3.0}),
        # Betas up to 0.03 leave a signal of 5e-4, which theirs, in float32, divides by: 1.4e-5.
        {"trained_betas": np.linspace(1e-4, 0.015, 1000).tolist()},
    ],
    "TCDScheduler": [{}, {"clip_sample": True}, {"original_inference_steps": 100}],
}
LATER = ("LMS", "DEIS", "KDPM2", "LCM", "TCD")
LATER = tuple(name for name in CLASSES if name.startswith(LATER))


@pytest.fixture(scope="module")
def library():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("torch"), importlib.import_module("diffusers")


@pytest.fixture(autouse=True)
def doubles():
    """Of hundreds of programs none is needed again: together they exhaust a process's mappings."""
    with jax.enable_x64(True):
        yield
    jax.clear_caches()


def network(x, alpha, sigma, prediction):
    x0 = MU + alpha / 4 / (alpha**2 / 4 + sigma**2) * (x - alpha * MU)
    eps = (x - alpha * x0) / sigma
    return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[prediction]


def theirs(library, monkeypatch, made, steps):
    torch, _ = library
    made.set_timesteps(steps)
    table = np.asarray(made.alphas_cumprod, np.float64)
    index = [0]
    noise = lambda *_, **__: torch.from_numpy(np.array(step_noise(KEYS, index[0], jnp.asarray(X))))  # noqa: E731
    module = importlib.import_module(type(made).__module__)
    monkeypatch.setattr(module, "randn_tensor", noise, raising=False)
    y = torch.from_numpy(X * float(made.init_noise_sigma))
    for i, t in enumerate(made.timesteps):
        index[0] = i
        bar = np.interp(float(t), np.arange(len(table)), table)
        x = np.asarray(made.scale_model_input(y, t))
        out = network(x, np.sqrt(bar), np.sqrt(1 - bar), made.config.prediction_type)
        y = made.step(torch.from_numpy(out), t, y).prev_sample
    return np.asarray(y)


def written(tmp_path, config):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    return tmp_path


def settings(read, steps):
    config = common.denoiser()
    config.process.schedule = read.schedule
    config.process.prediction = read.prediction
    config.process.variance = read.variance
    config.sample.update({"sampler": read.sampler, "steps": steps, "clip": read.clip})
    config.sample.options = read.options
    return build.settings(config)


def ours(read, steps):
    how = settings(read, steps)
    names = {ours: theirs for theirs, ours in scheduler.PREDICTIONS.items()}

    def predict(x, t, told):
        bar = jnp.interp(t, np.arange(how.schedule.num_steps), how.schedule.alpha_bar)
        alpha, sigma = (jnp.sqrt(v).reshape(-1, 1, 1, 1) for v in (bar, 1 - bar))
        return network(x, alpha, sigma, names[read.prediction])

    x = jnp.asarray(X) * how.method().prior_std
    return np.asarray(samplers.sample(how.method(), how.denoise(predict, None), x, KEYS))


def compared(
    library, monkeypatch, tmp_path, name, predictions, every, thin=False
) -> tuple[int, int]:
    """How many agreed, and how many were refused by name. `thin`: a fifth of what is slow."""
    _, diffusers = library
    agreed = refused = 0
    spacings = ("leading", "linspace", "trailing")
    product = itertools.product(spacings, (0, 1), predictions, CLASSES[name])
    for number, (spacing, offset, prediction, more) in enumerate(product):
        if thin and number % 5 and (name in LATER or any(key[:4] == "use_" for key in more)):
            continue
        given = {**SD, "timestep_spacing": spacing, "prediction_type": prediction, **more}
        given["steps_offset"] = offset
        folder = written(tmp_path, {**given, "_class_name": name})
        try:
            read = scheduler.read_scheduler(folder)
        except ValueError as error:
            assert "scheduler_config.json: " in str(error)
            refused += 1
            continue
        for steps in every:
            if steps == 1 and spacing == "linspace" and name[:3] not in ("DPM", "Uni"):
                continue  # theirs is t = 0, which has no noise to remove
            if steps == 1 and name[:4] == "DEIS" and more.get("use_karras_sigmas"):
                continue  # theirs ends where it begins
            made = getattr(diffusers, name)(**given)
            try:
                found = ours(read, steps)
            except ValueError as error:
                assert steps == 1 and "pndm makes 3 Runge-Kutta steps first" in str(error)
                continue
            wanted = theirs(library, monkeypatch, made, steps)
            error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
            assert error < 1e-5, (given, steps, error)
            agreed += 1
    return agreed, refused


# What Diffusers has and no sampler here does (the module's CLASSES say why), of 6 spacings and
# offsets, 2 predictions and the cases above.
REFUSED = {
    "DDIMScheduler": 2 * 2 * 3,  # linspace
    "DDPMScheduler": 3 * 2,  # fixed_large with trailing, and with leading and an offset
    "PNDMScheduler": 6 * 3 + 2 * 3,  # v; linspace
}


@pytest.mark.parametrize("name", CLASSES)
def test_final_latents_are_diffusers(name, library, monkeypatch, tmp_path):
    predictions = ("epsilon", "v_prediction")
    # Of eight steps the times of "linspace" are no whole ones. PNDM is given an even stride: of an
    # odd one Diffusers rounds the half-way times of its Runge-Kutta steps (`samplers/plms.py`).
    every = (1, 10) if name == "PNDMScheduler" else (1, 8)
    agreed, refused = compared(library, monkeypatch, tmp_path, name, predictions, every, thin=True)
    assert refused == REFUSED.get(name, 0)
    assert agreed >= 9


@pytest.mark.slow  # the whole product: two minutes
@pytest.mark.parametrize("name", CLASSES)
def test_final_latents_are_diffusers_for_all_steps(name, library, monkeypatch, tmp_path):
    predictions = ("epsilon", "v_prediction", "sample")
    compared(library, monkeypatch, tmp_path, name, predictions, (1, 4, 10, 25, 50))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("DDIMScheduler", "thresholding", True),
        ("KDPM2DiscreteScheduler", "use_karras_sigmas", True),
        ("DEISMultistepScheduler", "use_exponential_sigmas", True),
        ("DPMSolverMultistepScheduler", "use_beta_sigmas", True),
        ("UniPCMultistepScheduler", "use_exponential_sigmas", True),
        ("DDIMScheduler", "beta_schedule", "sigmoid"),
        ("DDIMScheduler", "a_key_of_tomorrow", 1),
        ("DDPMScheduler", "variance_type", "fixed_large_log"),
        ("DDPMScheduler", "clip_sample_range", 2.0),
        ("PNDMScheduler", "prediction_type", "v_prediction"),
        ("EulerDiscreteScheduler", "interpolation_type", "log_linear"),
        ("EulerDiscreteScheduler", "beta_start", 1.5),
        ("EulerDiscreteScheduler", "beta_start", 0.0),
        ("DDIMScheduler", "steps_offset", -1),
        ("DDIMScheduler", "steps_offset", 1000),
        ("EulerDiscreteScheduler", "timestep_type", "continuous"),
        ("EulerDiscreteScheduler", "sigma_max", 10.0),
        ("EulerDiscreteScheduler", "final_sigmas_type", "sigma_min"),
        ("DPMSolverMultistepScheduler", "algorithm_type", "dpmsolver"),
        ("DPMSolverMultistepScheduler", "solver_type", "heun"),
        ("DPMSolverMultistepScheduler", "euler_at_final", True),
        ("DPMSolverMultistepScheduler", "lambda_min_clipped", -5.1),
        ("DPMSolverMultistepScheduler", "use_flow_sigmas", True),
        ("UniPCMultistepScheduler", "predict_x0", False),
        ("UniPCMultistepScheduler", "disable_corrector", [0]),
        ("UniPCMultistepScheduler", "lower_order_final", False),
    ],
)
def test_what_has_no_equal_is_refused_by_name(name, key, value, tmp_path):
    folder = written(tmp_path, {"_class_name": name, key: value})
    with pytest.raises(ValueError, match=rf"scheduler_config\.json: {key}="):
        scheduler.read_scheduler(folder)


def test_a_key_of_another_class_is_left_out_as_diffusers_leaves_it(tmp_path):
    folder = written(tmp_path, {"_class_name": "DDIMScheduler", "use_karras_sigmas": True})
    assert scheduler.read_scheduler(folder).sampler == "ddim"


def test_every_key_of_every_class_is_known(library):
    """A key that a newer Diffusers takes has to be thought of here."""
    import inspect

    for name, known in scheduler.CLASSES.items():
        taken = inspect.signature(getattr(library[1], name).__init__).parameters.keys() - {"self"}
        assert taken == known.keys(), name
        for key, (default, _) in known.items():
            signature = inspect.signature(getattr(library[1], name).__init__)
            assert signature.parameters[key].default == default, (name, key)


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_read_is_written_again(name, library, tmp_path):
    for more in CLASSES[name]:
        spacing = "trailing" if more.get("variance_type") != "fixed_large" else "leading"
        given = {"_class_name": name, **SD, "timestep_spacing": spacing, **more}
        read = scheduler.read_scheduler(written(tmp_path, given))
        again = scheduler.scheduler_config(read)
        assert again["_class_name"] == name
        assert scheduler.read_scheduler(written(tmp_path, again)) == read
        getattr(library[1], name).from_config(again)


def test_a_learned_variance_is_said(library, tmp_path):
    described = scheduler.Scheduler({"name": "cosine"}, "eps", "ddpm", {}, False, "learned")
    config = scheduler.scheduler_config(described)
    assert config["variance_type"] == "learned_range" and "beta_start" not in config
    assert scheduler.read_scheduler(written(tmp_path, config)).variance == "learned"
    torch, diffusers = library
    made = diffusers.DDPMScheduler.from_config(config)
    made.set_timesteps(4)
    x = torch.zeros(1, 3, 8, 8)
    made.step(torch.zeros(1, 6, 8, 8), made.timesteps[0], x)  # takes twice the channels
