"""What every schedule, objective and sampler must hold. Adding one means adding a row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.process import guidance, losses, schedules
from diffusion.process import keys as ks
from diffusion.process.samplers import SAMPLERS, make_grid, sample

SCHEDULES = {
    "ddpm_linear": schedules.ddpm_linear(50, 1e-3, 0.2),
    "scaled_linear": schedules.scaled_linear(50, 0.01, 0.2),
    "cosine": schedules.cosine(50),
    "sigmoid": schedules.sigmoid(50),
    "zero_terminal_snr": schedules.zero_terminal_snr(schedules.cosine(50)),
    "edm": schedules.edm(),
    "trigflow": schedules.trigflow(),
    "flow": schedules.flow(),
}
OBJECTIVES = {
    "simple": ("cosine", "eps", {}),
    "l1": ("cosine", "v", {"norm": "l1"}),
    "x0": ("zero_terminal_snr", "x0", {}),
    "v": ("zero_terminal_snr", "v", {"weighting": "min_snr"}),
    "min_snr": ("cosine", "eps", {"weighting": "min_snr"}),
    "vlb": ("cosine", "eps", {"weighting": "vlb"}),
    "hybrid": ("cosine", "eps", {"variance": "learned"}),
    "learned vlb": ("cosine", "eps", {"variance": "learned", "weighting": "vlb"}),
    "edm": ("edm", "edm", {}),
    "edm weighting": ("edm", "x0", {"weighting": "edm"}),
    "trigflow": ("trigflow", "edm", {}),
    "flow": ("flow", "velocity", {}),
    "flow min_snr": ("flow", "velocity", {"weighting": "min_snr"}),
    "flow v": ("flow", "v", {}),
}
# sampler: (options, evaluations for 6 steps)
SAMPLER_ROWS = {
    "ddpm": ({}, 6),
    "ddpm large": ({"variance": "fixed_large"}, 6),
    "ddpm learned": ({"variance": "learned"}, 6),
    "ddim": ({}, 6),
    "ddim eta": ({"eta": 1}, 6),
    "dpmpp_2m": ({}, 6),
    "dpmpp_3m": ({}, 6),
    "dpmpp_3m exact": ({"exact": True}, 6),
    "dpmpp_2m_sde": ({}, 6),
    "unipc": ({"order": 3}, 6),
    "plms": ({}, 7),
    "pndm": ({}, 15),
    "euler": ({}, 6),
    "euler_ancestral": ({}, 6),
    "heun": ({}, 11),
    "heun churn": ({"churn": 2}, 11),
    "euler_maruyama": ({"last_step_size": 0.2}, 6),
    "dopri5": ({"rtol": 10}, 37),  # at most
    "meanflow": ({}, 6),
    "consistency": ({}, 6),
    "lms": ({}, 6),
    "deis": ({"order": 3}, 6),
    "dpm2": ({}, 11),
    "lcm": ({}, 6),
    "tcd": ({}, 6),
}
OF_FLOW = {"euler_maruyama", "dopri5"}
# samplers that work in sigma/alpha, which has no value at zero terminal SNR
NEED_SIGNAL = {"plms", "pndm", "heun churn", "lms", "deis", "dpm2"}
COUNTING = {"lcm", "tcd"}  # visit some of the times that their models are trained on


def test_no_row_is_missing():
    assert {name.split()[0] for name in SAMPLER_ROWS} == set(SAMPLERS)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name):
    schedule = SCHEDULES[name]
    assert isinstance(schedule, schedules.Schedule)
    low, high = schedule.time_range
    whole = schedule.num_steps is not None
    t = np.arange(schedule.num_steps) if whole else np.linspace(low, high, 40)
    for function in (schedule.alpha, schedule.sigma, schedule.logsnr, schedule.input_scale):
        table = function(t)
        assert (
            isinstance(table, np.ndarray) and table.dtype == np.float64 and table.shape == t.shape
        )
        traced = jax.jit(function)(jnp.asarray(t))
        assert traced.dtype == jnp.float32
        np.testing.assert_allclose(traced, table, rtol=2e-5, atol=1e-7)
        np.testing.assert_allclose(function(jnp.asarray(t)), traced, rtol=1e-6, atol=1e-7)
        assert np.shape(function(t[3])) == ()
    alpha, sigma, logsnr = schedule.alpha(t), schedule.sigma(t), schedule.logsnr(t)
    assert np.all(np.isfinite(alpha)) and np.all(np.isfinite(sigma))
    assert np.all(np.diff(sigma) > 0) and np.all(np.diff(alpha) <= 0)
    assert np.all(np.diff(logsnr[1:-1]) < 0)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(logsnr, 2 * np.log(alpha / sigma), rtol=1e-6, atol=1e-9)
    if schedule.variance_preserving:
        np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-14)
    else:
        assert schedule.prior_std == pytest.approx(sigma[-1])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective(name):
    key, prediction, options = OBJECTIVES[name]
    # one, two and three spatial axes in turn
    shape = [(3, 6, 2), (3, 4, 4, 1), (3, 2, 3, 4, 1)][list(OBJECTIVES).index(name) % 3]
    schedule = SCHEDULES[key]
    objective = losses.objective(schedule, prediction, **options)
    keys = jax.random.split(jax.random.key(1), 3)
    x0 = jnp.tanh(ks.normal(keys, shape))

    def loss(w, keys, x0):
        t, noise = losses.draw(keys, schedule, x0)
        outputs = 2 if options.get("variance") == "learned" else 1

        def network(x, t):
            return jnp.concatenate([jnp.tanh(w * x)] * outputs, axis=-1)

        return objective(network, x0, t, noise)

    value, aux = loss(1.0, keys, x0)
    assert value.shape == (3,) and value.dtype == jnp.float32
    assert all(v.shape == (3,) for v in aux.values()) and "mse" in aux
    assert np.all(np.isfinite(value)) and np.all(value > 0)
    compiled = jax.jit(loss)
    np.testing.assert_allclose(compiled(1.0, keys, x0)[0], value, rtol=2e-5)
    # an example's draw and loss know nothing of its batch
    t, noise = losses.draw(keys, schedule, x0)
    t1, noise1 = losses.draw(keys[1:2], schedule, x0[1:2])
    np.testing.assert_array_equal(t[1:2], t1)
    np.testing.assert_array_equal(noise[1:2], noise1)
    np.testing.assert_allclose(compiled(1.0, keys[1:2], x0[1:2])[0], value[1:2], rtol=2e-5)
    gradient = jax.jit(jax.grad(lambda w: loss(w, keys, x0)[0].mean()))(1.0)
    assert np.isfinite(gradient) and gradient != 0


@pytest.mark.parametrize("schedule_name", ["cosine", "zero_terminal_snr", "edm", "flow"])
@pytest.mark.parametrize("name", SAMPLER_ROWS)
def test_sampler(name, schedule_name):
    options, evaluations = SAMPLER_ROWS[name]
    schedule = SCHEDULES[schedule_name]
    make = functools.partial(SAMPLERS[name.split()[0]], schedule, steps=6, **options)
    if name in OF_FLOW and schedule_name != "flow":
        with pytest.raises(ValueError, match="of rectified flow's path"):
            make()
        return
    if name in COUNTING and schedule.num_steps is None:
        with pytest.raises(ValueError, match="count a schedule's steps"):
            make()
        return
    if schedule_name in ("zero_terminal_snr", "flow") and name not in OF_FLOW | COUNTING:
        make = functools.partial(make, spacing="trailing")
        if name in NEED_SIGNAL:
            with pytest.raises(ValueError, match="infinite at the first time"):
                make()
            return
    s = make()
    assert s.steps == 6 and s.evaluations == evaluations
    traces = []

    def denoise(x, t, *end):
        traces.append(t.dtype)
        assert t.shape == x.shape[:1] and len(end) == ("s" in s.rows)
        x0 = 0.5 * jnp.tanh(x)
        return (x0, jnp.sin(x)) if s.learned_variance else x0

    keys = jax.random.split(jax.random.key(2), 4)
    x = s.prior_std * ks.normal(keys, (4, 3, 2))
    bounded, steps = guidance.clip_x0(denoise), name != "dopri5"  # which keeps none

    @jax.jit
    def run(x, keys):
        found = sample(s, bounded, x, keys, trajectory=steps)
        return found if steps else (found, jnp.stack([x] * 6 + [found]))

    out, xs = run(x, keys)
    assert len(traces) == 1, "the denoiser is in the program once, however many stages"
    run(x + 1, keys)
    assert len(traces) == 1, "one compilation serves every call"
    if schedule.num_steps is not None and "churn" not in name and name not in ("pndm", "dpm2"):
        assert traces[0] == jnp.int32
    assert out.shape == x.shape and out.dtype == x.dtype and xs.shape == (7, *x.shape)
    assert np.all(np.isfinite(xs))
    np.testing.assert_array_equal(xs[0], x)
    np.testing.assert_array_equal(xs[-1], out)
    assert np.abs(out).max() < 3
    other, _ = run(x, jax.random.split(jax.random.key(9), 4))
    assert np.array_equal(other, out) != s.stochastic
    # without jit, and alone: noise and all, an example knows nothing of its batch
    alone = sample(s, bounded, x[2:3], keys[2:3])
    np.testing.assert_allclose(alone, out[2:3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "unipc", "heun"])
def test_one_step(name):
    """One step to clean data is the denoiser's estimate."""
    schedule = SCHEDULES["cosine"]
    s = SAMPLERS[name](schedule, 1, spacing="trailing")
    x = jnp.ones((2, 3, 1))
    out = sample(s, lambda x, t: 0.3 * x, x, jax.random.split(jax.random.key(0), 2))
    np.testing.assert_allclose(out, 0.3, rtol=5e-4)


COSINE = SCHEDULES["cosine"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SAMPLERS["ddim"](COSINE, 51), r"^steps=51.*only 50 steps.*at most 50"),
        (lambda: SAMPLERS["ddim"](COSINE, 0), r"^steps=0.*at least 1"),
        (lambda: SAMPLERS["ddim"](COSINE, 10, spacing="odd"), r"^spacing='odd'"),
        (lambda: SAMPLERS["ddim"](COSINE, 10, eta=1.5), r"^eta=1\.5.*\[0, 1\]"),
        (lambda: SAMPLERS["ddim"](COSINE, 10, steps_offset=7), "leave the schedule's 0.0 .. 49.0"),
        (
            lambda: SAMPLERS["ddim"](COSINE, 10, steps_offset=1, spacing="trailing"),
            "only leading, stride, open have",
        ),
        (lambda: SAMPLERS["ddim"](COSINE, 10, final="end"), r"^final='end'"),
        (lambda: SAMPLERS["ddim"](COSINE, 10, final=40), "more noise"),
        (lambda: SAMPLERS["ddim"](COSINE, times=[1, 20, 3]), "must decrease strictly"),
        (lambda: SAMPLERS["ddim"](COSINE, 3, times=[20, 3]), "one time a step"),
        (lambda: SAMPLERS["ddim"](SCHEDULES["flow"], 5, spacing="leading"), "'leading' counts"),
        (lambda: SAMPLERS["ddim"](SCHEDULES["flow"], 5, spacing="karras"), "finite logsnr"),
        (lambda: SAMPLERS["ddpm"](COSINE, variance="tiny"), r"^variance='tiny'"),
        (lambda: SAMPLERS["unipc"](COSINE, 5, order=4), r"^order=4"),
        (lambda: SAMPLERS["unipc"](COSINE, 5, variant="bh3"), r"^variant='bh3'"),
        (lambda: SAMPLERS["pndm"](COSINE, 3), "3 Runge-Kutta steps"),
        (lambda: SAMPLERS["heun"](COSINE, 3, coordinates="x"), r"^coordinates='x'"),
        (
            lambda: SAMPLERS["heun"](SCHEDULES["flow"], 3, coordinates="sigma"),
            "heun works in sigma/alpha",
        ),
        (
            lambda: SAMPLERS["unipc"](SCHEDULES["flow"], 5, variant="bh1"),
            "coefficient 'correct'|coefficient 'predict'",
        ),
        (
            lambda: sample(
                SAMPLERS["ddpm"](COSINE, variance="learned"),
                lambda x, t: x,
                jnp.ones((1, 2, 1)),
                jax.random.split(jax.random.key(0), 1),
            ),
            r"^variance='learned' needs a network with a variance output",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_grid_spacings():
    """The times of each name (Lin et al. Table 2), T = 50, 5 steps."""

    def times(spacing, **options):
        return make_grid(COSINE, 5, spacing=spacing, **options).times

    np.testing.assert_array_equal(times("leading"), [40, 30, 20, 10, 0])
    np.testing.assert_array_equal(times("leading", steps_offset=1), [41, 31, 21, 11, 1])
    np.testing.assert_array_equal(times("linspace"), [49, 37, 24, 12, 0])
    np.testing.assert_array_equal(times("trailing"), [49, 39, 29, 19, 9])
    np.testing.assert_array_equal(times("uniform"), [49, 39, 29, 20, 10])
    logsnr = COSINE.logsnr(times("logsnr"))
    np.testing.assert_allclose(np.diff(logsnr), np.diff(logsnr)[0], rtol=1e-6)
    edm = SCHEDULES["edm"]
    levels = make_grid(edm, 5).times
    np.testing.assert_allclose(np.diff(levels ** (1 / 7), 2), 0, atol=1e-12)
    np.testing.assert_allclose(levels[[0, -1]], [80, 0.002])
