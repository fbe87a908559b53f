"""Learning-rate schedules, optimisers and averages against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion.models import target
from diffusion.training import optim
from diffusion.training import state as ts
from diffusion.training.ema import Ema


def test_warmup_starts_at_zero_and_reaches_the_peak():
    rate = optim.learning_rate(2e-4, warmup_steps=5000)
    np.testing.assert_allclose(
        [rate(0), rate(2500), rate(5000), rate(10**6)], [0, 1e-4, 2e-4, 2e-4]
    )


@pytest.mark.parametrize(("decay", "middle", "end"), [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0)])
def test_decay_ends_at_decay_steps(decay, middle, end):
    rate = optim.learning_rate(1.0, 10, 110, decay)
    np.testing.assert_allclose([rate(10), rate(60), rate(110)], [1.0, middle, end], atol=1e-6)


def test_inverse_sqrt_is_flat_then_falls():
    rate = optim.learning_rate(1.0, 0, 100, "inverse_sqrt")
    np.testing.assert_allclose([rate(50), rate(100), rate(400)], [1.0, 1.0, 0.5])


def test_adam_first_step_is_the_learning_rate():
    transform = optim.make_transform(optim.learning_rate(0.1))
    params = {"w": jnp.array([1.0, -2.0])}
    updates, _ = transform.update({"w": jnp.array([3.0, -0.5])}, transform.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.1, 0.1], rtol=1e-5)


def test_adamw_decays_the_weights_and_adam_refuses_to():
    transform = optim.make_transform(lambda step: 0.1, "adamw", weight_decay=0.5)
    params = {"w": jnp.array([2.0])}
    updates, _ = transform.update({"w": jnp.zeros(1)}, transform.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.1 * 0.5 * 2.0])
    with pytest.raises(ValueError, match=r"optim.weight_decay=0.5.*adamw"):
        optim.make_transform(lambda step: 0.1, "adam", weight_decay=0.5)


def test_radam_is_pytorchs():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    ours, transform = jnp.zeros(5), optim.make_transform(lambda step: 0.01, "radam")
    theirs = torch.zeros(5, requires_grad=True)
    state, optimizer = transform.init(ours), torch.optim.RAdam([theirs], lr=0.01)
    for grad in rng.normal(size=(30, 5)).astype(np.float32):
        theirs.grad = torch.tensor(grad)
        optimizer.step()
        updates, state = transform.update(jnp.asarray(grad), state, ours)
        ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(ours, theirs.detach(), atol=1e-4)
    assert np.abs(ours).max() > 0.02


def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adamw():
    transform = optim.make_transform(lambda step: 0.1, "muon", weight_decay=0.5)
    plain = optim.make_transform(lambda step: 0.1, "adamw", weight_decay=0.5)
    rng = np.random.default_rng(0)
    names = {"kernel": (8, 24), "bias": (24,), "embedding": (8, 24), "table": (6, 4)}
    params, grads = (
        {"d": {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in names.items()}}
        | {"conv": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 4, 4)), jnp.float32)}}
        for _ in range(2)
    )
    params["d"]["kernel"] *= 0
    updates, _ = transform.update(grads, transform.init(params), params)
    expected, _ = plain.update(grads, plain.init(params), params)
    kernel = updates["d"].pop("kernel")
    expected["d"].pop("kernel")
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    # The first momentum is the gradient: its singular vectors, all values near one.
    u, s, v = np.linalg.svd(np.asarray(kernel) / -0.1 / 0.2 / np.sqrt(24))
    assert 0.6 < s.min() < s.max() < 1.3
    left, _, right = np.linalg.svd(np.asarray(grads["d"]["kernel"]), full_matrices=False)
    np.testing.assert_allclose(
        u @ np.diag(s) @ v[:8],
        left @ np.diag(np.diag(left.T @ (u @ np.diag(s) @ v[:8]) @ right.T)) @ right,
        atol=2e-2,
    )
    with pytest.raises(ValueError, match=r"optim.momentum=1.0 must lie in \[0, 1\)"):
        optim.make_transform(lambda step: 0.1, "muon", momentum=1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: optim.learning_rate(1.0, decay="steps"),
        lambda: optim.learning_rate(1.0, 100, 50, "cosine"),
        lambda: optim.make_transform(lambda step: 1.0, "lion"),
    ],
)
def test_unknown_or_impossible_settings_are_refused(make):
    with pytest.raises(ValueError, match=r"optim\."):
        make()


def test_ema_starts_at_the_weights_after_the_first_step():
    ema = Ema(0.9999)
    np.testing.assert_allclose([ema.decay_at(jnp.int32(n)) for n in (1, 2, 9)], [0, 0.9999, 0.9999])
    ramp = Ema(0.9999, ramp=True)
    np.testing.assert_allclose(ramp.decay_at(jnp.int32(5)), 6 / 15, rtol=1e-6)
    np.testing.assert_allclose(ramp.decay_at(jnp.int32(10**6)), 0.9999, rtol=1e-6)
    half = Ema(0.5 ** (512 / 500_000), ramp_share=0.05)  # EDM's, in images: halves of 512 at 401
    decays = [half.decay_at(jnp.int32(n)) for n in (1, 401, 10**6)]
    np.testing.assert_allclose(decays, [0, 0.5 ** (1 / 20), half.decay], rtol=1e-6)
    with pytest.raises(ValueError, match=r"ramp_share=0\.05 must be 0"):
        Ema(0.9, ramp=True, ramp_share=0.05)


def toy(clip_norm=0.0, decay=0.5):
    rate = optim.learning_rate(0.1)
    optimizer = ts.Optimizer({"net": optim.make_transform(rate, "sgd", b1=0.0)}, rate, clip_norm)
    ema = Ema(decay, networks=("net",))
    params = {"net": {"w": jnp.array([3.0, 4.0])}}
    return ts.create_state(jax.random.key(0), params, optimizer, ema, {}), optimizer, ema


def test_gradients_are_clipped_to_their_global_norm():
    state, optimizer, ema = toy(clip_norm=1.0)
    grads = {"net": {"w": jnp.array([30.0, 40.0])}}
    new, metrics = ts.apply_gradients(state, grads, jnp.float32(1), optimizer, ema)
    np.testing.assert_allclose(metrics["grad_norm"], 50.0)
    np.testing.assert_allclose(metrics["param_norm"], 4.9, rtol=1e-6)  # after the update
    np.testing.assert_allclose(new.params["net"]["w"], [3.0 - 0.06, 4.0 - 0.08], rtol=1e-6)


def test_the_average_follows_equation_one():
    state, optimizer, ema = toy()
    grads = {"net": {"w": jnp.array([1.0, 0.0])}}
    for _ in range(2):
        state, _ = ts.apply_gradients(state, grads, jnp.float32(1), optimizer, ema)
    # After step 1 the average is the weights (2.9); after step 2 half of those and half of 2.8.
    np.testing.assert_allclose(state.ema["net"]["w"][0], 2.85, rtol=1e-6)


def test_accumulation_is_the_mean_over_strided_parts():
    batch = {"x": jnp.arange(8.0)}

    def grad_fn(params, batch):
        return (params * batch["x"]).mean(), batch["x"].max()

    whole = ts.accumulate(grad_fn, 1)(2.0, batch)
    parts = ts.accumulate(grad_fn, 4)(2.0, batch)
    np.testing.assert_allclose(parts[0], whole[0])
    np.testing.assert_allclose(parts[1], np.mean([4.0, 5.0, 6.0, 7.0]))


def test_flips_mirror_the_last_spatial_axis_of_about_half():
    keys = jax.random.split(jax.random.key(0), 200)
    x = jnp.broadcast_to(jnp.arange(4.0)[None, None, :, None], (200, 2, 4, 1))
    flipped = np.asarray(ts.random_flip(x, keys))
    mirrored = (flipped[:, 0, 0, 0] == 3).sum()
    assert 70 < mirrored < 130
    np.testing.assert_array_equal(np.sort(flipped, axis=2), np.asarray(x))


@pytest.mark.parametrize("loss", [1.0, float("nan")])
def test_a_gpu_takes_and_skips_the_same_steps(loss):
    """Its norm is summed in another order, and its guard is a choice and no branch."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    shapes = {"w": (3, 3, 32, 48), "b": (48,), "odd": (4099,), "scale": (7,), "one": ()}
    params = {"net": {k: jax.random.normal(next(keys), s) for k, s in shapes.items()}}
    grads = jax.tree.map(lambda p: 3 * jnp.cos(p), params)
    optimizer = ts.Optimizer(
        {"net": optim.make_transform(lambda step: jnp.float32(0.1), "adamw", weight_decay=0.1)},
        learning_rate=lambda step: jnp.float32(0.1),
        clip_norm=1.0,
        by_element=True,
    )
    ema = Ema(0.5, networks=("net",))
    state = ts.create_state(jax.random.key(1), params, optimizer, ema, {})
    step = functools.partial(ts.apply_gradients, optimizer=optimizer, ema=ema)
    plain, metrics = step(state, grads, jnp.float32(loss))
    with target.handed(target.Target("gpu")):
        text = str(jax.make_jaxpr(step)(state, grads, jnp.float32(loss)))
        other, found = jax.jit(step)(state, grads, jnp.float32(loss))
    assert " cond[" not in text and text.count("reduce_sum") == 2 * 3  # two rows, and their sum
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, metrics
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), other, plain)
    assert int(other.extra["skipped_steps"]) == int(np.isnan(loss))
    if np.isnan(loss):
        jax.tree.map(np.testing.assert_array_equal, other.params, params)
