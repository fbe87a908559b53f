"""Objectives and samplers of few steps against closed forms: the flow of Gaussian data is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.process import consistency, few_steps, gaussian, schedules
from diffusion.process.samplers import SAMPLERS, sample

pytestmark = pytest.mark.usefixtures("x64")

CASES = [
    ("flow", "velocity"),
    ("flow", "v"),
    ("edm", "edm"),
    ("trigflow", "edm"),
    ("discrete", "eps"),
    ("discrete", "velocity"),
]


@pytest.mark.parametrize(("kind", "prediction"), CASES)
def test_the_average_velocity_satisfies_its_identity(kind, prediction, known):
    """With the exact flow as teacher nothing is drawn: the loss is zero, at s = t and elsewhere."""
    schedule = known.SCHEDULES[kind]
    method = few_steps.MeanFlow(schedule, prediction, teacher=prediction, power=0)
    x0, times, noise = known.drawn(kind, 8)
    loss, aux = method.loss(known.exact(schedule, prediction), x0, times, noise)
    scale = float(jnp.mean(known.velocity(schedule, x0, times[:, 0]) ** 2))
    assert float(loss.max()) < 1e-12 * max(scale, 1.0)
    loss, aux = method.loss(known.exact(schedule, prediction, wrong=0.1), x0, times, noise)
    assert float(loss.min()) > 1e-5
    np.testing.assert_array_equal(loss, aux["mse"])


@pytest.mark.parametrize("options", [{}, {"improved": True}], ids=["meanflow", "improved"])
@pytest.mark.parametrize(("kind", "prediction"), [CASES[0], CASES[2], CASES[5]])
def test_the_average_velocity_is_the_minimum_from_data(kind, prediction, options, known):
    """Its gradient along a feature vanishes within the Monte-Carlo error, and not beside it."""
    schedule = known.SCHEDULES[kind]
    method = few_steps.MeanFlow(schedule, prediction, power=0, **options)
    x0, times, noise = known.drawn(kind, 40_000)

    def along(wrong):
        """The gradient of each example's loss."""
        one = jnp.ones(len(x0))
        return jax.jvp(
            lambda w: method.loss(
                known.exact(schedule, prediction, wrong=w[:, None]), x0, times, noise
            )[0],
            (wrong * one,),
            (one,),
        )[1]

    for i in range(len(known.PAIRS[kind])):
        rows = slice(i, None, len(known.PAIRS[kind]))
        at, beside = (np.asarray(along(w))[rows] for w in (0.0, 0.3))
        error = at.std() / np.sqrt(len(at))
        assert abs(at.mean()) < 4 * error
        assert beside.mean() > 10 * error


def test_guidance_is_folded_in_as_the_paper_has_it(known):
    """At s = t, with v_cond guided by w: the mean of the target is v_cond, for any k."""
    schedule, w = known.SCHEDULES["flow"], 2.5
    x0, times, noise = known.drawn("flow", 40_000)
    t = times[:, :1].at[:].set(0.6)
    plain = known.exact(schedule, "velocity")

    def network(x, t, s=None, told=True, teacher=False):
        null = plain(x, t, s, told=False)
        return (
            w * plain(x, t, s) + (1 - w) * null
            if told and not teacher
            else (plain(x, t, s, told=told))
        )

    x_t = gaussian.q_sample(schedule, x0, t[:, 0], noise)
    told_time = 1000 * t[:, 0]
    for k in (0.0, 0.7):
        flow = few_steps.Method(schedule, "velocity", guidance_scale=w, guidance_mix=k)
        error = flow.wanted(network, x0, noise, x_t, t[:, 0]) - network(x_t, told_time, told_time)
        for feature in (1.0, x_t):  # the mean given x_t: against features of x_t
            seen = np.asarray(error * feature)
            assert abs(seen.mean()) < 4 * seen.std() / np.sqrt(seen.size)
        assert np.asarray(error).std() > 0.1
    part = few_steps.Method(
        schedule, "velocity", guidance_scale=w, guidance_mix=0.7, guidance_times=(0.0, 0.5)
    )
    np.testing.assert_array_equal(part.wanted(network, x0, noise, x_t, t[:, 0]), noise - x0)
    inside = part.wanted(network, x0, noise, x_t, t[:, 0] - 0.2)
    same = dataclasses.replace(part, guidance_times=())
    np.testing.assert_array_equal(inside, same.wanted(network, x0, noise, x_t, t[:, 0] - 0.2))
    flow = few_steps.Method(schedule, "velocity", teacher="velocity", guidance_scale=w)
    wanted = flow.wanted(network, x0, noise, x_t, t[:, 0])
    np.testing.assert_allclose(wanted, network(x_t, told_time, told_time), rtol=1e-10, atol=1e-10)


def small_network(theta, x, t, s, told):
    """Smooth in everything."""
    gap = (t - s)[:, None] / 1000
    return jnp.tanh(x @ theta["w"] + theta["b"][None] * jnp.sin(t / 300)[:, None]) * (1.1 + gap) + (
        0.3 * told
    )


@pytest.mark.parametrize("improved", [False, True])
def test_gradients_are_finite_differences_with_the_targets_held(improved, known):
    schedule = known.SCHEDULES["flow"]
    rng = np.random.default_rng(1)
    theta = {"w": jnp.asarray(rng.normal(size=(4, 4))), "b": jnp.asarray(rng.normal(size=4))}
    method = few_steps.MeanFlow(schedule, guidance_scale=1.7, guidance_mix=0.4, improved=improved)
    x0, times, noise = known.drawn("flow", 6)
    t, s = (times * 1000).T

    def loss(theta):
        def network(x, t, s=None, told=True, teacher=False):
            return small_network(theta, x, t, s, told)

        return method.loss(network, x0, times, noise)[0].mean()

    x_t = (1 - times[:, :1]) * x0 + times[:, :1] * noise
    v = 1.7 * (noise - x0) - 0.7 * small_network(theta, x_t, t, t, False)
    v = 0.6 * v + 0.4 * small_network(theta, x_t, t, t, True)
    along = small_network(theta, x_t, t, t, True) if improved else v
    h = 1e-6
    ends = [small_network(theta, x_t + k * h * along, t + k * 1000 * h, s, True) for k in (1, -1)]
    target = v - (times[:, :1] - times[:, 1:]) * (ends[0] - ends[1]) / (2 * h)
    weight = 1 / (jnp.sum((small_network(theta, x_t, t, s, True) - target) ** 2, 1) + 1e-3)

    def with_held(theta):
        error = small_network(theta, x_t, t, s, True) - target
        return jnp.mean(weight * jnp.sum(error**2, 1))

    mse = jnp.mean((small_network(theta, x_t, t, s, True) - target) ** 2)
    np.testing.assert_allclose(loss(theta), mse, rtol=1e-7)
    grads = jax.grad(loss)(theta)
    for name, grad in grads.items():
        step = jnp.asarray(rng.normal(size=grad.shape))
        ends = [with_held({**theta, name: theta[name] + k * 1e-5 * step}) for k in (1, -1)]
        numeric = float((ends[0] - ends[1]) / 2e-5)
        found = float(jnp.vdot(grad, step))
        assert abs(found - numeric) < 1e-7 * max(1.0, abs(found)) and abs(found) > 1e-3


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(("kind", "prediction"), CASES)
def test_jumps_of_an_exact_network_end_where_the_flow_does(kind, prediction, steps, known):
    schedule = known.SCHEDULES[kind]
    sampler = SAMPLERS["meanflow"](schedule, steps, final="first")
    assert sampler.evaluations == steps
    denoise = gaussian.make_denoise(known.exact(schedule, prediction), schedule, prediction)
    first = jnp.full(3, sampler.rows["t"][0])
    assert abs(float(first[0]) / schedule.time_range[1] - 1) < 1e-12
    x = sampler.prior_std * jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
    found = sample(sampler, denoise, x, jax.random.split(jax.random.key(0), 3))
    end = jnp.full(3, schedule.time_range[0])
    np.testing.assert_allclose(found, known.transported(schedule, x, first, end), rtol=0, atol=1e-7)


def test_times_are_sorted_and_equal_as_often_as_asked(known):
    keys = jax.random.split(jax.random.key(0), 4000)
    for kind, schedule in known.SCHEDULES.items():
        method = few_steps.MeanFlow(schedule, "v", equal=0.4)
        times, noise = method.draw(keys, jnp.zeros((4000, 2)), 0)
        t, s = np.asarray(times).T
        low, high = schedule.time_range
        assert (s <= t).all() and noise.shape == (4000, 2)
        assert kind in ("edm", "trigflow") or ((s >= low).all() and (t <= high).all())
        assert abs((s == t).mean() - 0.4) < 0.035
        # The larger of two: their ranks are uniform, so the median of t is the 0.75 quantile.
    t = np.asarray(few_steps.MeanFlow(schedules.Flow(), equal=0).draw(keys, noise, 0)[0])[:, 0]
    assert abs(np.median(t) - np.sqrt(0.5)) < 0.02


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: few_steps.MeanFlow(schedules.Flow(), "eps"), "prediction='eps' cannot"),
        (lambda: few_steps.MeanFlow(schedules.Flow(), teacher="speed"), "^teacher='speed'.*eps"),
        (lambda: few_steps.MeanFlow(schedules.Flow(), equal=2), "^equal=2.*share"),
        (lambda: few_steps.MeanFlow(schedules.Flow(), guidance_mix=1.0), "^guidance_mix=1.0"),
        (
            lambda: few_steps.MeanFlow(schedules.Flow(), guidance_times=(0.9, 0.1)),
            "guidance_times=.*low <= high",
        ),
        (
            lambda: consistency.Consistency(
                schedules.EDM(), levels=(10, 1280), skip=0, times="uniform"
            ),
            "times='uniform', but levels",
        ),
        (
            lambda: few_steps.MeanFlow(schedules.Flow(), teacher="v", guidance_mix=0.5),
            "guidance_mix=0.5.*teacher",
        ),
    ],
)
def test_contradictions_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
