"""Embedders: LDM's of classes, and its rescaler of maps of labels, in torch's words."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from diffusion.models import embedders


def test_class_embedder_gives_one_token_and_starts_from_unit_normal():
    embedder = embedders.ClassEmbedder(1001, 512)
    labels = jnp.array([0, 1000])
    params = embedder.init(jax.random.key(0), labels)
    tokens = embedder.apply(params, labels)
    table = params["params"]["embedding"]["embedding"]
    assert tokens.shape == (2, 1, 512) and abs(float(table.std()) - 1) < 0.01
    np.testing.assert_array_equal(tokens[1, 0], table[1000])


def test_spatial_rescaler_is_compvis():
    """one-hot, bilinear by a half twice, a 1x1 convolution without a bias."""
    segments = np.random.default_rng(0).integers(0, 5, (2, 8, 12), np.int32)
    module = embedders.SpatialRescaler(5, 3)
    params = module.init(jax.random.key(0), jnp.asarray(segments))
    x = (
        torch.nn.functional.one_hot(torch.from_numpy(segments).long(), 5)
        .permute(0, 3, 1, 2)
        .float()
    )
    for _ in range(2):
        x = torch.nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear")
    kernel = torch.from_numpy(np.array(params["params"]["kernel"])).T[..., None, None]
    wanted = torch.nn.functional.conv2d(x, kernel).permute(0, 2, 3, 1).numpy()
    found = module.apply(params, jnp.asarray(segments))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
