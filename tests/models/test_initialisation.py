"""PyTorch's initialisation: bounds and spread of its own layers, and what is left as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from diffusion.models.autoencoder import AutoencoderKL, VQModel
from diffusion.models.initialisation import torch_defaults


def test_layers_start_as_torchs():
    network = AutoencoderKL(channels=32, multipliers=(1, 2), blocks=1, groups=8)
    made = network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    found = torch_defaults(jax.random.key(1), made)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, made)
    conv = found["decoder"]["up_0_res_0"]["conv2"]
    torch.manual_seed(0)
    theirs = torch.nn.Conv2d(64, 1024, 3)  # as many inputs, and outputs enough to know the spread
    for ours, wanted in ((conv["kernel"], theirs.weight), (conv["bias"], theirs.bias)):
        wanted = wanted.detach().numpy()
        np.testing.assert_allclose(np.abs(ours).max(), np.abs(wanted).max(), rtol=0.1)
        np.testing.assert_allclose(np.std(ours), np.std(wanted), rtol=0.2)
    out = found["encoder"]["mid_attn"]["attention"]["to_out"]
    np.testing.assert_allclose(np.std(out["kernel"]), 64**-0.5 / 3**0.5, rtol=0.1)  # not at zero
    np.testing.assert_array_equal(found["encoder"]["norm_out"]["scale"], 1)
    leaves = [np.asarray(leaf).ravel()[:4].tobytes() for leaf in jax.tree.leaves(found)]
    drawn = [leaf for leaf in leaves if np.frombuffer(leaf, np.float32).std() > 0]
    assert len(set(drawn)) == len(drawn)


def test_the_codebook_stays():
    network = VQModel(channels=8, multipliers=(1,), blocks=0, groups=4, num_codes=16)
    made = network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    found = torch_defaults(jax.random.key(1), made)
    np.testing.assert_array_equal(found["codebook"]["embedding"], made["codebook"]["embedding"])
