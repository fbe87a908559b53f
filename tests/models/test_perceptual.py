"""LPIPS against the `lpips` package, every weight random; its files read, and refused."""

import hashlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusion.interop.perceptual import load_lpips
from diffusion.models.perceptual import LPIPS

# torchvision's compiled operators do not load beside a CPU torch; it wants their names alone.
OPERATORS = (
    *("nms", "qnms", "roi_align", "_roi_align_backward", "ps_roi_align", "_ps_roi_align_backward"),
    *("roi_pool", "_roi_pool_backward", "ps_roi_pool", "_ps_roi_pool_backward", "qroi_align"),
    *("deform_conv2d", "_deform_conv2d_backward"),
)


@pytest.fixture(scope="module")
def theirs():
    """The package's LPIPS on VGG-16, its 14.7 million weights redrawn."""
    library = torch.library.Library("torchvision", "DEF")
    for name in OPERATORS:
        library.define(f"{name}(Tensor x) -> Tensor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, of its own arguments and extension
        import lpips

        model = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 10
            drawn = torch.randn(parameter.shape, generator=generator)
            # The heads' weights are none of them negative.
            lifted = drawn.abs() if parameter.shape[0] == 1 else drawn
            parameter.copy_(lifted * (2 / fan_in) ** 0.5)
    yield model
    del library


@pytest.fixture(scope="module")
def files(theirs, tmp_path_factory):
    """(vgg, heads) as torchvision and lpips publish them: with a classifier beside the features."""
    root, tensors = tmp_path_factory.mktemp("lpips"), theirs.state_dict()
    places = [n for n in tensors if n.startswith("net.slice") and n.endswith(".weight")]
    vgg = {"classifier.0.weight": torch.zeros(3, 2), "classifier.0.bias": torch.zeros(3)}
    for name in places:  # net.slice3.14.weight is torchvision's features.14.weight
        number = name.split(".")[2]
        for leaf in ("weight", "bias"):
            vgg[f"features.{number}.{leaf}"] = tensors[name.replace("weight", leaf)]
    heads = {f"lin{i}.model.1.weight": tensors[f"lin{i}.model.1.weight"] for i in range(5)}
    torch.save(vgg, root / "vgg16.pth", _use_new_zipfile_serialization=False)
    torch.save(heads, root / "heads.pth")
    return root / "vgg16.pth", root / "heads.pth"


@pytest.fixture(scope="module")
def params(files):
    return load_lpips(*files)[0]


def images(channels=3, size=24, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (2, size, size + 8, channels)).astype(np.float32)
    return x, np.clip(x + 0.3 * rng.normal(size=x.shape), -1, 1).astype(np.float32)


distance = jax.jit(lambda params, x, y: LPIPS().apply({"params": params}, x, y))


@pytest.mark.parametrize("channels", [3, 1])
def test_matches_the_lpips_package(theirs, params, channels):
    x, y = images(channels)
    first, second = (
        torch.from_numpy(np.moveaxis(np.broadcast_to(a, (*a.shape[:3], 3)), -1, 1).copy())
        for a in (x, y)
    )
    with torch.no_grad():
        wanted = theirs(first, second).numpy().ravel()
    with jax.default_matmul_precision("highest"):
        found = distance(params, x, y)
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
    with pytest.raises(ValueError, match=r"features|lin0"):
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
