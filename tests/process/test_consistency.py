"""Consistency and progressive distillation against the known flow of Gaussian data."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from diffusion.process import consistency, gaussian, latent_consistency, losses, schedules
from diffusion.process.samplers import SAMPLERS, sample
from diffusion.process.samplers.lcm import boundary

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
            return known.exact(schedule, "edm", clean=True)(x, t) + w[:, None] * jnp.tanh(x)

        times = jnp.tile(jnp.asarray([1.0, r, 0.002]), (len(x0), 1))
        return method.loss(network, x0, times, noise)[1]["mse"]

    one = jnp.ones(len(x0))
    for gap in (0.4, 0.2, 0.1):
        slopes = [jax.jvp(lambda w, r=1 - gap: loss(w, r), (w * one,), (one,))[1] for w in (0, 0.3)]
        found.append([float(slope.mean()) / gap for slope in slopes])
    at, beside = np.array(found).T
    assert np.all(at[:-1] / at[1:] > 1.7) and np.all(beside > at) and beside[-1] > 3 * at[-1]


@pytest.mark.parametrize("kind", ["edm", "trigflow", "flow", "discrete"])
def test_ect_draws_what_its_authors_do(kind, known):
    """Of the levels sigma / alpha of any schedule, which are EDM's times."""
    schedule = known.SCHEDULES[kind]
    keys, x0 = jax.random.split(jax.random.key(0), 512), jnp.zeros((512, 2))
    method = consistency.Consistency(schedule, "v", q=4, double_steps=100)
    low = schedule.time_range[0]
    for step, stage in ((0, 1), (99, 1), (250, 3)):
        t, r, s = np.asarray(method.draw(keys, x0, step)[0]).T
        level, end, least = (np.exp(-0.5 * schedule.logsnr(x)) for x in (t, r, low))
        want = level * (1 - (1 + 8 * scipy.special.expit(-level)) / 4.0**stage)
        np.testing.assert_allclose(end, np.maximum(want, least), rtol=1e-11)
        assert (s == low).all() and (r < t)[t > low].all() and len(set(r)) > 20
    np.testing.assert_array_equal(t, losses.draw(keys, schedule, x0)[0])


@pytest.mark.parametrize("kind", ["flow", "discrete"])
def test_steps_below_the_rounding_of_a_time_do_not_go_beyond_it(kind, known):
    method = consistency.Consistency(known.SCHEDULES[kind], "v", q=2.0, double_steps=1)
    with jax.enable_x64(False):
        keys = jax.random.split(jax.random.key(0), 2000)
        t, r, _ = np.asarray(method.draw(keys, jnp.zeros((2000, 2), jnp.float32), 30)[0]).T
    assert t.dtype == np.float32 and (r <= t).all()


def test_lcm_draws_its_grid_and_guidance():
    method = latent_consistency.LatentConsistency(schedules.scaled_linear(), teacher="eps")
    keys = jax.random.split(jax.random.key(0), 2000)
    t, r, w = np.asarray(method.draw(keys, jnp.zeros((2000, 1)))[0]).T
    assert set(t) == set(range(19, 1000, 20)) and (r == np.maximum(t - 20, 0)).all()
    assert w.min() >= 5 and w.max() <= 15 and abs(w.mean() - 10) < 0.3
    wrongs = ({"teacher": ""}, {"original_steps": 0}, {"weights": (5, 1)})
    for wrong in (*wrongs, {"guidance_times": (0, 100)}):
        with pytest.raises(ValueError, match=next(iter(wrong)) + "="):
            dataclasses.replace(method, **wrong)


def test_the_exact_function_is_lcms_to_second_order_in_the_step(known):
    """Its estimate being what the boundary conditions leave to say."""
    schedule = known.SCHEDULES["discrete"]
    method = latent_consistency.LatentConsistency(schedule, teacher="eps")
    exact, (x0, _, noise) = known.exact(schedule, "eps"), known.drawn("discrete", 64)

    def network(x, t, s=None, told=True, teacher=False, guidance=None, wrong=0.0):
        if teacher:
            return exact(x, t)
        (a, b), (skip, out) = known.levels(schedule, t, x), boundary(10 * t[:, None])
        end = known.MEAN + known.STD / jnp.sqrt(a**2 * known.STD**2 + b**2) * (x - a * known.MEAN)
        return (x - a * (end - skip * x) / out) / b + wrong

    errors = []
    for gap in (20, 10, 5):
        times = jnp.tile(jnp.asarray([79.0, 79.0 - gap, 5.0]), (64, 1))
        errors.append(float(jnp.sqrt(method.loss(network, x0, times, noise)[1]["mse"].mean())))
    off = method.loss(lambda *a, **k: network(*a, **k, wrong=0.1), x0, times, noise)[1]["mse"]
    assert float(off.mean()) > 10 * errors[-1] ** 2
    assert np.all(np.abs(np.log2(np.array(errors[:-1]) / errors[1:]) - 2) < 0.25), errors


def test_ict_draws_neighbours_as_often_as_its_authors(known):
    """Levels of Karras et al.'s sampler, N of them doubling; pairs as often as iCT's erf says."""
    schedule = schedules.EDM(p_mean=-1.1, p_std=2.0)
    method = consistency.Consistency(schedule, levels=(10, 35), double_steps=100, huber=0.03)
    count = 40_000
    keys, x0 = jax.random.split(jax.random.key(0), count), jnp.zeros((count, 1))
    for step, intervals in ((99, 10), (100, 20), (250, 35)):
        t, r, s = np.asarray(method.draw(keys, x0, step)[0]).T
        ends = 0.002 ** (1 / 7), 80 ** (1 / 7)
        levels = np.linspace(*ends, intervals + 1) ** 7
        place = np.searchsorted(levels, t * (1 + 1e-9)) - 1
        np.testing.assert_allclose(t, levels[place], rtol=1e-9)
        np.testing.assert_allclose(r, levels[place - 1], rtol=1e-9)
        assert (s == 0.002).all() and (r[place == 1] == 0.002).all()
        want = np.diff(scipy.special.erf((np.log(levels) + 1.1) / (np.sqrt(2) * 2.0)))
        found = np.bincount(place - 1, minlength=intervals) / count
        want = want / want.sum()
        assert np.all(np.abs(found - want) < 5 * np.sqrt(want / count) + 1 / count)


@pytest.mark.parametrize("kind", ["flow", "edm", "trigflow", "discrete"])
def test_the_tangent_of_the_exact_function_is_zero_with_a_teacher(kind, known):
    """sCM's distillation: on every schedule, not on TrigFlow alone; and not of another function."""
    schedule = known.SCHEDULES[kind]
    prediction = "v" if kind == "discrete" else "edm"
    method = consistency.ContinuousConsistency(schedule, prediction, teacher=prediction)
    x0, times, noise = known.drawn(kind, 8)
    times = times.at[:, 1].set(1.0).at[:, 0].min(0.99 * schedule.time_range[1])

    def network(x, t, s=None, told=True, teacher=False, wrong=0.0):
        return known.exact(schedule, prediction, 0.0 if teacher else wrong, not teacher)(x, t)

    _, aux = method.loss(network, x0, times, noise)
    _, off = method.loss(lambda *a, **k: network(*a, **k, wrong=0.1), x0, times, noise)
    assert float(aux["mse"].max()) < 1e-14 and float(off["mse"].min()) > 1e-6


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_scm_from_data_has_the_consistency_function_at_its_minimum(offset, known):
    """Its gradient along a feature vanishes within the Monte-Carlo error, and not beside it."""
    schedule = known.SCHEDULES["trigflow"]
    method = consistency.ContinuousConsistency(schedule, offset=offset)
    x0, _, noise = known.drawn("trigflow", 40_000)

    @jax.jit
    def slope(w, t):
        def loss(w):
            def network(x, t, s=None, told=True, teacher=False):
                return known.exact(schedule, "edm", clean=True)(x, t) + w[:, None] * jnp.tanh(x)

            pair = jnp.stack([jnp.full(len(x0), t), jnp.ones(len(x0))], axis=1)
            return method.loss(network, x0, pair, noise)[0]

        return jax.jvp(loss, (jnp.full(len(x0), w),), (jnp.ones(len(x0)),))[1]

    for t in (0.4, 0.8, 1.2):
        at, beside = (np.asarray(slope(w, t)) for w in (0.0, 0.3))
        error = at.std() / np.sqrt(len(at))
        assert abs(at.mean()) < 4 * error and beside.mean() > 10 * error, t


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
