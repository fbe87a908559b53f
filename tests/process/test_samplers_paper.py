"""Each one-step sampler against its paper, transcribed in NumPy in the paper's own variables.

Whole trajectories agree within 1e-10 in float64. The denoiser is the exact one of a two-component
Gaussian mixture, so the trajectories bend; noise is handed over.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.process import gaussian, schedules
from diffusion.process.samplers import SAMPLERS, make_grid, sample, step_noise

SHORT = schedules.ddpm_linear(20, 1e-3, 0.3)  # every step of it is cheap
LONG = schedules.scaled_linear()
EDM = schedules.edm()


# DDPM, Algorithm 2 -----------------------------------------------------------------------------


def ddpm(exact, betas, variance):
    bars = np.cumprod(1 - betas)

    def steps(x, noises):
        for i, t in enumerate(reversed(range(len(betas)))):
            beta, bar, before = betas[t], bars[t], bars[t - 1] if t else 1.0
            x = (x - beta / np.sqrt(1 - bar) * exact.eps(x, bar)) / np.sqrt(1 - beta)
            chosen = beta if variance == "fixed_large" else (1 - before) / (1 - bar) * beta
            x = x + np.sqrt(chosen) * noises[i] * (t > 0)
            yield x

    return steps


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm(run, exact, variance):
    run(SHORT, "ddpm", ddpm(exact, SHORT.betas, variance), variance=variance)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_respaced(run, exact, variance):
    """Improved DDPM §4: the same algorithm on the betas of the levels kept."""
    bars = LONG.alpha_bar[[0, 333, 666, 999]]
    betas = 1 - bars / np.append(1, bars[:-1])
    run(LONG, "ddpm", ddpm(exact, betas, variance), steps=4, variance=variance)


def test_ddpm_learned_variance(exact, x64):
    """Improved DDPM eq. 15, the network output v in [-1, 1] mapped to a fraction in [0, 1]."""
    betas, bars = SHORT.betas, SHORT.alpha_bar
    s = SAMPLERS["ddpm"](SHORT, variance="learned")
    keys = jax.random.split(jax.random.key(7), 3)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(3, 5, 1)))
    denoise = exact.denoiser(SHORT)
    out, xs = sample(s, lambda x, t: (denoise(x, t), jnp.sin(3 * x)), x, keys, trajectory=True)
    y = np.asarray(x)
    for i, t in enumerate(reversed(range(20))):
        before = bars[t - 1] if t else 1.0
        tilde = betas * (1 - np.append(1, bars[:-1])) / (1 - bars)
        fraction = (np.sin(3 * y) + 1) / 2
        log_variance = fraction * np.log(betas[t]) + (1 - fraction) * np.log(tilde[max(t, 1)])
        mean = np.sqrt(before) * betas[t] / (1 - bars[t]) * exact.mixture(y, *exact.level(bars[t]))
        mean += np.sqrt(1 - betas[t]) * (1 - before) / (1 - bars[t]) * y
        y = mean + (t > 0) * np.exp(log_variance / 2) * np.asarray(step_noise(keys, i, x))
        np.testing.assert_allclose(xs[i + 1], y, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(out, xs[-1])


# DDIM, eq. 12 and 16 ---------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    "times, last, options",
    [
        (np.arange(8)[::-1] * 125, 1.0, {}),
        (np.arange(8)[::-1] * 125 + 1, None, {"steps_offset": 1, "final": "first"}),
        ([999, 856, 714, 571, 428, 285, 143, 0], 1.0, {"spacing": "linspace"}),
        (np.arange(125, 1001, 125)[::-1] - 1, 1.0, {"spacing": "trailing"}),
    ],
    ids=["leading", "ldm", "linspace", "trailing"],
)
def test_ddim(run, exact, eta, times, last, options):
    bars = np.append(LONG.alpha_bar[np.array(times)], LONG.alpha_bar[0] if last is None else last)

    def ddim(x, noises):
        for bar, before, z in zip(bars, bars[1:], noises):
            e = exact.eps(x, bar)
            sigma = eta * np.sqrt((1 - before) / (1 - bar)) * np.sqrt(1 - bar / before)
            x0 = (x - np.sqrt(1 - bar) * e) / np.sqrt(bar)
            x = np.sqrt(before) * x0 + np.sqrt(1 - before - sigma**2) * e + sigma * z
            yield x

    run(LONG, "ddim", ddim, steps=8, eta=eta, **options)


# Euler and Heun, in k-diffusion's and EDM's variables -------------------------------------------


def karras_levels(n, low=0.002, high=80.0, rho=7):
    i = np.arange(n) / (n - 1)
    return np.append((high ** (1 / rho) + i * (low ** (1 / rho) - high ** (1 / rho))) ** rho, 0)


def vp_levels(n):
    bars = LONG.alpha_bar[np.round(np.linspace(999, 0, n)).astype(int)]
    return np.append(np.sqrt((1 - bars) / bars), 0)


CASES = {"edm": (EDM, karras_levels(10)), "vp": (LONG, vp_levels(10))}


def in_sigma(schedule, sigmas, solver):
    """A solver of y = x/alpha over ``sigmas``, its trajectory given back in x."""
    alpha = np.ones_like(sigmas) if schedule is EDM else 1 / np.sqrt(1 + sigmas**2)

    def steps(x, noises):
        for i, y in enumerate(solver(x / alpha[0], noises)):
            yield y * alpha[i + 1]

    return steps


def estimate_in_sigma(exact, y, sigma):
    return exact.mixture(y, 1.0, sigma)


@pytest.mark.parametrize("case", CASES)
def test_euler(run, exact, case):
    schedule, sigmas = CASES[case]

    def euler(y, noises):
        for s, s1 in itertools.pairwise(sigmas):
            y = y + (s1 - s) * (y - estimate_in_sigma(exact, y, s)) / s
            yield y

    run(schedule, "euler", in_sigma(schedule, sigmas, euler), steps=10)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_euler_ancestral(run, exact, case, eta):
    schedule, sigmas = CASES[case]

    def euler(y, noises):
        for s, s1, z in zip(sigmas, sigmas[1:], noises):
            up = min(s1, eta * np.sqrt(s1**2 * (s**2 - s1**2) / s**2))
            down = np.sqrt(s1**2 - up**2)
            y = y + (down - s) * (y - estimate_in_sigma(exact, y, s)) / s + up * z
            yield y

    run(schedule, "euler_ancestral", in_sigma(schedule, sigmas, euler), steps=10, eta=eta)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("churn", [0.0, 3.0])
def test_heun(run, exact, case, churn):
    """EDM Algorithm 2 (Algorithm 1 without churn). Diffusers' Heun has no churn."""
    schedule, sigmas = CASES[case]
    low, high, noise = 0.05, 10.0, 1.007

    def heun(y, noises):
        for s, s1, z in zip(sigmas, sigmas[1:], noises):
            gamma = min(churn / 10, np.sqrt(2) - 1) if low <= s <= high else 0.0
            hat = s + gamma * s
            y = y + np.sqrt(hat**2 - s**2) * noise * z
            d = (y - estimate_in_sigma(exact, y, hat)) / hat
            ahead = y + (s1 - hat) * d
            if s1:
                d = (d + (ahead - estimate_in_sigma(exact, ahead, s1)) / s1) / 2
            y = y + (s1 - hat) * d
            yield y

    options = {"churn": churn, "churn_min": low, "churn_max": high, "churn_noise": noise}
    run(schedule, "heun", in_sigma(schedule, sigmas, heun), steps=10, **options)


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_rectified_flow(run, exact, name):
    """Euler and Heun of dx/dt = eps - x0 from t = 1, where there is no signal at all."""
    flow = schedules.flow()
    times = np.linspace(1, 0, 11)

    def velocity(x, t):
        x0 = exact.mixture(x, 1 - t, t)
        return (x - x0) / t

    def solver(x, noises):
        for t, t1 in itertools.pairwise(times):
            u = velocity(x, t)
            if name == "heun" and t1:
                u = (u + velocity(x + (t1 - t) * u, t1)) / 2
            x = x + (t1 - t) * u
            yield x

    run(flow, name, solver, steps=10)


@pytest.mark.parametrize("steps", [3, 20, 200, 300, 400, 999, 1000])
def test_ldms_times_are_compvis(steps):
    """ldm/modules/diffusionmodules/util.py, make_ddim_timesteps("uniform"), in our own words."""
    wanted = [i + 1 for i in range(0, 1000, 1000 // steps)][::-1]
    if wanted[0] == 1000:  # theirs reads beyond its table
        with pytest.raises(ValueError, match="leave the schedule"):
            make_grid(schedules.scaled_linear(), steps, spacing="stride", steps_offset=1)
        return
    grid = make_grid(schedules.scaled_linear(), steps, spacing="stride", steps_offset=1)
    assert grid.times.tolist() == wanted and grid.steps == len(wanted)
    if 1000 % steps == 0:
        leading = make_grid(schedules.scaled_linear(), steps, spacing="leading", steps_offset=1)
        np.testing.assert_array_equal(grid.times, leading.times)


def test_lsun_churches_take_five_hundred_evaluations():
    from configs import ldm_lsun256
    from experiments.run import build

    method = build.settings(ldm_lsun256.get_config("churches")).method()
    assert method.evaluations == 500 and method.rows["t"][0] == 999


def test_improved_ddpms_network_is_told_a_thousandth_of_the_way():
    """openai/improved-diffusion, respace.py, _WrappedModel: t 1000 / T, whatever T."""
    told = []
    schedule = schedules.cosine(4000, time_scale=0.25)
    x, t = jnp.zeros((2, 4, 4, 1)), jnp.array([1, 3999])
    gaussian.apply_network(lambda x, t: told.append(t) or x, schedule, "eps", x, t)
    gaussian.apply_network(lambda x, t: told.append(t) or x, schedules.cosine(4000), "eps", x, t)
    np.testing.assert_allclose(told[0], [0.25, 999.75])
    assert told[1].dtype == t.dtype and told[1].tolist() == [1, 3999]
    alpha = schedule.alpha(t)
    np.testing.assert_array_equal(alpha, schedules.cosine(4000).alpha(t))
    from configs import iddpm_cifar10

    config = iddpm_cifar10.get_config("hybrid")
    assert config.process.schedule.time_scale * config.process.schedule.num_steps == 1000
    assert not config.data.flip
