"""Few steps on real networks: forward mode, a trained network as start, every parallel mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models import convolution, target
from diffusion.models.song import SongUNet
from diffusion.models.transformer import Transformer
from diffusion.models.unet import UNet
from diffusion.process import consistency, few_steps, latent_consistency, schedules
from diffusion.training import optim
from diffusion.training import parallel as modes
from diffusion.training.conditions import Label
from diffusion.training.denoiser import Denoiser
from diffusion.training.ema import Ema
from diffusion.training.parallel import Parallel, make_mesh
from diffusion.training.state import Optimizer

BATCH, SHAPE = 8, (4, 4, 4)
NETWORKS = {
    "unet": UNet(4, 8, (1, 2), 1, (False, True), groups=4, num_classes=3, dropout=0.2),
    "transformer": Transformer(
        4, 2, 24, 2, 2, num_classes=3, positions="rotary", qk_norm=True, norm="rms"
    ),
}


SONG = SongUNet(4, 8, (1, 2), 1, (False, True), groups=4, num_classes=3)


def drawn(network, seed=0, **given):
    """Every parameter random, the zero-initialised ones too."""
    shapes = jax.eval_shape(
        lambda: network.init(jax.random.key(0), jnp.zeros((2, *SHAPE)), jnp.zeros(2), **given)
    )["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.2, p.shape)), shapes)


def inputs():
    rng = np.random.default_rng(1)
    x, v = (jnp.asarray(rng.normal(size=(2, *SHAPE))) for _ in range(2))
    return x, v, jnp.asarray([800.0, 300.0]), jnp.asarray([100.0, 300.0])


@pytest.mark.parametrize(
    ("kind", "remat"), [("unet", None), ("transformer", "full"), ("song", None)]
)
def test_the_jvp_is_a_finite_difference(kind, remat, x64, monkeypatch):
    """With dropout keyed alike on both sides; as for one CPU device, every convolution large."""
    network = {**NETWORKS, "song": SONG}[kind].clone(second_time=True, remat=remat)
    labels = jnp.asarray([0, 2])
    params, (x, v, t, s) = drawn(network, labels=labels), inputs()
    keys = jax.random.split(jax.random.key(0), 2)

    def output(x, t):
        return network.apply({"params": params}, x, t, labels=labels, s=s, keys=keys)

    monkeypatch.setattr(convolution, "LARGE", 1)
    with target.handed(target.Target("cpu")):
        if kind != "transformer":
            with pytest.raises(TypeError, match="forward-mode"):
                jax.jvp(output, (x, t), (v, jnp.ones(2)))
        with target.forward_mode():
            _, found = jax.jvp(output, (x, t), (v, jnp.ones(2)))
    h = 1e-6
    numeric = (output(x + h * v, t + h) - output(x - h * v, t - h)) / (2 * h)
    assert float(jnp.abs(found).max()) > 1e-2
    np.testing.assert_allclose(found, numeric, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_trained_network_is_its_own_start(kind):
    labels, (x, _, t, s) = jnp.asarray([0, 2]), inputs()
    plain, told = NETWORKS[kind], NETWORKS[kind].clone(second_time=True)
    trained = drawn(plain, labels=labels)
    fresh = told.init(jax.random.key(0), x, t, labels=labels)["params"]
    params = {**fresh, **trained}
    given = {"labels": labels}
    want = plain.apply({"params": trained}, x, t, **given)
    for end in ({}, {"s": s}):
        np.testing.assert_array_equal(told.apply({"params": params}, x, t, **given, **end), want)
    params = drawn(told, labels=labels)
    without, at_t, jump = (
        told.apply({"params": params}, x, t, **given, **end) for end in ({}, {"s": t}, {"s": s})
    )
    np.testing.assert_array_equal(without, at_t)
    np.testing.assert_allclose(jump[1], at_t[1], rtol=0, atol=1e-6)  # there s = t
    assert float(jnp.abs(jump[0] - at_t[0]).max()) > 1e-3
    with pytest.raises(ValueError, match="second_time=False"):
        plain.apply({"params": trained}, x, t, **given, s=s)


SMALL = Transformer(4, 2, 16, 1, 2, num_classes=3, norm="rms", second_time=True)


def meanflow(**options):
    return few_steps.MeanFlow(schedules.Flow(), equal=0.25, guidance_scale=2.0, **options)


def task(method=None, accumulate=1, remat=None) -> Denoiser:
    method = meanflow() if method is None else method
    rate = optim.learning_rate(0.1)
    told = isinstance(method, few_steps.MeanFlow) or getattr(method, "clean", 1) < 1
    return Denoiser(
        network=SMALL.clone(second_time=told, remat=remat),
        sample_shape=SHAPE,
        objective=target.forward_mode()(method.loss) if method.forward_mode else method.loss,
        draw=method.draw,
        optimizer=Optimizer({"denoiser": optim.make_transform(rate, "sgd")}, rate, clip_norm=1.0),
        ema=Ema(0.9, networks=("denoiser",)),
        conditions={"label": Label(2)},
        drop_condition=0.2,
        teacher=SMALL.clone(second_time=False) if method.teacher else None,
        accumulate=accumulate,
    )


def steps(parallel: Parallel, task: Denoiser):
    """A fresh teacher would put out zeros, whatever it is asked."""
    state, found = parallel.init(task.init, jax.random.key(0)), []
    if parallel.mesh.shape["fsdp"] > 1:
        assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    made = {"teacher": drawn(task.teacher, labels=jnp.zeros(2, int))} if task.teacher else {}
    frozen = parallel.replicate(made)
    step, rng = parallel.step(task.train_step), np.random.default_rng(0)
    for _ in range(2):
        batch = {
            "mean": rng.normal(size=(BATCH, *SHAPE)).astype(np.float32),
            "label": rng.integers(0, 2, BATCH).astype(np.int32),
            "position": np.arange(BATCH, dtype=np.int32),
        }
        state, metrics = step(state, parallel.batch(batch), frozen)
        found.append(parallel.scalars(metrics)["loss"])
    return found, jax.device_get(parallel.gather(state)).params


def distance(a, b) -> float:
    pairs = list(zip(*map(jax.tree.leaves, (a, b)), strict=True))
    return np.sqrt(
        sum(np.sum((x.astype(np.float64) - y) ** 2) for x, y in pairs)
        / sum(np.sum(y.astype(np.float64) ** 2) for _, y in pairs)
    )


def single() -> Parallel:
    return Parallel("jit", make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(autouse=True)
def split_small_parameters(monkeypatch):
    """As large ones are."""
    monkeypatch.setattr(modes, "MIN_SHARDED_SIZE", 256)


@pytest.fixture(scope="module")
def plain():
    return steps(single(), task())


WAYS = {
    "fsdp4": lambda: Parallel("jit", make_mesh(2, 4)),
    "pmap": lambda: Parallel("pmap", make_mesh()),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_the_plain_step(way, plain):
    losses, params = steps(WAYS[way](), task())
    np.testing.assert_allclose(losses, plain[0], rtol=1e-6)
    assert distance(params, plain[1]) < 1e-6
    start = jax.device_get(single().init(task().init, jax.random.key(0)).params)
    assert distance(plain[1], start) > 1e-3


GUIDED = {"teacher": "velocity", "guidance_scale": 2.0}
OBJECTIVES = {
    "improved": meanflow(improved=True),
    "consistency": consistency.Consistency(schedules.EDM()),
    "jumps": consistency.Consistency(schedules.Flow(), "velocity", skip=0.1, clean=0.5, **GUIDED),
    "scm": consistency.ContinuousConsistency(schedules.TrigFlow(), warmup_steps=1),
    "progressive": consistency.Progressive(schedules.Flow(), "v", steps=2, **GUIDED),
    "lcm": latent_consistency.LatentConsistency(schedules.scaled_linear(), teacher="eps"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_the_plain_step_sharded_in_parts_and_recomputed(name):
    """At once: parameters and examples over four devices, parts of a batch, remat."""
    method, parallel = OBJECTIVES[name], Parallel("jit", make_mesh(1, 4, jax.devices()[:4]))
    plain = steps(single(), task(method))
    losses, params = steps(parallel, task(method, accumulate=2, remat="full"))
    np.testing.assert_allclose(losses, plain[0], rtol=1e-6)
    assert distance(params, plain[1]) < 1e-6
    assert abs(losses[1] / losses[0] - 1) > 1e-3


def test_the_teacher_is_frozen_and_read():
    """It moves no gradient; another teacher, another loss."""
    made = task(meanflow(teacher="velocity"))
    teacher = made.teacher
    params = {"denoiser": drawn(SMALL, labels=jnp.zeros(2, int))}
    params |= {"teacher": made.networks_init(jax.random.key(0))["teacher"]}
    batch = {"mean": jnp.ones((2, *SHAPE)), "label": jnp.asarray([0, 1])}
    keys = jax.random.split(jax.random.key(1), 2)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return made.loss(params, {}, batch, keys, train=True)[0].mean()

    other = {**params, "teacher": drawn(teacher, labels=batch["label"])}
    (first, grads), (second, _) = loss(params), loss(other)
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads["teacher"]))
    assert any(leaf.any() for leaf in jax.tree.leaves(grads["denoiser"]))
    assert abs(float(first - second)) > 1e-3
