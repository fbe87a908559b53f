"""Each multistep sampler against its paper, transcribed in NumPy: 1e-10 in float64."""

import numpy as np
import pytest

from diffusion.process import schedules

LONG = schedules.scaled_linear()


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
            (a, s), (a1, s1) = exact.level(bars[i]), exact.level(bars[i + 1])
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
            (a, s), (a1, s1) = exact.level(bars[i]), exact.level(bars[i + 1])
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
            (a, s), (a1, s1) = exact.level(bars[i]), exact.level(bars[i + 1])
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
    """Algorithms 1 and 2 with data prediction (Appendix A): predictor; corrector on arrival."""
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
        (_, s), (a1, s1) = exact.level(bars[i]), exact.level(bars[i + 1])
        x = s1 / s * x + a1 * h * phi(1, -h) * m[i]
        return x - a1 * big * sum(w * dk / rk for w, dk, rk in zip(weights, d, r))

    def solver(x, noises):
        m, corrected = [], None
        for i in range(10):
            arrived = exact.mixture(x, *exact.level(bars[i]))
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
            e = exact.eps(x, bars[i])
            if i == 0:
                guess = transfer(x, e, bars[0], bars[1])
                better = (e + exact.eps(guess, bars[1])) / 2
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
            e1 = exact.eps(x, bar)
            if i < 3:
                half = LONG.alpha_bar[times[i] - 50]
                e2 = exact.eps(transfer(x, e1, bar, half), half)
                e3 = exact.eps(transfer(x, e2, bar, half), half)
                e4 = exact.eps(transfer(x, e3, bar, before), before)
                better = (e1 + 2 * e2 + 2 * e3 + e4) / 6
            else:
                better = (55 * e1 - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
            old.append(e1)
            x = transfer(x, better, bar, before)
            yield x

    run(LONG, "pndm", solver, steps=10, steps_offset=1, final="first")
