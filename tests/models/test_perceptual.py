"""LPIPS against the `lpips` package, every weight random; its files read, and refused."""

import hashlib
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusion.interop.perceptual import load_lpips
from diffusion.models.perceptual import LPIPS

PACKAGES = pathlib.Path(sys.prefix) / "alone"  # launch/environment.sh: requirements-alone.txt


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A folder with weights as torchvision and lpips publish them, and distances by them."""
    assert PACKAGES.is_dir(), f"{PACKAGES} is missing: ./launch/test.sh makes it"
    root = tmp_path_factory.mktemp("lpips")
    script = pathlib.Path(__file__).with_name("lpips_reference.py")
    subprocess.run([sys.executable, script, PACKAGES, root], check=True)
    return root


@pytest.fixture(scope="module")
def files(reference):
    return reference / "vgg16.pth", reference / "heads.pth"


@pytest.fixture(scope="module")
def params(files):
    return load_lpips(*files)[0]


def images(channels=3, size=24, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (2, size, size + 8, channels)).astype(np.float32)
    return x, np.clip(x + 0.3 * rng.normal(size=x.shape), -1, 1).astype(np.float32)


distance = jax.jit(lambda params, x, y: LPIPS().apply({"params": params}, x, y))


@pytest.mark.parametrize("channels", [3, 1])
def test_matches_the_lpips_package(reference, params, channels):
    known = np.load(reference / "reference.npz")
    x, y, wanted = (known[f"{name}{channels}"] for name in "xyd")
    with jax.default_matmul_precision("highest"):
        found = distance(params, jnp.asarray(x), jnp.asarray(y))
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 1e-5
    assert wanted[0] != pytest.approx(wanted[1], rel=1e-3)


def test_is_a_distance_with_finite_gradients(params):
    x, y = images()
    np.testing.assert_allclose(distance(params, x, x), 0, atol=1e-12)
    np.testing.assert_allclose(distance(params, x, y), distance(params, y, x), rtol=1e-5)
    # Where no channel answers, the length of the features is 0.
    dead = jax.tree.map(lambda p: -jnp.abs(p), params)
    total = jax.jit(jax.grad(lambda y, x: LPIPS().apply({"params": dead}, x, y).sum()))
    gradient = total(y, x)
    assert np.isfinite(gradient).all()


def test_safetensors_hold_the_same(files, params, tmp_path):
    tensors = torch.load(files[0], weights_only=True)
    save_file(tensors, tmp_path / "vgg16.safetensors")
    again, hashes = load_lpips(tmp_path / "vgg16.safetensors", files[1])
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert hashes["heads"] == hashlib.sha256(files[1].read_bytes()).hexdigest()


def test_hashes_are_checked(files, tmp_path):
    right = hashlib.sha256(files[0].read_bytes()).hexdigest()
    load_lpips(*files, vgg_sha256=right[:8].upper())
    with pytest.raises(ValueError, match=r"vgg16\.pth has the SHA-256 .*, not 397923af"):
        load_lpips(*files, vgg_sha256="397923af")
    # The digits that PyTorch's hub puts into a name count without being asked for.
    named = tmp_path / "vgg16-397923af.pth"
    named.write_bytes(files[0].read_bytes())
    with pytest.raises(ValueError, match=r"vgg16-397923af\.pth has the SHA-256"):
        load_lpips(named, files[1])


def test_other_or_broken_files_are_refused(files, tmp_path):
    with pytest.raises(ValueError, match=r"none\.pth is missing"):
        load_lpips(tmp_path / "none.pth", files[1])
    (tmp_path / "cut.pth").write_bytes(files[0].read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"cut\.pth is truncated, corrupt"):
        load_lpips(tmp_path / "cut.pth", files[1])
    with pytest.raises(ValueError, match=r"vgg16\.pth holds classifier\.0\.bias"):
        load_lpips(files[1], files[0])
    heads = torch.load(files[1], weights_only=True)
    heads["lin0.model.1.weight"] = torch.zeros(1, 32, 1, 1)
    torch.save(heads, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: lin0\.model\.1\.weight has shape"):
        load_lpips(files[0], tmp_path / "other.pth")


@pytest.mark.parametrize("shape", [(1, 8, 32, 3), (1, 32, 32, 4), (1, 64, 3)])
def test_images_that_vgg_cannot_see_are_refused(shape):
    x = jnp.zeros(shape)
    with pytest.raises(Exception, match=r"LPIPS of images|[Tt]ype-check"):
        jax.eval_shape(LPIPS().init, jax.random.key(0), x, x)


def test_dropout_of_the_heads_is_lightnings_on_average(params):
    """nn.Dropout before each head, as in `train()`; without keys it does nothing."""
    x, y = map(jnp.asarray, images())
    module = LPIPS(dropout=0.5)
    plain = distance(params, x, y)
    np.testing.assert_array_equal(module.apply({"params": params}, x, y), plain)
    run = jax.jit(lambda keys: module.apply({"params": params}, x, y, keys))
    keys = jax.random.split(jax.random.key(0), (32, 2))
    drawn = np.stack([run(k) for k in keys])
    assert drawn.std(0).min() > 0
    np.testing.assert_allclose(drawn.mean(0), plain, rtol=0.02)
