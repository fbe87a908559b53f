"""The one denoiser task on one and on three spatial axes: exact gradients, and a falling loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.data import loader, synthetic
from diffusion.models.unet import UNet
from diffusion.process import gaussian, losses, schedules
from diffusion.process import keys as ks
from diffusion.training import optim
from diffusion.training.denoiser import Denoiser
from diffusion.training.ema import Ema
from diffusion.training.state import Optimizer

SHAPES = {"series": (32, 1), "video": (4, 8, 8, 1)}


def make_task(shape) -> Denoiser:
    schedule = schedules.cosine(100)
    rate = optim.learning_rate(3e-3)
    return Denoiser(
        network=UNet(1, 8, (1, 2), 1, (False, True), groups=4),
        sample_shape=shape,
        objective=losses.objective(schedule, "eps"),
        draw=lambda keys, x0, step: losses.draw(keys, schedule, x0),
        optimizer=Optimizer({"denoiser": optim.make_transform(rate, "adam")}, rate, clip_norm=1.0),
        ema=Ema(0.9, networks=("denoiser",)),
    )


@pytest.mark.parametrize("kind", SHAPES)
def test_gradients_agree_with_finite_differences(kind, x64):
    shape = SHAPES[kind]
    task = make_task(shape)
    rng = np.random.default_rng(0)
    batch = {"image": jnp.asarray(rng.uniform(-1, 1, (2, *shape))), "position": jnp.arange(2)}
    shapes = jax.eval_shape(task.init, jax.random.key(0)).params
    # Every parameter drawn, the zero-initialised ones too, so that all of them have a gradient.
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.1, s.shape)), shapes)
    direction = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 1, s.shape)), shapes)
    keys = ks.example_keys(
        jax.random.key_data(jax.random.key(1)), jnp.zeros((), jnp.int32), batch["position"]
    )

    @jax.jit
    def loss(params):
        return task.loss(params, {}, batch, keys, train=True)[0].mean()

    def along(step):
        return loss(jax.tree.map(lambda p, d: p + step * d, params, direction))

    h = 1e-5
    numeric = float((along(h) - along(-h)) / (2 * h))
    grads = jax.jit(jax.grad(loss))(params)
    exact = float(sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (grads, direction)))))
    assert abs(numeric - exact) < 1e-7 * max(1.0, abs(exact))
    assert abs(exact) > 1e-3


def test_the_loss_on_series_falls():
    task, schedule = make_task(SHAPES["series"]), schedules.cosine(100)
    source = synthetic.signals(256, 32, seed=0)
    batches = loader.Loader(source, 16, seed=0, workers=0)
    state = task.init(jax.random.key(0))
    step = jax.jit(lambda state, batch: task.train_step(state, batch, {}), donate_argnums=0)
    found = []
    for _ in range(120):
        state, metrics = step(state, {k: jnp.asarray(v) for k, v in next(batches).items()})
        found.append(float(metrics["loss"]))
    assert np.mean(found[-20:]) < 0.2 * np.mean(found[:5])

    # What it learned is of these series: it is missed where their values stand in another order.
    x0 = synthetic.signals(512, 32, seed=1).batch(np.arange(512))["image"]
    shuffled = np.random.default_rng(0).permuted(x0, axis=1)
    t, noise = losses.draw(jax.random.split(jax.random.key(2), 512), schedule, jnp.asarray(x0))

    @jax.jit
    def error(x0):
        x_t = gaussian.q_sample(schedule, x0, t, noise)
        return jnp.square(task.predict(state.params, x_t, t, {}) - noise).mean()

    assert error(jnp.asarray(x0)) < 0.8 * error(jnp.asarray(shuffled))
