"""Pairs by optimal transport: the assignment itself, straighter paths, and the same on any mesh."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from configs import flow_cifar10
from diffusion.process import losses, schedules
from diffusion.training import coupling
from diffusion.training.parallel import Parallel, make_mesh
from experiments.run import tasks
from tests.training.test_parallel_modes import batches, make_task, single
from tests.training.test_parallel_modes import distance as apart


def drawn(seed, n, *shape):
    """A mixture of two modes, and noise."""
    rng = np.random.default_rng(seed)
    modes = rng.choice([-2.0, 2.0], size=(n, *[1] * len(shape)))
    x0 = modes + 0.3 * rng.normal(size=(n, *shape))
    return jnp.asarray(x0, jnp.float32), jnp.asarray(rng.normal(size=(n, *shape)), jnp.float32)


def test_the_pairs_are_scipys_assignment_and_keep_every_noise():
    x0, noise = drawn(0, 32, 4, 3, 2)
    found = np.asarray(jax.jit(coupling.optimal)(x0, noise))
    x, eps = (np.asarray(a, np.float64).reshape(32, -1) for a in (x0, noise))
    cost = ((x[:, None] - eps[None]) ** 2).sum(-1)
    _, columns = linear_sum_assignment(cost)
    np.testing.assert_array_equal(found, np.asarray(noise)[columns])
    assert cost[np.arange(32), columns].sum() < 0.95 * np.trace(cost)
    assert np.isfinite(coupling.optimal(x0.at[3].set(jnp.nan), noise)).all()  # and it ends


def test_on_a_line_no_two_paths_of_a_mixture_cross():
    """There the optimal pairs are those of the same rank; independent ones cross half the time."""
    x0, noise = drawn(1, 48)

    def crossing(eps):
        gaps = (a[:, None] - a[None] for a in (np.asarray(x0), np.asarray(eps)))
        return float((np.prod([*gaps], axis=0) < 0).mean())

    assert crossing(noise) > 0.4 and crossing(coupling.optimal(x0, noise)) == 0


def test_paths_of_gaussian_data_are_straighter_than_independent_ones():
    """Var[eps - x0 | x_t], 0 for straight flows, is s^2 / ((1 - t)^2 s^2 + t^2) of independent
    pairs of N(0, s^2), from their joint covariance."""
    rng, s, t, n = np.random.default_rng(2), 0.5, 0.4, 64

    def left(pair):
        pairs = []
        for _ in range(40):
            x0, noise = (jnp.asarray(k * rng.normal(size=(n, 1)), jnp.float32) for k in (s, 1.0))
            pairs.append((x0, pair(x0, noise)))
        x0, eps = (np.concatenate(side)[:, 0] for side in zip(*pairs))
        x_t, v = (1 - t) * x0 + t * eps, eps - x0
        slope = (v * x_t).mean() / (x_t * x_t).mean()  # Gaussian: the mean given x_t is linear
        return ((v - slope * x_t) ** 2).mean()

    wanted = s**2 / ((1 - t) ** 2 * s**2 + t**2)
    assert left(lambda x0, eps: eps) == pytest.approx(wanted, rel=0.1)
    assert left(jax.jit(coupling.optimal)) < 0.1 * wanted


class Line(nn.Module):
    """The least network that a denoiser takes."""

    @nn.compact
    def __call__(self, x, t, **given):
        return nn.Dense(x.shape[-1])(x) * (1 + t).reshape(-1, *[1] * (x.ndim - 1))


def task(coupled=True):
    schedule = schedules.Flow()
    return dataclasses.replace(
        make_task(),
        network=Line(),
        objective=losses.objective(schedule, "velocity"),
        draw=lambda keys, x0, step: losses.draw(keys, schedule, x0),
        coupled=coupled,
    )


def test_a_step_is_the_same_on_a_mesh_and_held_out_losses_are_not_coupled():
    alone, (params, *_) = steps(single(), task())
    many, (split, *_) = steps(Parallel("jit", make_mesh(4, 2)), task())
    np.testing.assert_allclose(many, alone, rtol=1e-6)
    assert apart(split, params) < 1e-6
    assert abs(steps(single(), task(False))[0][0] / alone[0] - 1) > 1e-2
    batch = jax.tree.map(jnp.asarray, next(batches()))
    held = {**batch, "index": batch["position"], "valid": jnp.ones(16, bool)}
    state = task().init(jax.random.key(0))
    sums = [made.eval_step(state, held, {})["loss"] for made in (task(), task(False))]
    assert sums[0] == sums[1]


def steps(parallel, made):
    state = parallel.init(made.init, jax.random.key(0))
    step, found = parallel.step(made.train_step), []
    for batch in batches():
        state, metrics = step(state, parallel.batch(batch), {})
        found.append(parallel.scalars(metrics)["loss"])
    return found, (jax.device_get(state.params), state)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("parallel.mode", "pmap", "parallel.mode='pmap', whose steps see parts"),
        ("train.accumulate", 2, "train.accumulate=2, which sees parts"),
        ("process.schedule", {"name": "cosine", "num_steps": 10}, "whose paths are no straight"),
        ("process.coupling", "sinkhorn", "process.coupling='sinkhorn' is unknown"),
    ],
)
def test_what_sees_parts_of_a_batch_is_refused(key, value, words):
    config = flow_cifar10.get_config("smoke")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=words):
        tasks._coupled(config)
