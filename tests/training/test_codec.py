"""Pixels to what is diffused and back."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.process import keys as ks
from diffusion.training import codec
from diffusion.training.classifier import Classifier
from diffusion.training.ema import Ema
from diffusion.training.state import Optimizer

EXTRA = {"latent_shift": np.array([0.5, -1.0]), "latent_scale": np.array([2.0, 0.25])}


class Fold:
    """A first stage of no loss: two pixels of one channel are a latent of two; a draw adds 1."""

    @staticmethod
    def apply(variables, x, method):
        gain = variables["params"]["gain"]
        if method == "decode":
            return (x / gain).reshape(*x.shape[:-2], -1, 1)
        z = x.reshape(*x.shape[:-2], -1, 2) * gain
        return types.SimpleNamespace(mean=z, sample=lambda keys: z + 1)


def test_every_byte_comes_back():
    image = np.arange(256, dtype=np.uint8)
    x = codec.signed(image)
    assert x[0] == -1 and x[255] == 1 and x.dtype == jnp.float32
    np.testing.assert_array_equal(codec.to_uint8(x), image)
    np.testing.assert_array_equal(codec.to_uint8(x + 0.9 / 255), image)  # to the nearest
    np.testing.assert_array_equal(codec.to_uint8(jnp.array([-3.0, 1.5])), [0, 255])


@pytest.mark.parametrize("first_stage", [None, Fold()])
@pytest.mark.parametrize("extra", [{}, EXTRA])
def test_decoding_is_the_inverse_of_encoding(first_stage, extra):
    channels = 2 if first_stage is None else 1
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (3, 4, channels)), jnp.float32)
    params = {"autoencoder": {"gain": 4.0}}
    z = codec.encode(first_stage, params, extra, x)
    np.testing.assert_allclose(codec.decode(first_stage, params, extra, z), x, atol=1e-6)
    plain = x if first_stage is None else 4 * x.reshape(3, 2, 2)
    plain = np.asarray(plain)
    wanted = (plain - EXTRA["latent_shift"]) * EXTRA["latent_scale"] if extra else plain
    np.testing.assert_allclose(z, wanted, atol=1e-6)


def test_keys_draw_from_the_posterior():
    x, params = jnp.ones((1, 2, 1)), {"autoencoder": {"gain": 1.0}}
    keys = jax.random.split(jax.random.key(0), 1)
    mean, drawn = (codec.encode(Fold(), params, EXTRA, x, k) for k in (None, keys))
    np.testing.assert_allclose(drawn - mean, [[EXTRA["latent_scale"]]])


def test_a_classifier_reads_latents_as_they_are_diffused():
    rng = np.random.default_rng(0)
    mean, logvar = (jnp.asarray(rng.normal(size=(3, 4, 4, 2)), jnp.float32) for _ in "ml")
    extra = {name: jnp.asarray(value, jnp.float32) for name, value in EXTRA.items()}
    network = types.SimpleNamespace(apply=lambda variables, x, keys: x.reshape(3, -1))
    task = Classifier(network, (4, 4, 2), Optimizer({}, lambda step: step), Ema(0.0))
    keys, batch = ks.held_out_keys(jnp.arange(3)), {"mean": mean, "logvar": logvar}
    noise = ks.normal(ks.stream(keys, ks.POSTERIOR), mean.shape)
    drawn = mean + np.exp(0.5 * logvar) * noise
    for train, z in ((True, drawn), (False, mean)):
        found = task.logits({"classifier": {}}, batch, extra, keys, train)
        wanted = (np.asarray(z) - EXTRA["latent_shift"]) * EXTRA["latent_scale"]
        np.testing.assert_allclose(found, wanted.reshape(3, -1), rtol=1e-5, atol=1e-6)
