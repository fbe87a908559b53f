"""The first stage, with both networks in training, is the same step in every parallel mode.

In float64, where what is left of rounding is 1e-15 and not 1e-7: in float32 an L1 error's gradient
changes sign, and a latent its nearest code, wherever a difference is as small as rounding, and the
adaptive weight is a ratio of two norms that each carry a part in a million. None of that is a fault
of a mode, and all of it would hide one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models.autoencoder import AutoencoderKL, VQModel
from diffusion.models.discriminator import PatchDiscriminator
from diffusion.training import optim
from diffusion.training.adversarial import Adversary
from diffusion.training.autoencoder import Autoencoder
from diffusion.training.ema import Ema
from diffusion.training.parallel import Parallel, make_mesh
from diffusion.training.state import Optimizer

BATCH, SHAPE, STEPS = 16, (16, 16, 3), 3
TOLERANCE = 1e-12
pytestmark = pytest.mark.usefixtures("x64")
FIELDS = {
    "channels": 16,
    "multipliers": (1, 2),
    "blocks": 0,
    "mid_attention": False,
    "z_channels": 3,
    "groups": 4,
}


def make_task(vq=False, accumulate=1) -> Autoencoder:
    """The discriminator trains from step 1, the autoencoder sees it from step 2, and codes are
    re-seeded after step 2: three steps meet everything."""
    rate = optim.learning_rate(1e-3)
    adam = optim.make_transform(rate, "adam", b1=0.5, b2=0.9, eps=1e-3)
    network = VQModel(num_codes=64, **FIELDS) if vq else AutoencoderKL(**FIELDS)
    discriminator = PatchDiscriminator(16, 2, "group", groups=4)
    return Autoencoder(
        network=network,
        sample_shape=SHAPE,
        optimizer=Optimizer({"autoencoder": adam, "discriminator": adam}, rate),
        ema=Ema(0.9, networks=("autoencoder",)),
        reduction="mean" if vq else "sum",
        regularizer_weight=1.0 if vq else 1e-6,
        adversary=Adversary(discriminator, start_steps=1, warmup_steps=1),
        reseed_every_steps=2 if vq else 0,
        batch_size=BATCH,
        flip=True,
        accumulate=accumulate,
    )


def wide(tree):
    """The parameters, averages and moments that were born in float32, in float64."""

    def widen(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(widen, tree)


def run(parallel: Parallel, task: Autoencoder):
    """Three steps: their metrics, and the state on the host."""
    state = parallel.init(lambda key: wide(task.init(key)), jax.random.key(0))
    step, found = parallel.step(task.train_step), []
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        image = rng.integers(0, 256, (BATCH, *SHAPE), dtype=np.uint8)
        batch = {"image": image, "position": np.arange(BATCH, dtype=np.int32)}
        state, metrics = step(state, parallel.batch(batch), {})
        found.append(parallel.scalars(metrics))
    return found, jax.device_get(parallel.gather(state))


@functools.cache
def reference(vq: bool):
    """What `run` gives on one device, and the parameters that it begins with."""
    found, state = run(Parallel("jit", make_mesh(devices=jax.devices()[:1])), make_task(vq))
    return found, state, jax.device_get(jax.jit(make_task(vq).init)(jax.random.key(0)).params)


def distance(a, b) -> float:
    """norm(a - b) / norm(b) over all leaves."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    difference = sum(np.sum((x.astype(np.float64) - y) ** 2) for x, y in pairs)
    return float(np.sqrt(difference / sum(np.sum(y.astype(np.float64) ** 2) for _, y in pairs)))


WAYS = {
    "data2_fsdp4": (lambda: Parallel("jit", make_mesh(2, 4)), 1),
    "pmap": (lambda: Parallel("pmap", make_mesh()), 1),
    "pmap_accumulate": (lambda: Parallel("pmap", make_mesh()), 2),
}


@pytest.mark.parametrize(
    ("way", "vq"),
    [
        ("data2_fsdp4", False),
        ("pmap_accumulate", True),
        # Each way and each network was met above; half a minute of compiling a pair.
        *(pytest.param(way, False, marks=pytest.mark.slow) for way in ("pmap", "pmap_accumulate")),
        pytest.param("data2_fsdp4", True, marks=pytest.mark.slow),
    ],
)
def test_every_way_is_the_plain_step(way, vq):
    make, accumulate = WAYS[way]
    found, state = run(make(), make_task(vq, accumulate))
    metrics, wanted, start = reference(vq)
    for name in ("loss", "discriminator_loss", "generator_loss", "adaptive_weight"):
        a, b = ([m[name] for m in of] for of in (found, metrics))
        assert distance(np.array(a), np.array(b)) < TOLERANCE, name
    for network in ("autoencoder", "discriminator"):
        assert distance(state.params[network], wanted.params[network]) < TOLERANCE
    assert distance(state.ema, wanted.ema) < TOLERANCE
    assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(state.params))
    for network in ("autoencoder", "discriminator"):
        assert distance(wanted.params[network], start[network]) > 1e-4  # it learned
    assert [m["adaptive_weight"] > 0 for m in metrics] == [False, False, True]
    assert [m["discriminator_loss"] > 0 for m in metrics] == [False, True, True]


def test_dead_codes_are_reseeded_and_live_ones_kept():
    """Of 64 fresh codes few are near any latent: after two steps the others are latents."""
    metrics, *_ = reference(True)
    assert metrics[0]["codebook_usage"] < metrics[2]["codebook_usage"]
    assert metrics[0]["codebook_perplexity"] < metrics[2]["codebook_perplexity"] <= 64
