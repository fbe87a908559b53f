"""Small pictures and masks: resizing as OpenCV's, kernels as the authors', draws of an example."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from diffusion.data import degrade, masks
from diffusion.data.counter import Draws

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (3, 64, 48, 3), np.uint8)


def batch(images=PICTURES, epoch=0):
    index = np.arange(len(images)) + 5
    return {"image": images, "index": index, "epoch": np.full_like(index, epoch)}


@pytest.mark.parametrize(
    ("kind", "theirs", "size"),
    [
        *(("linear", "bilinear", size) for size in ((16, 12), (23, 31), (90, 50))),
        *(("cubic", "bicubic", size) for size in ((16, 12), (23, 31), (90, 50))),
        ("area", "area", (16, 12)),  # whole numbers, as torch's areas are
        ("matlab", "bicubic", (16, 12)),
    ],
)
def test_resizing_equals_torchs_which_is_opencvs(kind, theirs, size):
    """torch's bicubic has OpenCV's a = -0.75, and a = -0.5 where it is antialiased."""
    x = PICTURES[0].astype(np.float64)
    given = torch.from_numpy(x).permute(2, 0, 1)[None]
    options = {} if kind == "area" else {"align_corners": False, "antialias": kind == "matlab"}
    wanted = torch.nn.functional.interpolate(given, size, mode=theirs, **options)[0]
    wanted = wanted.permute(1, 2, 0).numpy()
    found = degrade._resize(x, size, kind)
    edge = 2 if kind == "matlab" else 0  # mirrored here, cut off there
    inner = (slice(edge, size[0] - edge), slice(edge, size[1] - edge))
    np.testing.assert_allclose(found[inner], wanted[inner], atol=1e-6)


def test_the_anisotropic_kernel_is_the_authors():
    """Their words: anisotropic_Gaussian and gm_blur_kernel of bsrgan_light.py."""
    draws = Draws((1, 2, 3))
    while draws.uniform() >= 0.5:  # the first draw chooses the kind
        pass
    again = Draws(draws.key, draws.count)
    draws.count -= 1
    found = degrade._gaussian(4, draws)
    l1, l2 = again.uniform(0, 2), again.uniform(0, 2)
    size, theta = 5 + again.below(10), again.uniform(0, np.pi)
    v = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]]) @ [1.0, 0.0]
    turn = np.array([[v[0], v[1]], [v[1], -v[0]]])
    covariance = turn @ np.diag([l1, l2]) @ np.linalg.inv(turn)
    center = size / 2.0 + 0.5
    places = np.stack(np.meshgrid(*[np.arange(size) - center + 1] * 2), -1)
    wanted = stats.multivariate_normal.pdf(places, [0, 0], covariance)
    np.testing.assert_allclose(found, wanted / wanted.sum(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", degrade.KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_small_picture_is_of_its_example_and_like_it(kind, channels):
    smooth = np.stack([degrade.bicubic(degrade.bicubic(p, 1 / 16), 16) for p in PICTURES])
    smooth = smooth[..., :channels]
    made = degrade.Degrade(kind, 4, 7)
    found = made(batch(smooth))["small"]
    assert found.shape == (3, 16, 12, channels) and found.dtype == np.uint8
    part = {k: v[1:2] for k, v in batch(smooth).items()}
    np.testing.assert_array_equal(made(part)["small"], found[1:2])
    plain = np.stack([degrade.bicubic(p, 1 / 4) for p in smooth]).astype(float)
    assert np.abs(found - plain).mean() < 20
    other = made(batch(smooth, epoch=1))["small"]
    assert np.array_equal(other, found) == (kind != "bsr_light")
    if kind == "area":  # as torch's mode of that name, on which ADM's upsamplers are trained
        means = smooth.reshape(3, 16, 4, 12, 4, channels).mean((2, 4))
        np.testing.assert_array_equal(found, np.rint(means).astype(np.uint8))
    if kind == "bicubic":
        wanted = Image.fromarray(smooth[0, ..., 0]).resize((12, 16), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(found[0, ..., 0], wanted)


@pytest.mark.parametrize(("kind", "low", "high"), [("half", 0.5, 0.5), ("lama", 0.01, 0.99)])
def test_masks_are_of_their_example(kind, low, high):
    images = np.zeros((40, 64, 48, 3), np.uint8)
    hide = masks.Hide(kind, 3)
    found = hide(batch(images))["mask"]
    assert found.shape == (40, 64, 48, 1) and set(np.unique(found)) == {0, 1}
    share = found.mean((1, 2, 3))
    assert low <= share.min() and share.max() <= high
    part = {k: v[4:6] for k, v in batch(images).items()}
    np.testing.assert_array_equal(hide(part)["mask"], found[4:6])
    assert not np.array_equal(hide(batch(images, epoch=1))["mask"], found)
    assert len({m.tobytes() for m in found}) == (4 if kind == "half" else 40)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match=r"degradation='jpeg' is unknown: use one of"):
        degrade.Degrade("jpeg", 4, 0)
    with pytest.raises(ValueError, match=r"masks='all' is unknown: use one of"):
        masks.Hide("all", 0)
