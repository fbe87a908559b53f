"""Steps that are not finite, or whose loss leaps: nothing changes, and too many end the run."""

import functools
import json
import math
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.checkpoint import restore_params
from diffusion.manifest import latest_step
from diffusion.training import optim
from diffusion.training import state as ts
from diffusion.training.ema import Ema
from experiments.run import data, tasks

LEARNED = ("params", "opt_state", "ema", "profiles")


@functools.cache
def made(trials_here: str, kind: str):
    """A task of tiny.py, its state after two steps, and the compiled step."""
    config = runpy.run_path(f"{trials_here}/tiny.py")["get_config"](kind)
    config.data.image_size = (16,)
    task = tasks.task(config)
    state = task.init(jax.random.key(1))
    step = jax.jit(lambda state, batch: task.train_step(state, batch, {}))
    source, _ = data.open_images(config, "train")
    batch = {**source.batch(np.arange(8)), "position": np.arange(8, dtype=np.int32)}
    for _ in range(3):
        state, metrics = step(state, batch)
    assert float(metrics["skipped_steps"]) == 0
    return task, state, step, batch


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def learned(state):
    extra = {k: v for k, v in state.extra.items() if not k.startswith("skipped")}
    return bits([getattr(state, name) for name in LEARNED] + [extra])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["denoiser", "first_stage"])
def test_a_bad_example_changes_no_bit(kind, value, trials):
    _, state, step, batch = made(trials.here, kind)
    image = batch["image"].copy()
    image[3, 5, 0] = value
    new, metrics = step(state, {**batch, "image": image})
    assert learned(new) == learned(state)
    assert int(new.extra["skipped_in_a_row"]) == int(metrics["skipped_steps"]) == 1
    assert int(new.step) == int(state.step) + 1
    good, _ = step(new, batch)  # and the next one goes on
    assert learned(good) != learned(state) and int(good.extra["skipped_in_a_row"]) == 0


@pytest.mark.parametrize("kind", ["denoiser", "first_stage"])
def test_a_bad_gradient_anywhere_changes_no_bit(kind, trials):
    """NaN in one element of each leaf's gradient in turn, the loss finite."""
    task, state, _, _ = made(trials.here, kind)
    update = jax.jit(
        lambda state, grads: ts.apply_gradients(
            state, grads, jnp.float32(1), task.optimizer, task.ema
        )
    )
    leaves, structure = jax.tree.flatten(
        jax.tree.map(lambda x: np.full(x.shape, 0.1), state.params)
    )
    assert len(leaves) > 20
    for n, leaf in enumerate(leaves):
        bad = leaf.copy()
        bad.flat[leaf.size // 2] = np.nan
        grads = structure.unflatten([*leaves[:n], bad, *leaves[n + 1 :]])
        new, _ = update(state, jax.tree.map(jnp.float32, grads))
        assert learned(new) == learned(state), n
    good, _ = update(state, jax.tree.map(jnp.float32, structure.unflatten(leaves)))
    assert learned(good) != learned(state)


def test_too_many_in_a_row_end_the_run_and_name_the_examples(trials, tmp_path):
    """Steps 5 to 9 are bad, three may be: the run ends at the seventh or, since the host is up to
    two steps behind, before the tenth; a checkpoint from before them is kept."""
    workdir = tmp_path / "run"
    flags = ("--config.train.max_skipped_in_a_row=3", "--config.train.keep_checkpoints=1")
    flags = (*flags, "--config.train.save_every_steps=2", "--config.train.log_every_steps=100")
    fault = {"at": "nan", "steps": [5, 6, 7, 8, 9]}
    assert trials.run_way(workdir, "denoiser", *flags, fault=fault) == [2]
    (error,) = [line for line in trials.log(workdir).splitlines() if line.startswith("error: ")]
    assert "3 steps in a row up to step 7 were skipped" in error
    assert "train.max_skipped_in_a_row=3" in error
    source = np.concatenate([batch_of(step) for step in range(1, 11)]).reshape(10, 8)
    assert f"examples on this process are {', '.join(map(str, source[6]))};" in error
    assert "Traceback" not in trials.log(workdir)
    kept = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert 4 in kept and max(kept) < 8
    state = restore_params(workdir / "checkpoints", ("params",))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.items))
    before = restore_params(workdir / "checkpoints", ("params", "opt_state", "ema"), step=4)
    after = restore_params(workdir / "checkpoints", ("params", "opt_state", "ema"))
    assert after.step == latest_step(workdir / "checkpoints")
    assert bits(before.items) == bits(after.items)


def batch_of(step):
    from diffusion.data.loader import Batches
    from diffusion.data.synthetic import signals

    source = signals(28, 16, 0)
    return Batches(source, 8, 0, (), slice(0, 8))[step - 1]["index"]


def test_fewer_bad_steps_are_counted_and_the_run_goes_on(trials, tmp_path):
    workdir = tmp_path / "run"
    fault = {"at": "nan", "steps": [5, 6]}
    flags = ("--config.train.max_skipped_in_a_row=3",)
    found = trials.digest(workdir, "denoiser", *flags, fault=fault)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_in_a_row"] for row in rows] == [0, 0, 0, 0, 1, 2, 0, 0, 0, 0]
    assert [row["step"] for row in rows if row["loss"] is None] == [5, 6]
    assert rows[-1]["skipped_steps"] == 2
    assert found["state"] != trials.unbroken("denoiser")["state"]
    assert trials.log(workdir).count("was skipped") == 2


# -- spikes ----------------------------------------------------------------------------------------


def toy(deviations):
    rate = optim.learning_rate(0.1)
    transform = {"net": optim.make_transform(rate, "sgd", b1=0.0)}
    optimizer = ts.Optimizer(transform, rate, max_loss_deviations=deviations)
    params, ema = {"net": {"w": jnp.ones(2)}}, Ema(0.5, networks=("net",))
    state = ts.create_state(jax.random.key(0), params, optimizer, ema, {})
    update = jax.jit(
        lambda state, loss: ts.apply_gradients(
            state, {"net": {"w": jnp.ones(2)}}, loss, optimizer, ema
        )[0]
    )
    return state, update


def test_a_spike_is_skipped_and_equation_5_is_the_mean_and_variance():
    state, update = toy(5.0)
    losses = np.random.default_rng(0).normal(2, 0.1, 100).astype(np.float32)
    early = update(state, jnp.float32(1e6))  # no spike before a hundred steps were taken
    assert int(early.extra["skipped_steps"]) == 0
    for loss in losses:
        state = update(state, loss)
    known = state.extra[ts.LOSSES]
    np.testing.assert_allclose(known["mean"], losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(known["variance"], losses.var(), rtol=1e-3)
    bound = losses.mean() + 5 * losses.std()
    above, below = update(state, bound * 1.01), update(state, bound * 0.99)
    assert learned(above) == learned(state) and int(above.extra["skipped_in_a_row"]) == 1
    assert learned(below) != learned(state) and int(below.extra["skipped_in_a_row"]) == 0
    nan = update(state, jnp.float32(math.nan))
    assert learned(nan) == learned(state) and int(nan.extra["skipped_in_a_row"]) == 1
    # After a skip the next loss counts as before it, and the average forgets at 1 / 100.
    after = update(above, jnp.float32(2.3))
    mean = float(known["mean"])
    np.testing.assert_allclose(after.extra[ts.LOSSES]["mean"], mean + (2.3 - mean) / 100, rtol=1e-6)


def test_off_it_keeps_no_statistics_and_skips_no_loss():
    state, update = toy(0.0)
    assert ts.LOSSES not in state.extra
    for _ in range(101):
        state = update(state, jnp.float32(1))
    assert int(update(state, jnp.float32(1e9)).extra["skipped_steps"]) == 0
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match=r"train\.max_loss_deviations"):
            toy(bad)
