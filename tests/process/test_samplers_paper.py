"""Each sampler against its paper, transcribed in NumPy in the paper's own variables.

Whole trajectories agree within 1e-10 in float64. The denoiser is the exact one of a two-component
Gaussian mixture, so the trajectories bend; noise is handed over.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.process import schedules
from diffusion.process.samplers import SAMPLERS, sample, step_noise

SHORT = schedules.ddpm_linear(20, 1e-3, 0.3)  # every step of it is cheap
LONG = schedules.scaled_linear()
EDM = schedules.edm()


@pytest.fixture
def run(exact, x64):
    """run(schedule, name, transcription, **options): the two trajectories, compared."""

    def compare(schedule, name, transcription, steps=None, **options):
        s = SAMPLERS[name](schedule, steps, **options)
        keys = jax.random.split(jax.random.key(7), 3)
        x = s.prior_std * jnp.asarray(np.random.default_rng(3).normal(size=(3, 5, 1)))
        _, xs = sample(s, exact.denoiser(schedule), x, keys, trajectory=True)
        noises = np.stack([step_noise(keys, i, x) for i in range(s.steps)])
        x = np.asarray(x)
        expected = [x]
        for x in transcription(x, noises):
            expected.append(x)
        assert xs.shape == np.shape(expected)
        np.testing.assert_allclose(xs, np.stack(expected), rtol=0, atol=1e-10 * s.prior_std)
        assert np.ptp(np.asarray(xs[-1])) > 0.3, "the trajectories went nowhere"

    return compare


def level(bar):
    """(alpha, sigma) of an alpha_bar."""
    return np.sqrt(bar), np.sqrt(1 - bar)


def eps_of(exact, x, bar):
    a, s = level(bar)
    return (x - a * exact.mixture(x, a, s)) / s


# DDPM, Algorithm 2 -----------------------------------------------------------------------------


def ddpm(exact, betas, variance):
    bars = np.cumprod(1 - betas)

    def steps(x, noises):
        for i, t in enumerate(reversed(range(len(betas)))):
            beta, bar, before = betas[t], bars[t], bars[t - 1] if t else 1.0
            x = (x - beta / np.sqrt(1 - bar) * eps_of(exact, x, bar)) / np.sqrt(1 - beta)
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
        mean = np.sqrt(before) * betas[t] / (1 - bars[t]) * exact.mixture(y, *level(bars[t]))
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
            e = eps_of(exact, x, bar)
            sigma = eta * np.sqrt((1 - before) / (1 - bar)) * np.sqrt(1 - bar / before)
            x0 = (x - np.sqrt(1 - bar) * e) / np.sqrt(bar)
            x = np.sqrt(before) * x0 + np.sqrt(1 - before - sigma**2) * e + sigma * z
            yield x

    run(LONG, "ddim", ddim, steps=8, eta=eta, **options)


# DPM-Solver++ ----------------------------------------------------------------------------------

LEVELS = [999, 899, 799, 699, 599, 500, 400, 300, 200, 100]  # round(linspace(999, 0, 11))[:-1]


def half_logsnr(bar):
    with np.errstate(divide="ignore"):
        return 0.5 * (np.log(bar) - np.log1p(-bar))


@pytest.mark.parametrize("final", ["clean", "first"])
def test_dpmpp_2m(run, exact, final):
    """DPM-Solver++ Algorithm 2; the last step of order 1 below 15 steps."""
    bars = np.append(LONG.alpha_bar[LEVELS], 1.0 if final == "clean" else LONG.alpha_bar[0])
    lam = half_logsnr(bars)

    def solver(x, noises):
        estimates = []
        for i in range(10):
            (a, s), (a1, s1) = level(bars[i]), level(bars[i + 1])
            estimates.append(exact.mixture(x, a, s))
            h, d = lam[i + 1] - lam[i], estimates[-1]
            if 0 < i < 9:
                r = (lam[i] - lam[i - 1]) / h
                d = (1 + 1 / (2 * r)) * estimates[-1] - 1 / (2 * r) * estimates[-2]
            x = s1 / s * x - a1 * (np.exp(-h) - 1) * d
            yield x

    run(LONG, "dpmpp_2m", solver, steps=10, final=final)


@pytest.mark.parametrize("exact_bend", [False, True])
def test_dpmpp_3m(run, exact, exact_bend):
    """The authors' multistep order 3 in its own algebra; ``exact`` doubles D2."""
    bars = np.append(LONG.alpha_bar[LEVELS], 1.0)
    lam = half_logsnr(bars)
    orders = [1, 2, 3, 3, 3, 3, 3, 3, 2, 1]

    def solver(x, noises):
        m = []
        for i in range(10):
            (a, s), (a1, s1) = level(bars[i]), level(bars[i + 1])
            m.insert(0, exact.mixture(x, a, s))
            h = lam[i + 1] - lam[i]
            out = s1 / s * x - a1 * np.expm1(-h) * m[0]
            if orders[i] == 2:
                out -= 0.5 * a1 * np.expm1(-h) * (m[0] - m[1]) / ((lam[i] - lam[i - 1]) / h)
            if orders[i] == 3:
                r0, r1 = (lam[i] - lam[i - 1]) / h, (lam[i - 1] - lam[i - 2]) / h
                d10, d11 = (m[0] - m[1]) / r0, (m[1] - m[2]) / r1
                d1 = d10 + r0 / (r0 + r1) * (d10 - d11)
                d2 = (1 + exact_bend) / (r0 + r1) * (d10 - d11)
                out += a1 * (np.expm1(-h) / h + 1) * d1
                out -= a1 * ((np.expm1(-h) + h) / h**2 - 0.5) * d2
            x = out
            yield x

    run(LONG, "dpmpp_3m", solver, steps=10, exact=exact_bend)


def test_dpmpp_2m_sde(run, exact):
    """SDE-DPM-Solver++(2M), their eq. 19-20 with the two-step estimate of D."""
    bars = np.append(LONG.alpha_bar[LEVELS], 1.0)
    lam = half_logsnr(bars)

    def solver(x, noises):
        m = []
        for i in range(10):
            (a, s), (a1, s1) = level(bars[i]), level(bars[i + 1])
            m.insert(0, exact.mixture(x, a, s))
            h = lam[i + 1] - lam[i]
            d = m[0]
            if 0 < i < 9:
                d = d + 0.5 * (m[0] - m[1]) * h / (lam[i] - lam[i - 1])
            x = s1 / s * np.exp(-h) * x + a1 * (1 - np.exp(-2 * h)) * d
            x = x + s1 * np.sqrt(1 - np.exp(-2 * h)) * noises[i]
            yield x

    run(LONG, "dpmpp_2m_sde", solver, steps=10)


# UniPC -----------------------------------------------------------------------------------------


def phi(k, h):
    """int_0^1 e^{(1-u) h} u^{k-1}/(k-1)! du, by quadrature (UniPC eq. 4)."""
    u, w = np.polynomial.legendre.leggauss(30)
    u, w = (u + 1) / 2, w / 2
    return np.sum(w * np.exp((1 - u) * h) * u ** (k - 1)) / _factorial(k - 1)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc(run, exact, order, variant):
    """Algorithms 1 and 2 with data prediction (Appendix A): predictor, then corrector on arrival."""
    bars = np.append(LONG.alpha_bar[LEVELS], LONG.alpha_bar[0])
    lam = half_logsnr(bars)
    orders = [min(order, i + 1, 10 - i) for i in range(10)]

    def advance(x, m, i, p, arrived=None):
        """x_{i+1} from x_i with estimates m[i], m[i-1], ..; ``arrived`` is D at i+1 (UniC)."""
        h = lam[i + 1] - lam[i]
        big = -h if variant == "bh1" else np.expm1(-h)
        r = [(lam[i - k] - lam[i]) / h for k in range(1, p)]
        d = [m[i - k] - m[i] for k in range(1, p)]
        if arrived is not None:
            r, d = [*r, 1.0], [*d, arrived - m[i]]
        n = len(r)
        rows = [[node**j for node in r] for j in range(n)]
        # eq. 9: sum_k a_k r_k^(j-1) = h^? j! phi_{j+1}(-h)/B, in units of h
        right = [-h * _factorial(j) * phi(j + 1, -h) / big for j in range(1, n + 1)]
        weights = np.linalg.solve(np.array(rows), np.array(right)) if n else []
        if n == 1 and p == (2 if arrived is None else 1):
            weights = [0.5]
        (_, s), (a1, s1) = level(bars[i]), level(bars[i + 1])
        x = s1 / s * x + a1 * h * phi(1, -h) * m[i]
        return x - a1 * big * sum(w * dk / rk for w, dk, rk in zip(weights, d, r))

    def solver(x, noises):
        m, corrected = [], None
        for i in range(10):
            arrived = exact.mixture(x, *level(bars[i]))
            if i:
                x = advance(corrected, m, i - 1, orders[i - 1], arrived)
            m.append(arrived)
            corrected = x
            x = advance(corrected, m, i, orders[i])
            yield x

    run(LONG, "unipc", solver, steps=10, order=order, variant=variant, final="first")


def _factorial(n):
    return float(np.prod(np.arange(1, n + 1)))


# PNDM ------------------------------------------------------------------------------------------


def transfer(x, e, bar, before):
    """PNDM eq. 11."""
    below = np.sqrt(bar) * (np.sqrt((1 - before) * bar) + np.sqrt((1 - bar) * before))
    return np.sqrt(before / bar) * x - (before - bar) / below * e


def test_plms(run, exact):
    """The released PLMS of latent diffusion: pseudo improved Euler, then Adams-Bashforth."""
    times = np.arange(10)[::-1] * 100 + 1
    bars = np.append(LONG.alpha_bar[times], LONG.alpha_bar[0])

    def solver(x, noises):
        old = []
        for i in range(10):
            e = eps_of(exact, x, bars[i])
            if i == 0:
                guess = transfer(x, e, bars[0], bars[1])
                better = (e + eps_of(exact, guess, bars[1])) / 2
            elif i == 1:
                better = (3 * e - old[-1]) / 2
            elif i == 2:
                better = (23 * e - 16 * old[-1] + 5 * old[-2]) / 12
            else:
                better = (55 * e - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
            old.append(e)
            x = transfer(x, better, bars[i], bars[i + 1])
            yield x

    run(LONG, "plms", solver, steps=10, steps_offset=1, final="first")


def test_pndm(run, exact):
    """F-PNDM: eq. 13 three times, then eq. 12; t in steps of 100, half-way 50 lower."""
    times = np.arange(10)[::-1] * 100 + 1
    bars = np.append(LONG.alpha_bar[times], LONG.alpha_bar[0])

    def solver(x, noises):
        old = []
        for i in range(10):
            bar, before = bars[i], bars[i + 1]
            e1 = eps_of(exact, x, bar)
            if i < 3:
                half = LONG.alpha_bar[times[i] - 50]
                e2 = eps_of(exact, transfer(x, e1, bar, half), half)
                e3 = eps_of(exact, transfer(x, e2, bar, half), half)
                e4 = eps_of(exact, transfer(x, e3, bar, before), before)
                better = (e1 + 2 * e2 + 2 * e3 + e4) / 6
            else:
                better = (55 * e1 - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
            old.append(e1)
            x = transfer(x, better, bar, before)
            yield x

    run(LONG, "pndm", solver, steps=10, steps_offset=1, final="first")


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
        for s, s1 in zip(sigmas, sigmas[1:]):
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
    """EDM Algorithm 2 (Algorithm 1 without churn). Diffusers' Heun has no churn: the paper rules."""
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
        for t, t1 in zip(times, times[1:]):
            u = velocity(x, t)
            if name == "heun" and t1:
                u = (u + velocity(x + (t1 - t) * u, t1)) / 2
            x = x + (t1 - t) * u
            yield x

    run(flow, name, solver, steps=10)
