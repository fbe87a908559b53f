"""Second-moment resampling inside the step: the same under every way to run it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models.unet import UNet
from diffusion.process import losses, schedules
from diffusion.training import optim
from diffusion.training.denoiser import Denoiser
from diffusion.training.parallel import Parallel, make_mesh
from diffusion.training.state import Ema, Optimizer

STEPS, BATCH, SHAPE = 6, 16, (8, 8, 1)


def make_task() -> Denoiser:
    schedule = schedules.cosine(STEPS)
    rate = optim.learning_rate(0.1)
    return Denoiser(
        unet=UNet(2, 8, (1,), 1, (False,), False, groups=4),
        sample_shape=SHAPE,
        objective=losses.objective(schedule, "eps", variance="learned", weighting="vlb"),
        draw=lambda keys, x0: losses.draw(keys, schedule, x0),
        optimizer=Optimizer({"unet": optim.make_transform(rate, "sgd")}, rate, clip_norm=0.1),
        ema=Ema(0.0),
        loss_history=losses.second_moment_history(schedule, length=2),
    )


def run(parallel, steps, poison=None):
    task = make_task()
    state = parallel.init(task.init, jax.random.key(0))
    step = parallel.step(task.train_step)
    rng = np.random.default_rng(0)
    histories = []
    for i in range(steps):
        image = rng.integers(0, 256, (BATCH, *SHAPE), dtype=np.uint8)
        if poison == i:
            image = np.full((BATCH, *SHAPE), np.nan, np.float32)
        batch = {"image": image, "position": np.arange(BATCH, dtype=np.int32)}
        state, _ = step(state, parallel.batch(batch), {})
        histories.append(np.asarray(parallel.gather(state).extra["loss_history"]))
    return histories, jax.device_get(parallel.gather(state))


@pytest.fixture(scope="module")
def alone():
    return run(Parallel("jit", make_mesh(devices=jax.devices()[:1])), 5)


def test_the_history_fills_and_then_guides_the_times(alone):
    histories, _ = alone
    assert np.isnan(histories[0]).any()
    assert np.isfinite(histories[-1]).all()
    p = losses.second_moment_probabilities(jnp.asarray(histories[-1]))
    assert np.ptp(np.asarray(p)) > 0.01  # no longer uniform
    np.testing.assert_allclose(np.asarray(p).sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_eight_devices_remember_the_same_losses(mode, alone):
    histories, state = run(Parallel(mode, make_mesh()), 5)
    np.testing.assert_allclose(histories[-1], alone[0][-1], rtol=2e-5)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone[1].params)):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_loss_that_is_not_finite_is_not_remembered():
    histories, _ = run(Parallel("jit", make_mesh(devices=jax.devices()[:1])), 3, poison=2)
    np.testing.assert_array_equal(histories[2], histories[1])


def test_accumulation_is_refused():
    with pytest.raises(ValueError, match=r"train\.accumulate=2"):
        dataclasses.replace(make_task(), accumulate=2)
