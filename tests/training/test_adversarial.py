"""GAN losses and adaptive weight against transcriptions; when each network counts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from diffusion.models.autoencoder import AutoencoderKL, VQModel
from diffusion.models.discriminator import PatchDiscriminator
from diffusion.process import keys as ks
from diffusion.training import adversarial, optim
from diffusion.training.adversarial import Adversary
from diffusion.training.autoencoder import Autoencoder
from diffusion.training.ema import Ema
from diffusion.training.state import Optimizer

BATCH, SHAPE = 4, (16, 16, 3)
SMALL = {
    "channels": 8,
    "multipliers": (1, 2),
    "blocks": 0,
    "mid_attention": False,
    "z_channels": 3,
    "groups": 4,
}


@functools.cache
def compiled(**options):
    """A task and its step; one compilation serves every test that asks for the same."""
    task = make_task(**options)
    return task, jax.jit(task.train_step)


def make_task(norm="group", vq=False, dtype=None, rate=1e-2, optimizer="sgd", **changed):
    adversary = {
        "network": PatchDiscriminator(8, 2, norm, groups=4, dtype=dtype),
        "weight": 0.5,
        "start_steps": 0,
        **{k: changed.pop(k) for k in ("start_steps", "warmup_steps", "loss") if k in changed},
    }
    network = (
        VQModel(num_codes=16, dtype=dtype, **SMALL) if vq else AutoencoderKL(dtype=dtype, **SMALL)
    )
    schedule = optim.learning_rate(rate)
    names = ("autoencoder", "discriminator")
    transform = optim.make_transform(schedule, optimizer, b1=0.0 if optimizer == "sgd" else 0.5)
    return Autoencoder(
        network=network,
        sample_shape=SHAPE,
        optimizer=Optimizer(dict.fromkeys(names, transform), schedule),
        ema=Ema(0.0),
        reduction="mean" if vq else "sum",
        regularizer_weight=1.0 if vq else 1e-2,
        adversary=Adversary(**adversary),
        batch_size=BATCH,
        **changed,
    )


def batch(seed=0):
    image = np.random.default_rng(seed).integers(0, 256, (BATCH, *SHAPE), dtype=np.uint8)
    return {"image": jnp.asarray(image), "position": jnp.arange(BATCH)}


def fresh(task):
    return jax.jit(task.init)(jax.random.key(0))


def redrawn(task, seed=0):
    """A state whose parameters are all random: a fresh decoder and fresh biases are near 0."""
    state = fresh(task)
    leaves, tree = jax.tree.flatten(state.params)
    rng = np.random.default_rng(seed)
    fan = [max(int(np.prod(p.shape[:-1])), 1) for p in leaves]
    drawn = [
        jnp.asarray(rng.normal(size=p.shape) * n**-0.5, jnp.float32) for p, n in zip(leaves, fan)
    ]
    return state.replace(params=jax.tree.unflatten(tree, drawn))


def logits(seed, shape=(3, 5, 4, 1)):
    return np.random.default_rng(seed).normal(size=shape) * 2


def test_losses_match_float64_numpy(x64):
    real, fake = logits(0), logits(1)
    hinge = 0.5 * (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean())
    vanilla = 0.5 * (np.log1p(np.exp(-real)).mean() + np.log1p(np.exp(fake)).mean())
    found = [f(jnp.asarray(real), jnp.asarray(fake)) for f in adversarial.LOSSES.values()]
    np.testing.assert_allclose(found, [hinge, vanilla], rtol=1e-12)
    np.testing.assert_allclose(adversarial.generator_loss(jnp.asarray(fake)), -fake.mean())


@pytest.mark.parametrize(
    ("nll_scale", "scale", "wanted"),
    [
        (40, 1.0, None),
        (0.04, 1e-4, None),  # where the 1e-4 in the denominator is seen
        (40, 0.0, 1e4 * 0.5),
        (40, 1e9, None),
    ],
)
def test_adaptive_weight_matches_float64_numpy(nll_scale, scale, wanted):
    rng = np.random.default_rng(0)
    nll, generator = (k * rng.normal(size=(3, 3, 8, 3)) for k in (nll_scale, scale))
    ratio = np.sqrt((nll**2).sum()) / (np.sqrt((generator**2).sum()) + 1e-4)
    wanted = 0.5 * min(max(ratio, 0), 1e4) if wanted is None else wanted
    found = adversarial.adaptive_weight(jnp.float32(nll), jnp.float32(generator), 0.5)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def to_torch(x):
    """Images, and (*space, in, out) kernels, channels first, in double precision."""
    x = np.asarray(x, np.float64)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def kernel(k):
    k = np.asarray(k, np.float64)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(k, (3, 2), (0, 1))))


def torch_discriminator(params, x):
    """taming's NLayerDiscriminator with two layers and group norm, eps 1e-5, of our parameters."""
    functional = torch.nn.functional

    def conv(name, x, stride):
        p = params[name]
        bias = torch.from_numpy(np.asarray(p["bias"], np.float64))
        return functional.conv2d(x, kernel(p["kernel"]), bias, stride, 1)

    h = functional.leaky_relu(conv("conv_0", x, 2), 0.2)
    for i, stride in ((1, 2), (2, 1)):
        p = {k: torch.from_numpy(np.asarray(v, np.float64)) for k, v in params[f"norm_{i}"].items()}
        h = functional.group_norm(conv(f"conv_{i}", h, stride), 4, p["scale"], p["bias"])
        h = functional.leaky_relu(h, 0.2)
    return conv("conv_out", h, 1)


def before_the_last_layer(task, state, data):
    x, keys = task._inputs(state, data)
    variables = {"params": state.params["autoencoder"]}
    posterior = task.network.apply(variables, x, method="encode")
    z = posterior.sample(ks.stream(keys, ks.POSTERIOR))
    _, kept = task.network.apply(
        variables, z, method="decode", capture_intermediates=lambda m, _: m.name == "norm_out"
    )
    return x, posterior, kept


def test_a_step_matches_a_torch_transcription_of_ldm():
    """calculate_adaptive_weight and both losses of contperceptual.py, by torch's own gradients."""
    task, step = compiled(rate=1.0)
    state, data = redrawn(task), batch()
    with jax.default_matmul_precision("highest"):
        _, metrics = step(state, data, {})
        x, posterior, kept = jax.jit(lambda s, d: before_the_last_layer(task, s, d))(state, data)
    (h,) = kept["intermediates"]["decoder"]["norm_out"]["__call__"]
    last = state.params["autoencoder"]["decoder"]["conv_out"]
    weight = kernel(last["kernel"]).requires_grad_()
    bias = torch.from_numpy(np.asarray(last["bias"], np.float64))
    h = to_torch(h)  # with its SiLU
    x_hat, real = torch.nn.functional.conv2d(h, weight, bias, padding=1), to_torch(x)

    nll = (real - x_hat).abs().sum() / BATCH
    g = -torch_discriminator(state.params["discriminator"], x_hat).mean()
    (nll_grad,) = torch.autograd.grad(nll, weight, retain_graph=True)
    (g_grad,) = torch.autograd.grad(g, weight, retain_graph=True)
    d_weight = torch.clamp(nll_grad.norm() / (g_grad.norm() + 1e-4), 0.0, 1e4) * 0.5
    fake = torch_discriminator(state.params["discriminator"], x_hat.detach())
    seen = torch_discriminator(state.params["discriminator"], real)
    relu = torch.nn.functional.relu
    d = 0.5 * (relu(1 - seen).mean() + relu(1 + fake).mean())

    mean, logvar = (to_torch(a) for a in (posterior.mean, posterior.logvar))
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / BATCH
    wanted = {
        "reconstruction": nll,
        "generator_loss": g,
        "adaptive_weight": d_weight,
        "discriminator_loss": d,
        "logits_real": seen.mean(),
        "logits_fake": fake.mean(),
        "kl": kl,
        "loss": nll + 1e-2 * kl + d_weight * g,
    }
    assert 0 < d_weight < 5000, "neither bound, or the ratio is not tested"
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value.item(), rtol=1e-5, atol=1e-6, err_msg=name)


def error(a, b):
    a, b = (np.concatenate([np.ravel(v) for v in flatten_dict(t).values()]) for t in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_gradients_are_those_of_the_losses_as_written():
    """The pull-backs of the step against plain gradients of L with lambda a constant."""
    task, step = compiled(rate=1.0)
    state, data = redrawn(task), batch()
    new, metrics = step(state, data, {})
    taken = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), state.params, new.params)
    x, keys = task._inputs(state, data)

    def loss(params):
        x_hat, (posterior, _) = task._reconstruct(params["autoencoder"], x, keys)
        nll = jnp.abs(x - x_hat).sum() / BATCH + 1e-2 * posterior.kl().mean()
        fake = task.adversary.network.apply({"params": params["discriminator"]}, x_hat)
        return nll - metrics["adaptive_weight"] * fake.mean()

    def discriminator_loss(params):
        x_hat, _ = task._reconstruct(state.params["autoencoder"], x, keys)
        both = [task.adversary.network.apply({"params": params}, y) for y in (x, x_hat)]
        return adversarial.hinge(*both)

    wanted = jax.jit(jax.grad(loss))(state.params)["autoencoder"]
    assert error(taken["autoencoder"], wanted) < 1e-5
    wanted = jax.jit(jax.grad(discriminator_loss))(state.params["discriminator"])
    assert error(taken["discriminator"], wanted) < 1e-5
    assert metrics["grad_norm_discriminator"] > 0


def test_each_network_starts_at_its_step():
    """Steps of the autoencoder: 0 alone, from 1 the discriminator trains, from 3 it is seen."""
    task, step = compiled(start_steps=1, warmup_steps=2)
    state = fresh(task)
    seen, moved = [], []
    for i in range(4):
        new, metrics = step(state, batch(i), {})
        seen.append(float(metrics["adaptive_weight"]))
        before, after = (s.params["discriminator"]["conv_0"]["kernel"] for s in (state, new))
        moved.append(bool((before != after).any()))
        state = new
    assert moved == [False, True, True, True]
    assert seen[:3] == [0, 0, 0] and seen[3] > 0


def test_running_statistics_move_with_the_discriminator_only():
    task, step = compiled(norm="batch", optimizer="adam", rate=1e-3, start_steps=1)
    state = fresh(task)
    start = jax.device_get(state.extra["discriminator_stats"])
    state, _ = step(state, batch(), {})
    jax.tree.map(np.testing.assert_array_equal, start, state.extra["discriminator_stats"])
    state, _ = step(state, batch(1), {})
    assert error(state.extra["discriminator_stats"], start) > 1e-3


@pytest.mark.parametrize(("vq", "dtype"), [(False, None), (False, jnp.bfloat16), (True, None)])
def test_steps_stay_finite_in_either_precision(vq, dtype):
    task = make_task(vq=vq, dtype=dtype, optimizer="adam", rate=1e-3, start_steps=2)
    state, step = fresh(task), jax.jit(task.train_step)
    for i in range(6):
        state, metrics = step(state, batch(i), {})
        assert all(np.isfinite(float(v)) for v in metrics.values()), metrics
    assert int(metrics["skipped_steps"]) == 0 and metrics["adaptive_weight"] > 0
    for leaf in jax.tree.leaves(state.params):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()


def test_a_step_that_is_not_finite_changes_neither_network():
    task, step = compiled(norm="batch", optimizer="adam", rate=1e-3, start_steps=1)
    state = fresh(task).replace(step=jnp.int32(1))
    kernel = state.params["discriminator"]["conv_out"]["kernel"].at[0, 0, 0, 0].set(jnp.nan)
    state.params["discriminator"]["conv_out"]["kernel"] = kernel
    kept = jax.device_get(state)
    new, metrics = step(state, batch(), {})
    assert int(metrics["skipped_steps"]) == 1
    jax.tree.map(np.testing.assert_array_equal, kept.params, new.params)
    jax.tree.map(np.testing.assert_array_equal, kept.opt_state, new.opt_state)
    name = "discriminator_stats"
    jax.tree.map(np.testing.assert_array_equal, kept.extra[name], new.extra[name])


def test_an_infinite_loss_with_finite_gradients_changes_neither_network():
    """A discriminator that the autoencoder does not see yet: its loss alone tells."""
    task, step = compiled(start_steps=1, warmup_steps=2)
    state = fresh(task).replace(step=jnp.int32(1))
    last = state.params["discriminator"]["conv_out"]
    last["bias"] = jnp.full_like(last["bias"], jnp.inf)
    kept = jax.device_get(state)
    new, metrics = step(state, batch(), {})
    assert np.isfinite(metrics["grad_norm"]) and np.isfinite(metrics["loss"])
    assert np.isinf(metrics["discriminator_loss"]) and int(metrics["skipped_steps"]) == 1
    jax.tree.map(np.testing.assert_array_equal, kept.params, new.params)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"loss": "wasserstein"}, "adversarial='wasserstein'.*hinge"),
        ({"start_steps": -1}, "adversarial_start_steps=-1"),
        ({"weight": float("nan")}, "adversarial_weight=nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        Adversary(network=None, **changed)
    with pytest.raises(ValueError, match="reduction='median'"):
        dataclasses.replace(make_task(), reduction="median")
