"""Objectives of few steps by their papers' own formulas: values, and gradients as differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.process import consistency, latent_consistency, schedules

pytestmark = pytest.mark.usefixtures("x64")


def theta(seed=1):
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=(4, 4))), "b": jnp.asarray(rng.normal(size=4))}


def smooth(theta, x, t):
    """A network's output."""
    return jnp.tanh(x @ theta["w"] + theta["b"][None] * jnp.sin(0.3 * t)[:, None])


def ect(now, fixed, x0, noise, t, r):
    """Eq. 3 on EDM's schedule, and iCT's with a weight of the step."""

    def function(theta, level):
        x, c = x0 + level[:, None] * noise, jnp.sqrt(level**2 + 0.25)[:, None]
        found = smooth(theta, x / c, jnp.log(level) / 4)
        return 0.25 * x / c**2 + level[:, None] * 0.5 / c * found

    square = jnp.sum((function(now, t) - function(fixed, r)) ** 2, axis=1)
    return jnp.sqrt(square + 0.03**2) - 0.03


def scm(now, fixed, x0, noise, t, share):
    """sCM's algorithm 1 in its own words: TrigFlow, its F minus ours, its derivative numeric."""
    d, t, share = 0.5, t[:, None], share[:, None]
    x_t = jnp.cos(t) * x0 + jnp.sin(t) * d * noise
    rate = jnp.cos(t) * d * noise - jnp.sin(t) * x0

    def f(theta, h=0.0):
        return -smooth(theta, (x_t + h * rate) / d, t[:, 0] + h)

    h = 1e-5
    slope = (8 * (f(fixed, h) - f(fixed, -h)) - f(fixed, 2 * h) + f(fixed, -2 * h)) / (12 * h)
    g = -(jnp.cos(t) ** 2) * (d * f(fixed) - rate)
    g = g - share * jnp.cos(t) * jnp.sin(t) * (x_t + d * slope)
    g = g / (jnp.linalg.norm(g, axis=1, keepdims=True) + 0.1)
    return jnp.mean((f(now) - f(fixed) - g) ** 2, axis=1)


def progressive(now, fixed, x0, noise, t, r):
    """arXiv:2202.00512, algorithm 2 on the straight path, from the teacher's eps - x_0."""
    m, (a, b) = (t + r) / 2, (1 - t[:, None], t[:, None])
    x_t = a * x0 + b * noise
    x_m = x_t - (t - m)[:, None] * smooth(fixed, x_t, 1000 * t)
    x_r = x_m - (m - r)[:, None] * smooth(fixed, x_m, 1000 * m)
    target = x_t - b * (x_t - x_r) / (t - r)[:, None]
    x_0 = (a * x_t - b * smooth(now, x_t, 1000 * t)) / (a**2 + b**2)
    weight = jnp.maximum((1 - t) ** 2 / t**2, 1)
    return weight * jnp.mean((x_0 - target) ** 2, axis=1)


def lcm(now, fixed, x0, noise, t, r):
    """LCM's loss, the teacher's DDIM step and the boundary conditions as its authors write them."""
    w = jnp.asarray([[2.0], [0.0], [5.0], [1.0]])
    bar = jnp.asarray(schedules.scaled_linear(100).alpha_bar)

    def pair(x, t, eps):
        b = bar[t.astype(int)][:, None]
        return (x - jnp.sqrt(1 - b) * eps) / jnp.sqrt(b), eps

    def f(theta, x, t):
        u = 10 * t[:, None]
        estimate = pair(x, t, smooth(theta, x, t) + 0.01 * w)[0]
        return 0.25 / (u**2 + 0.25) * x + u / jnp.sqrt(u**2 + 0.25) * estimate

    b = bar[t.astype(int)][:, None]
    x_t = jnp.sqrt(b) * x0 + jnp.sqrt(1 - b) * noise
    cond, null = (pair(x_t, t, smooth(fixed, x_t, t) - off) for off in (0.0, 0.3))
    x, eps = (c + w * (c - n) for c, n in zip(cond, null))
    b = bar[r.astype(int)][:, None]
    error = f(now, x_t, t) - f(fixed, jnp.sqrt(b) * x + jnp.sqrt(1 - b) * eps, r)
    return jnp.mean(jnp.sqrt(error**2 + 0.03**2) - 0.03, axis=1)


LEVELS = (0.5, 1.0, 4.0, 30.0), (0.25, 0.02, 3.0, 20.0)
HUBER = {"huber": 0.03}
EACH = {
    "ect": (consistency.Consistency(schedules.EDM(), **HUBER), ect, LEVELS),
    "ict": (consistency.Consistency(schedules.EDM(), **HUBER, levels=(10, 20)), ect, LEVELS),
    "scm": (
        consistency.ContinuousConsistency(schedules.TrigFlow()),
        scm,
        ((0.1, 0.7, 1.2, 1.5), (1.0, 0.3, 0.0, 1.0)),
    ),
    "progressive": (
        consistency.Progressive(schedules.Flow(), "v", teacher="velocity", steps=2),
        progressive,
        ((1.0, 0.5, 1.0, 0.5), (0.5, 0.0, 0.5, 0.0)),
    ),
    "lcm": (
        latent_consistency.LatentConsistency(
            schedules.scaled_linear(100), teacher="eps", original_steps=20, huber=0.03
        ),
        lcm,
        ((4.0, 49.0, 79.0, 99.0), (0.0, 44.0, 74.0, 94.0)),
    ),
}


@pytest.mark.parametrize("name", EACH)
def test_gradients_are_finite_differences_with_the_targets_held(name, known):
    """Each loss by its paper's own formula, whose target's parameters stay as they are."""
    method, formula, given = EACH[name]
    x0, _, noise = known.drawn("edm", 4)
    t, r = (jnp.asarray(times) for times in given)
    times = {"scm": (t, r), "progressive": (t, (t + r) / 2, r)}
    times["lcm"] = (t, r, jnp.asarray([2.0, 0.0, 5.0, 1.0]))
    times = jnp.stack(times.get(name, (t, r, jnp.full(4, 0.002))), axis=1)
    weight = {"ect": (t**2 + 0.25) / (0.5 * t) ** 2, "ict": 1 / (t - r)}.get(name, 1.0)
    start = theta()

    def loss(theta):
        def network(x, t, s=None, told=True, teacher=False, guidance=None):
            more = 0.0 if guidance is None else 0.01 * guidance[:, None]
            return smooth(start if teacher else theta, x, t) + more - 0.3 * (not told)

        return method.loss(network, x0, times, noise)[0].sum()

    def with_held(theta):
        return jnp.sum(weight * formula(theta, start, x0, noise, t, r))

    if name != "scm":  # whose value is that of the tangent before it is normalised
        np.testing.assert_allclose(loss(start), with_held(start), rtol=1e-8)
    for leaf, grad in jax.grad(loss)(start).items():
        step = jnp.asarray(np.random.default_rng(2).normal(size=grad.shape))
        ends = [with_held({**start, leaf: start[leaf] + k * 1e-5 * step}) for k in (1, -1)]
        found, numeric = float(jnp.vdot(grad, step)), float((ends[0] - ends[1]) / 2e-5)
        assert abs(found - numeric) < 1e-7 * max(1.0, abs(found)) and abs(found) > 1e-3
