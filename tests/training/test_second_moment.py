"""Second-moment resampling inside the step: the same under every way to run it, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models.unet import UNet
from diffusion.process import losses, schedules
from diffusion.training import optim
from diffusion.training.denoiser import Denoiser
from diffusion.training.ema import Ema
from diffusion.training.parallel import Parallel, make_mesh
from diffusion.training.state import Optimizer

STEPS, BATCH, SHAPE = 6, 16, (8, 8, 1)
pytestmark = pytest.mark.usefixtures("x64")


def make_task(length=2) -> Denoiser:
    schedule = schedules.cosine(STEPS)
    rate = optim.learning_rate(0.1)
    return Denoiser(
        network=UNet(2, 8, (1,), 1, (False,), False, groups=4),
        sample_shape=SHAPE,
        objective=losses.objective(schedule, "eps", variance="learned", weighting="vlb"),
        draw=lambda keys, x0, step: losses.draw(keys, schedule, x0),
        optimizer=Optimizer({"denoiser": optim.make_transform(rate, "sgd")}, rate, clip_norm=0.1),
        ema=Ema(0.0),
        loss_history=losses.second_moment_history(schedule, length),
    )


def wide(tree):
    """The parameters that were born in float32, in float64."""

    def widen(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(widen, tree)


def batch(i, poison=None):
    image = np.random.default_rng(i).uniform(-1, 1, (BATCH, *SHAPE))
    image = np.full_like(image, np.nan) if poison == i else image
    return {"image": image, "position": np.arange(BATCH, dtype=np.int32)}


def run(parallel, steps, poison=None):
    task = make_task()
    state = parallel.init(lambda key: wide(task.init(key)), jax.random.key(0))
    step = parallel.step(task.train_step)
    histories = []
    for i in range(steps):
        state, _ = step(state, parallel.batch(batch(i, poison)), {})
        histories.append(np.asarray(parallel.gather(state).extra["loss_history"]))
    return histories, jax.device_get(parallel.gather(state))


@functools.cache
def alone():
    return run(Parallel("jit", make_mesh(devices=jax.devices()[:1])), 5)


def test_the_history_fills_and_then_guides_the_times():
    histories, _ = alone()
    assert np.isnan(histories[0]).any()
    assert np.isfinite(histories[-1]).all()
    p = losses.second_moment_probabilities(jnp.asarray(histories[-1]))
    assert np.ptp(np.asarray(p)) > 0.01  # no longer uniform
    np.testing.assert_allclose(np.asarray(p).sum(), 1, rtol=1e-5)


def test_times_are_drawn_as_the_history_says_and_weighed_back():
    """All of a batch at the one time whose losses were large; each loss divided by T p."""
    task, large = make_task(length=BATCH), 3
    state = jax.jit(lambda key: wide(task.init(key)))(jax.random.key(0))
    history = np.full((STEPS, BATCH), 1e-3)
    history[large] = 1e3
    p = float(losses.second_moment_probabilities(jnp.asarray(history))[large])
    state = state.replace(extra={**state.extra, "loss_history": jnp.asarray(history)})
    new, metrics = jax.jit(task.train_step)(state, batch(0), {})
    found = np.asarray(new.extra["loss_history"])
    assert (found[large] != 1e3).all()
    np.testing.assert_array_equal(np.delete(found, large, 0), np.delete(history, large, 0))
    np.testing.assert_allclose(metrics["loss"], found[large].mean() / (STEPS * p), rtol=1e-12)


# pmap gathers the losses of all devices itself; jit sees one array whatever the mesh.
@pytest.mark.parametrize("mode", ["pmap", pytest.param("jit", marks=pytest.mark.slow)])
def test_eight_devices_remember_the_same_losses(mode):
    histories, state = run(Parallel(mode, make_mesh()), 5)
    np.testing.assert_allclose(histories[-1], alone()[0][-1], rtol=1e-12)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone()[1].params)):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_a_loss_that_is_not_finite_is_not_remembered():
    histories, _ = run(Parallel("jit", make_mesh(devices=jax.devices()[:1])), 3, poison=2)
    np.testing.assert_array_equal(histories[2], histories[1])


def test_accumulation_is_refused():
    with pytest.raises(ValueError, match=r"train\.accumulate=2"):
        dataclasses.replace(make_task(), accumulate=2)
