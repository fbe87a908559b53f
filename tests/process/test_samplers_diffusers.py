"""Each sampler against the unmodified Diffusers scheduler, trajectories within 1e-4 in float32.

Diffusers holds its tables in float32 and so drifts from ours in the fifth digit. Where the two
differ by design the case says so. Schedulers in k-diffusion's variables carry x/alpha. There is no
case for DDIM with linspace spacing: Diffusers evaluates at t = 999, 888, .. but steps to the level
of t - 1000 // steps, which is not the next one (the paper's is: test_samplers_paper.py). Our
"dpmpp_3m" is the published one here; exact=True is checked against its derivation there.
"""

import importlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.process import schedules
from diffusion.process.samplers import SAMPLERS, sample, step_noise

# Diffusers raises NumPy deprecation warnings.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE = schedules.scaled_linear()


@pytest.fixture(scope="module")
def library():
    """(torch, diffusers): their own deprecation warnings at import are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("torch"), importlib.import_module("diffusers")


# our name: (scheduler, its options, our options, steps)
CASES = {
    "ddpm small": ("ddpm", "DDPMScheduler", {"variance_type": "fixed_small", "clip_sample": False,
                   "timestep_spacing": "linspace"}, {"variance": "fixed_small"}, 10),
    "ddpm large": ("ddpm", "DDPMScheduler", {"variance_type": "fixed_large", "clip_sample": False,
                   "timestep_spacing": "leading"},
                   {"variance": "fixed_large", "spacing": "leading"}, 10),
    "ddim leading": ("ddim", "DDIMScheduler", {"clip_sample": False}, {}, 10),
    "ddim ldm": ("ddim", "DDIMScheduler", {"clip_sample": False, "steps_offset": 1,
                 "set_alpha_to_one": False}, {"steps_offset": 1, "final": "first"}, 10),
    "ddim trailing": ("ddim", "DDIMScheduler", {"clip_sample": False,
                      "timestep_spacing": "trailing"}, {"spacing": "trailing"}, 10),
    "ddim eta": ("ddim", "DDIMScheduler", {"clip_sample": False}, {"eta": 0.7}, 10),
    "ddim clipped": ("ddim", "DDIMScheduler", {"clip_sample": True}, {"eta": 0.7}, 10),
    "dpmpp_2m": ("dpmpp_2m", "DPMSolverMultistepScheduler", {}, {}, 10),
    "dpmpp_2m 20": ("dpmpp_2m", "DPMSolverMultistepScheduler", {}, {}, 20),
    "dpmpp_2m first": ("dpmpp_2m", "DPMSolverMultistepScheduler",
                       {"final_sigmas_type": "sigma_min"}, {"final": "first"}, 10),
    "dpmpp_3m": ("dpmpp_3m", "DPMSolverMultistepScheduler", {"solver_order": 3}, {}, 10),
    "dpmpp_3m 20": ("dpmpp_3m", "DPMSolverMultistepScheduler", {"solver_order": 3}, {}, 20),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", "DPMSolverMultistepScheduler",
                     {"algorithm_type": "sde-dpmsolver++"}, {}, 10),
    "unipc 2": ("unipc", "UniPCMultistepScheduler", {}, {}, 10),
    "unipc 3": ("unipc", "UniPCMultistepScheduler", {"solver_order": 3}, {"order": 3}, 10),
    "unipc bh1": ("unipc", "UniPCMultistepScheduler",
                  {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
                  {"variant": "bh1", "final": "first"}, 10),
    "plms": ("plms", "PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1},
             {"steps_offset": 1, "final": "first"}, 10),
    "pndm": ("pndm", "PNDMScheduler", {"skip_prk_steps": False, "steps_offset": 1},
             {"steps_offset": 1, "final": "first"}, 10),
    "euler": ("euler", "EulerDiscreteScheduler", {}, {}, 10),
    "euler trailing": ("euler", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"},
                       {"spacing": "trailing"}, 20),
    "euler_ancestral": ("euler_ancestral", "EulerAncestralDiscreteScheduler", {}, {}, 10),
    "heun": ("heun", "HeunDiscreteScheduler", {}, {}, 10),
}  # fmt: skip
IN_SIGMA = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")
NOISY_STEP = ("DDIMScheduler", "DPMSolverMultistepScheduler")


def hand_over(monkeypatch, torch, scheduler, name, noises, index):
    """Makes this scheduler take step ``index[0]``'s noise from ``noises``."""
    module = importlib.import_module(scheduler.__module__)
    if hasattr(module, "randn_tensor"):

        def give(*args, **kwargs):
            return torch.from_numpy(noises[index[0]])

        monkeypatch.setattr(module, "randn_tensor", give)


def their_trajectory(torch, scheduler, name, x, estimate, noises, ends, options, index):
    """x after each step, for the evaluations in ``ends``."""
    in_sigma = name in IN_SIGMA
    rows = []
    sigmas = scheduler.sigmas.numpy().astype(np.float64) if in_sigma else None

    def alpha(i):
        return 1 / np.sqrt(1 + sigmas[i] ** 2) if in_sigma else 1.0

    y = torch.from_numpy(np.asarray(x / alpha(0), np.float32))
    for i, t in enumerate(scheduler.timesteps):
        inputs = scheduler.scale_model_input(y, t)
        eps = estimate(inputs.numpy(), int(t.round()))
        extra = {"eta": options["eta"]} if "eta" in options else {}
        index[0] = int(np.searchsorted(ends, i))
        y = scheduler.step(torch.from_numpy(eps), t, y, **extra).prev_sample
        rows.append(np.asarray(y) * alpha(i + 1))
    return np.stack(rows)[ends]


@pytest.mark.parametrize("case", CASES)
def test_trajectory(case, exact, library, monkeypatch):
    torch, diffusers = library
    ours, theirs, their_options, our_options, steps = CASES[case]
    clipped = bool(their_options.get("clip_sample"))
    s = SAMPLERS[ours](SCHEDULE, steps, **our_options)
    scheduler = getattr(diffusers, theirs)(**SD, **their_options)
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(s.rows["t"], scheduler.timesteps.numpy(), atol=1e-3)

    keys = jax.random.split(jax.random.key(1), 4)
    x = jnp.asarray(np.random.default_rng(5).normal(size=(4, 6, 1)), jnp.float32)
    denoise = exact.denoiser(SCHEDULE)
    if clipped:
        unclipped, denoise = denoise, lambda x, t: jnp.clip(2 * unclipped(x, t), -1, 1)
    _, xs = sample(s, denoise, x, keys, trajectory=True)

    def eps(x, t):
        a, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
        x = x.astype(np.float64)
        x0 = exact.mixture(x, a, sigma) * (2 if clipped else 1)
        return ((x - a * x0) / sigma).astype(np.float32)

    noises = [np.array(step_noise(keys, i, x)) for i in range(s.steps)]
    index = [0]
    hand_over(monkeypatch, torch, scheduler, theirs, noises, index)
    step = scheduler.step
    if clipped:  # ours recomputes eps from the clipped x0, theirs on request
        monkeypatch.setattr(
            scheduler, "step", lambda *a, **k: step(*a, **k, use_clipped_model_output=True)
        )
    expected = their_trajectory(
        torch, scheduler, theirs, np.asarray(x), eps, noises, s.ends, our_options, index
    )
    for i, (a, b) in enumerate(zip(np.asarray(xs[1:]), expected)):
        assert np.linalg.norm(a - b) / np.linalg.norm(b) < 1e-4, f"step {i}"


def test_flow_euler(exact, library):
    """FlowMatchEulerDiscreteScheduler: its t is 1000 times ours, its output the velocity."""
    torch, diffusers = library
    flow = schedules.flow()
    s = SAMPLERS["euler"](flow, 10)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, 10))
    x = jnp.asarray(np.random.default_rng(5).normal(size=(4, 6, 1)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 4)
    _, xs = sample(s, exact.denoiser(flow), x, keys, trajectory=True)
    y = torch.from_numpy(np.asarray(x).copy())
    for i, t in enumerate(scheduler.timesteps):
        u = float(t) / 1000
        velocity = (y.numpy() - exact.mixture(y.numpy(), 1 - u, u)) / u
        y = scheduler.step(torch.from_numpy(velocity.astype(np.float32)), t, y).prev_sample
        assert np.linalg.norm(xs[i + 1] - y.numpy()) / np.linalg.norm(y.numpy()) < 1e-4


EDM_CASES = {"euler": "EDMEulerScheduler", "dpmpp_2m": "EDMDPMSolverMultistepScheduler"}


@pytest.mark.parametrize("ours, theirs", list(EDM_CASES.items()))
def test_edm(exact, library, ours, theirs):
    """On EDM's levels; the network's output is F, its input scaled, in both."""
    torch, diffusers = library
    edm = schedules.edm()
    s = SAMPLERS[ours](edm, 10)
    scheduler = getattr(diffusers, theirs)()
    scheduler.set_timesteps(10)
    x = 80 * jnp.asarray(np.random.default_rng(5).normal(size=(4, 6, 1)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 4)
    _, xs = sample(s, exact.denoiser(edm), x, keys, trajectory=True)
    y = torch.from_numpy(np.asarray(x).copy())
    for i, t in enumerate(scheduler.timesteps):
        sigma = float(np.exp(4 * float(t)))
        np.testing.assert_allclose(sigma, s.rows["t"][i], rtol=1e-4)
        scheduler.scale_model_input(y, t)
        x0 = exact.mixture(y.numpy().astype(np.float64), 1.0, sigma)
        c_skip = 0.25 / (sigma**2 + 0.25)
        c_out = sigma * 0.5 / np.sqrt(sigma**2 + 0.25)
        f = ((x0 - c_skip * y.numpy()) / c_out).astype(np.float32)
        y = scheduler.step(torch.from_numpy(f), t, y).prev_sample
        assert np.linalg.norm(xs[i + 1] - y.numpy()) / np.linalg.norm(y.numpy()) < 1e-4, i
