"""Consistency and progressive distillation against the known flow of Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.process import consistency, gaussian, losses
from diffusion.process.samplers import SAMPLERS, sample

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("clean", [1.0, 0.3])
def test_the_exact_flow_is_consistent_to_second_order_in_the_step(clean, known):
    """Against one Euler step of the teacher and its own jump from there, to clean data or not."""
    schedule, errors = known.SCHEDULES["flow"], []
    network, (x0, _, noise) = known.exact(schedule, "velocity"), known.drawn("flow", 64)

    def told(x, t, s=None, scale=1.0, **which):
        """A consistency function jumps to the least time."""
        if which.get("teacher"):
            return network(x, t, **which)
        return scale * network(x, t, jnp.zeros_like(t) if s is None else s)

    for skip in (0.1, 0.05, 0.025):
        method = consistency.Consistency(
            schedule, "velocity", teacher="velocity", skip=skip, power=0.5, clean=clean
        )
        end = 0.0 if clean == 1 else 0.3
        times = jnp.tile(jnp.asarray([0.9, 0.9 - skip, end]), (64, 1))
        errors.append(float(jnp.sqrt(method.loss(told, x0, times, noise)[0].mean())))
        drawn, _ = method.draw(jax.random.split(jax.random.key(0), 64), x0, 0)
        t, r, s = np.asarray(drawn).T
        np.testing.assert_allclose(r, np.maximum(t - skip, s), rtol=1e-12)
        assert (s <= t).all() and ((s == 0).all() if clean == 1 else 0.1 < (s == 0).mean() < 0.5)
    wrong, _ = method.loss(lambda *a, **k: told(*a, scale=1.5, **k), x0, times, noise)
    assert float(wrong.mean()) > 100 * errors[-1] ** 2
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.all(np.abs(orders - 2) < 0.25), (errors, orders)


def test_consistency_training_has_the_consistency_function_at_its_minimum(known):
    """From data, the gradient along a feature vanishes with the step, to first order, at the exact
    function; beside it, it does not. Noise is drawn in pairs of opposite sign."""
    schedule, found = known.SCHEDULES["edm"], []
    x0, _, noise = (jnp.concatenate([a, a]) for a in known.drawn("edm", 100_000))
    noise = noise.at[100_000:].multiply(-1)
    method = consistency.Consistency(schedule, power=0.5)

    def loss(w, r):
        def network(x, t, s=None, told=True, teacher=False):
            at_clean = jnp.full_like(t, np.log(1e-9) / 4)
            return known.exact(schedule, "edm")(x, t, at_clean) + w[:, None] * jnp.tanh(x)

        times = jnp.tile(jnp.asarray([1.0, r, 0.002]), (len(x0), 1))
        return method.loss(network, x0, times, noise)[1]["mse"]

    one = jnp.ones(len(x0))
    for gap in (0.4, 0.2, 0.1):
        slopes = [jax.jvp(lambda w, r=1 - gap: loss(w, r), (w * one,), (one,))[1] for w in (0, 0.3)]
        found.append([float(slope.mean()) / gap for slope in slopes])
    at, beside = np.array(found).T
    assert np.all(at[:-1] / at[1:] > 1.7) and np.all(beside > at) and beside[-1] > 3 * at[-1]


def test_ect_draws_what_its_authors_do(known):
    schedule = known.SCHEDULES["edm"]
    keys, x0 = jax.random.split(jax.random.key(0), 512), jnp.zeros((512, 2))
    method = consistency.Consistency(schedule, q=4, double_steps=100)
    for step, stage in ((0, 1), (99, 1), (250, 3)):
        t, r, s = np.asarray(method.draw(keys, x0, step)[0]).T
        want = t * (1 - (1 + 8 / (1 + np.exp(t))) / 4.0**stage)
        np.testing.assert_allclose(r, np.maximum(want, 0.002), rtol=1e-12)
        assert (s == 0.002).all()
    np.testing.assert_array_equal(t, losses.draw(keys, schedule, x0)[0])


def test_the_pseudo_huber_loss_is_ects(x64, known):
    """Eq. 3 by its own formula, one consistency function far from another."""
    schedule = known.SCHEDULES["edm"]
    x0, _, noise = known.drawn("edm", 4)
    t, r = jnp.asarray([0.5, 1.0, 4.0, 30.0]), jnp.asarray([0.25, 0.002, 3.0, 20.0])
    times = jnp.stack([t, r, jnp.full(4, 0.002)], axis=1)

    def network(x, t, s=None, told=True, teacher=False):
        return jnp.sin(x) * t[:, None]

    def function(x, t):
        c = jnp.sqrt(t**2 + 0.25)[:, None]
        return 0.25 * x / c**2 + t[:, None] * 0.5 / c * network(x / c, jnp.log(t) / 4)

    method = consistency.Consistency(schedule, huber=0.03)
    found, _ = method.loss(network, x0, times, noise)
    x_t, x_r = (x0 + noise * time[:, None] for time in (t, r))
    after = jnp.where((r > 0.002)[:, None], function(x_r, r), x0)
    square = jnp.sum((function(x_t, t) - after) ** 2, axis=1)
    want = (jnp.sqrt(square + 0.03**2) - 0.03) * (t**2 + 0.25) / (0.5 * t) ** 2
    np.testing.assert_allclose(found, want, rtol=1e-9)


@pytest.mark.parametrize("steps", [1, 3])
def test_progressive_distillation_is_of_two_steps_of_ddim(steps, known):
    """The student of least loss makes in one step what DDIM with the teacher makes in two."""
    schedule = known.SCHEDULES["discrete"]
    teacher = known.exact(schedule, "eps")
    method = consistency.Progressive(schedule, "v", steps=steps, teacher="eps")
    keys = jax.random.split(jax.random.key(2), 16)
    x0, _, noise = known.drawn("discrete", 16)
    times, _ = method.draw(keys, x0, 0)
    denoise = gaussian.make_denoise(teacher, schedule, "eps")
    assert len({float(t) for t in times[:, 0]}) == steps
    for i in range(4):
        t, m, r = (float(time) for time in times[i])
        x_t = gaussian.q_sample(schedule, x0[i : i + 1], times[i : i + 1, 0], noise[i : i + 1])
        final = {} if r == 0 else {"final": r}
        two = SAMPLERS["ddim"](schedule, times=[t, m], **final)
        x_r = sample(two, denoise, x_t, keys[:1])
        (a, b) = known.levels(schedule, jnp.asarray([t]), x_t)
        c, d = known.levels(schedule, jnp.asarray([r]), x_t) if r else (1.0, 0.0)
        y, end = x_t / (a + b), x_r / (c + d)
        u = (y - end) / (b / (a + b) - d / (c + d))

        def student(x, t, s=None, told=True, teacher=False, u=u, a=a, b=b, off=0.0):
            if teacher:
                return known.exact(schedule, "eps")(x, t)
            return gaussian.convert(u + off, "velocity", "v", x, a, b)

        one = [x[i : i + 1] for x in (x0, times, noise)]
        loss, _ = method.loss(student, *one)
        assert float(loss[0]) < 1e-18
        loss, _ = method.loss(lambda *a, **k: student(*a, **k, off=0.5), *one)
        weight = max(float((a**2 / b**2).max()), 1.0) * float((b**2 / (a + b) ** 2).max())
        np.testing.assert_allclose(loss, 0.25 * weight, rtol=1e-9)


def test_the_multistep_sampler_of_an_exact_function_has_the_datas_moments(known):
    schedule = known.SCHEDULES["edm"]
    sampler = SAMPLERS["consistency"](schedule, times=(80.0, 0.821))

    def denoise(x, t):
        return known.transported(schedule, x, t, jnp.full_like(t, 0.0))

    rng = np.random.default_rng(0)
    x = sampler.prior_std * jnp.asarray(rng.normal(size=(20_000, 1)))
    found, xs = sample(sampler, denoise, x, jax.random.split(jax.random.key(0), 20_000), True)
    assert (
        abs(float(found.mean()) - known.MEAN) < 0.02 and abs(float(found.std()) - known.STD) < 0.02
    )
    assert abs(float(xs[1].std()) - np.hypot(known.STD, 0.821)) < 0.03
