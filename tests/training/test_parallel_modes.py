"""One device, `jit` over meshes, FSDP, `pmap`, accumulation and remat are the same step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.checkpoint import Checkpoints
from diffusion.models import target
from diffusion.models.unet import UNet
from diffusion.process import keys as ks
from diffusion.process import losses, schedules
from diffusion.training import optim
from diffusion.training.denoiser import Denoiser
from diffusion.training.ema import Ema
from diffusion.training.parallel import Parallel, check_batch, make_mesh, partition, unsharded
from diffusion.training.state import Optimizer

BATCH, SHAPE = 16, (8, 8, 4)


def make_task(accumulate=1, remat=None, optimizer="sgd") -> Denoiser:
    schedule = schedules.ddpm_linear(100)
    rate = optim.learning_rate(0.1 if optimizer == "sgd" else 1e-3)
    transform = optim.make_transform(rate, optimizer, eps=1e-3)
    return Denoiser(
        network=UNet(4, 32, (1,), 1, (True,), False, groups=8, dropout=0.1, remat=remat),
        sample_shape=SHAPE,
        objective=losses.objective(schedule, "eps"),
        draw=lambda keys, x0, step: losses.draw(keys, schedule, x0),
        optimizer=Optimizer({"denoiser": transform}, rate, clip_norm=1.0),
        ema=Ema(0.9, networks=("denoiser",), profiles=(0.25,)),
        accumulate=accumulate,
    )


def batches():
    rng = np.random.default_rng(0)
    for _ in range(3):
        yield {
            "mean": rng.normal(size=(BATCH, *SHAPE)).astype(np.float32),
            "logvar": rng.normal(size=(BATCH, *SHAPE)).astype(np.float32),
            "position": np.arange(BATCH, dtype=np.int32),
        }


def run(parallel: Parallel, task: Denoiser):
    """Three steps: the losses, and the state on the host."""
    state = parallel.init(task.init, jax.random.key(0))
    step = parallel.step(task.train_step)
    found = []
    for batch in batches():
        state, metrics = step(state, parallel.batch(batch), {})
        found.append(parallel.scalars(metrics)["loss"])
    return found, jax.device_get(parallel.gather(state)), state


def single() -> Parallel:
    return Parallel("jit", make_mesh(devices=jax.devices()[:1]))


@functools.cache
def reference(optimizer: str):
    return run(single(), make_task(optimizer=optimizer))[:2]


def distance(a, b) -> float:
    """norm(a - b) / norm(b) over all leaves."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    difference = sum(np.sum((x.astype(np.float64) - y) ** 2) for x, y in pairs)
    size = sum(np.sum(y.astype(np.float64) ** 2) for _, y in pairs)
    return float(np.sqrt(difference / size))


def meshes(data, fsdp):
    return lambda: Parallel("jit", make_mesh(data, fsdp))


WAYS = {
    "data8": (meshes(8, 1), {}),
    "fsdp8": (meshes(1, 8), {}),
    "data2_fsdp4": (meshes(2, 4), {}),
    "pmap": (lambda: Parallel("pmap", make_mesh()), {}),
    "accumulate": (
        lambda: Parallel("jit", make_mesh(devices=jax.devices()[:4])),
        {"accumulate": 4},
    ),
    "remat": (single, {"remat": "conv"}),
}


# Adam's for those whose optimiser state lies in parts; their plain gradients in the slow half.
OF_ADAM = ("fsdp8", "pmap")


@pytest.mark.parametrize(
    ("way", "optimizer"),
    [
        *((way, "adam") for way in OF_ADAM),
        *((way, "sgd") for way in WAYS if way not in OF_ADAM),
        *(pytest.param(way, "sgd", marks=pytest.mark.slow) for way in OF_ADAM),
    ],
)
def test_every_way_is_the_plain_step(way, optimizer):
    make, changed = WAYS[way]
    losses_found, state, _ = run(make(), make_task(**changed, optimizer=optimizer))
    losses_wanted, wanted = reference(optimizer)
    np.testing.assert_allclose(losses_found, losses_wanted, rtol=1e-6)
    assert distance(state.params, wanted.params) < 1e-6
    assert distance(state.ema, wanted.ema) < 1e-6
    assert distance(state.profiles, wanted.profiles) < 1e-6
    assert int(state.step) == 3
    start = jax.device_get(single().init(make_task().init, jax.random.key(0)))
    assert distance(wanted.params, start.params) > 1e-4  # the steps did something


def test_a_step_traced_for_gpus_is_the_same():
    """Its guarded update by lines, its norms and its group norms; float32 attention is XLA's."""
    task = make_task(optimizer="adam")
    task = dataclasses.replace(task, optimizer=dataclasses.replace(task.optimizer, by_element=True))
    found = []
    for platform in ("cpu", "gpu"):
        with target.handed(target.Target(platform)):
            step = jax.jit(task.train_step)
            state = jax.jit(task.init)(jax.random.key(0))
            for batch in batches():
                state, metrics = step(state, batch, {})
        found.append(jax.device_get((state, metrics["loss"])))
    (wanted, loss), (state, other) = found
    assert distance(other, loss) < 1e-6
    assert distance(state.params, wanted.params) < 1e-6
    assert distance(state.ema, wanted.ema) < 1e-6


def test_draws_are_bit_equal_in_every_mode():
    task = make_task()
    (batch, *_) = batches()
    rng = jax.random.key_data(jax.random.key(3))

    def draws(batch):
        keys = ks.example_keys(rng, jnp.int32(5), batch["position"])
        t, noise = task.draw(ks.stream(keys, ks.TIMES), jnp.zeros((len(keys), *SHAPE)), 5)
        x0 = task.clean({}, {}, batch, keys, True)
        mask = jax.vmap(jax.random.bernoulli)(ks.stream(keys, ks.DROPOUT))
        return t, noise, x0, mask

    wanted = jax.device_get(jax.jit(draws)(batch))
    for parallel in (Parallel("jit", make_mesh()), Parallel("pmap", make_mesh())):
        placed = parallel.batch(batch)
        found = jax.jit(draws)(placed) if parallel.mode == "jit" else jax.pmap(draws)(placed)
        for a, b in zip(jax.device_get(found), wanted):
            np.testing.assert_array_equal(np.asarray(a).reshape(b.shape), b)
    # An example's draws belong to its position, not to where it lies in the batch.
    shuffled = jax.tree.map(lambda x: x[::-1], batch)
    for a, b in zip(jax.device_get(jax.jit(draws)(shuffled)), wanted):
        np.testing.assert_array_equal(a[::-1], b)


def test_state_is_donated_and_its_shardings_do_not_drift():
    parallel, task = Parallel("jit", make_mesh(1, 8)), make_task()
    state = parallel.init(task.init, jax.random.key(0))
    before = jax.tree.map(lambda x: x.sharding, state)
    step = parallel.step(task.train_step)
    for batch in batches():
        after, _ = step(state, parallel.batch(batch), {})
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
        same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), after, before)
        assert all(jax.tree.leaves(same))
        state = after


@pytest.mark.parametrize("parallel", [("jit", 1, 8), ("jit", 8, 1), ("pmap", 8, 1)])
def test_after_the_first_step_nothing_is_traced_or_compiled(parallel):
    mode, data, fsdp = parallel
    parallel, task, heard = Parallel(mode, make_mesh(data, fsdp)), make_task(), []

    def listen(event, seconds, **_):
        if "trace" in event or "compile" in event:
            heard.append(event)

    state = parallel.init(task.init, jax.random.key(0))
    step = parallel.step(task.train_step)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for number, batch in enumerate(batches()):
            placed = parallel.batch(batch)
            heard.clear()
            state, _ = step(state, placed, {})
            assert bool(heard) == (number == 0), heard
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A checkpoint of step 2 on eight devices, and the state and loss of the third step there."""
    folder = tmp_path_factory.mktemp("eight")
    parallel, task = Parallel("jit", make_mesh(1, 8)), make_task(optimizer="adam")
    state = parallel.init(task.init, jax.random.key(0))
    step = parallel.step(task.train_step)
    for done, batch in enumerate(batches()):
        if done == 2:
            with Checkpoints(folder) as checkpoints:
                checkpoints.save(done, state, {}, {})
        state, metrics = step(state, parallel.batch(batch), {})
    return folder, jax.device_get(state), float(metrics["loss"])


@pytest.mark.parametrize(
    ("data", "fsdp"), [(2, 2), (1, 1), pytest.param(1, 2, marks=pytest.mark.slow)]
)
def test_a_checkpoint_of_eight_devices_goes_on_on_fewer(data, fsdp, eight):
    folder, wanted, loss = eight
    task = make_task(optimizer="adam")
    parallel = Parallel("jit", make_mesh(data, fsdp, jax.devices()[: data * fsdp]))
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(parallel.abstract(task.init, jax.random.key(0)))
    assert restored is not None and restored.step == 2
    *_, batch = batches()
    step = parallel.step(task.train_step)
    state, metrics = step(restored.state, parallel.batch(batch), {})
    np.testing.assert_allclose(float(metrics["loss"]), loss, rtol=1e-6)
    for part in ("params", "ema", "opt_state"):
        assert distance(*(getattr(jax.device_get(s), part) for s in (state, wanted))) < 1e-6


def test_what_fsdp_cannot_split_is_listed_and_none_at_all_is_refused():
    shape = jax.ShapeDtypeStruct
    fits = {"a": shape((64, 64), jnp.float32), "b": shape((4097, 3), jnp.float32)}
    parallel = Parallel("jit", make_mesh(1, 8))
    assert parallel.check_split(fits) == ["['b']"]
    assert Parallel("jit", make_mesh(8, 1)).check_split(fits) == []
    with pytest.raises(ValueError, match=r"parallel\.fsdp=8 splits no parameter.*fsdp=1"):
        parallel.check_split({"b": fits["b"]})


def test_fsdp_holds_an_eighth_of_what_is_large():
    parallel, task = Parallel("jit", make_mesh(1, 8)), make_task()
    state = parallel.init(task.init, jax.random.key(0))
    kernel = state.params["denoiser"]["mid_res_0"]["conv1"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    assert unsharded(parallel.mesh, jax.eval_shape(task.init, jax.random.key(0))) == []


def test_partition_takes_the_largest_divisible_dimension():
    assert partition((3, 3, 64, 128), 8) == jax.P(None, None, None, "fsdp")
    assert partition((3, 3, 128, 60), 8) == jax.P(None, None, "fsdp")
    assert partition((8,), 8) == jax.P()  # too small
    assert partition((4097, 3), 8) == jax.P()  # divisible by nothing


def test_a_step_that_is_not_finite_changes_nothing():
    parallel, task = single(), make_task(optimizer="adam")
    state = parallel.init(task.init, jax.random.key(0))
    kept = jax.device_get(state)
    (batch, *_) = batches()
    batch["mean"][3, 0, 0, 0] = np.nan
    state, metrics = parallel.step(task.train_step)(state, parallel.batch(batch), {})
    assert not np.isfinite(float(metrics["loss"]))
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(kept, name), getattr(state, name))
    assert int(state.step) == 1
    assert int(state.extra["skipped_steps"]) == int(state.extra["skipped_in_a_row"]) == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_mesh(fsdp=3), ("parallel.fsdp=3", "8")),
        (lambda: make_mesh(data=3, fsdp=2), ("parallel.data=3", "8 devices")),
        (lambda: Parallel("both", make_mesh()), ("parallel.mode='both'", "pmap")),
        (lambda: Parallel("pmap", make_mesh(1, 8)), ("parallel.fsdp=8", "jit")),
        (lambda: check_batch(20, 1, 8), ("train.batch_size=20", "8")),
        (lambda: check_batch(16, 4, 8), ("train.accumulate=4", "32")),
    ],
)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("mode, fsdp", [("jit", 1), ("jit", 2), ("pmap", 1)])
def test_a_state_begins_with_the_parameters_that_it_is_given(mode, fsdp):
    """And their averages; all else is what it would have been."""
    task, key = make_task(optimizer="adam"), jax.random.key(0)
    parallel = Parallel(mode, make_mesh(fsdp=fsdp))
    fresh = jax.device_get(single().init(task.init, key))
    conv_in = jax.tree.map(lambda x: np.asarray(x) + 1, fresh.params["denoiser"]["conv_in"])
    start = {"denoiser": {"conv_in": conv_in}}
    state = parallel.init(task.init, key, start)
    found = jax.device_get(parallel.gather(state))
    shardings = parallel.shardings(jax.eval_shape(task.init, key))
    if mode == "jit":
        assert jax.tree.map(lambda x: x.sharding, state) == shardings
    wanted = {**fresh.params["denoiser"], "conv_in": conv_in}
    for tree in (found.params["denoiser"], found.ema["denoiser"]):
        jax.tree.map(np.testing.assert_array_equal, tree, wanted)
    jax.tree.map(np.testing.assert_array_equal, found.opt_state, fresh.opt_state)
    wrong = {"denoiser": {"conv_in": {"bias": np.zeros(3, np.float32)}}}
    with pytest.raises(ValueError, match=r"init_from: a parameter has shape \(3,\), not \(32,\)"):
        parallel.init(task.init, key, wrong)
