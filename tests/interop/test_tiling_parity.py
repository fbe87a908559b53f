"""Tiled encoding and decoding against Diffusers' own tiles, every parameter random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TorchKL

from diffusion.interop.autoencoder import load_autoencoder
from diffusion.metrics.reconstruction import SIGNED, psnr
from diffusion.models import tiling
from diffusion.models.autoencoder import VQModel

TILE = 16
CONFIG = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 3,
    "sample_size": TILE,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    model = TorchKL(**CONFIG).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    directory = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(directory)
    model.enable_tiling()
    return model, *load_autoencoder(directory)


def to_torch(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def error(ours, theirs):
    theirs = np.moveaxis(theirs.detach().numpy(), 1, -1)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


# 28 and 40 are not whole numbers of tiles: the last ones are 4 and 16 pixels wide.
def image(size=(28, 40)):
    return np.random.default_rng(0).uniform(-1, 1, (1, *size, 3)).astype(np.float32)


def test_matches_diffusers_tiles(pair):
    model, module, params = pair
    x = jnp.asarray(image())
    z = np.random.default_rng(2).standard_normal((1, 14, 20, 3)).astype(np.float32)
    with torch.no_grad():
        theirs, decoded = model.encode(to_torch(x)).latent_dist, model.decode(to_torch(z)).sample
    with jax.default_matmul_precision("highest"):
        ours = tiling.tiled_encode(module, params, x, TILE)
        assert error(ours.mean, theirs.mean) < 1e-5
        assert error(ours.std, theirs.std) < 1e-5
        assert error(tiling.tiled_decode(module, params, jnp.asarray(z), TILE), decoded) < 1e-5


def test_one_tile_is_the_whole_image_and_many_are_near_it(pair):
    """Norms and attention are global, so tiles give another image, at a PSNR that is printed."""
    _, module, params = pair
    x = jnp.asarray(image((32, 32)))
    run = jax.jit(lambda p, z: module.apply({"params": p}, z, method="decode"))
    z = jnp.asarray(np.random.default_rng(2).standard_normal((1, 16, 16, 3)), jnp.float32)
    whole = run(params, z)
    scale = float(jnp.abs(whole).max())
    found = []
    for tile in (8, 16, 64):
        tiled = tiling.tiled_decode(module, params, z, tile)
        found.append(float(psnr(whole / scale, tiled / scale, SIGNED)[0]))
    print("PSNR of tiles of 8, 16 and 64 pixels against the whole image:", found)
    assert 0 < min(found[:2]) <= max(found[:2]) < 60 and found[2] > 90
    code = tiling.tiled_encode(module, params, x, 64)
    np.testing.assert_allclose(code.mean.shape, (1, 16, 16, 3))


def test_vq_decodes_through_its_codebook_tile_by_tile():
    module = VQModel(channels=8, multipliers=(1, 2), blocks=0, groups=4, num_codes=8)
    x = jnp.asarray(image((16, 16)))
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    run = jax.jit(lambda p, x: module.apply({"params": p}, x))
    # One tile reaches over the whole image: what is left to differ is the codebook.
    z = tiling.tiled_encode(module, params, x, 32).mean
    tiled = tiling.tiled_decode(module, params, z, 32)
    np.testing.assert_allclose(tiled, run(params, x), atol=1e-5)


@pytest.mark.parametrize(
    ("tile", "size", "words"),
    [(5, (16, 16), "tile_size=5"), (16, (17, 16), "17"), (0, (16, 16), "tile_size=0")],
)
def test_what_does_not_divide_is_refused(pair, tile, size, words):
    _, module, params = pair
    with pytest.raises(ValueError, match=words):
        tiling.tiled_encode(module, params, jnp.asarray(image(size)), tile)
