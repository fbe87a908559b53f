"""PSNR in closed form; SSIM against scikit-image."""

import jax
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from diffusion.metrics.reconstruction import SIGNED, UINT8, psnr, ssim


def pair(shape=(3, 24, 17, 3), seed=0):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, shape).astype(np.uint8)
    y = np.clip(x + rng.normal(0, 20, shape), 0, 255).astype(np.uint8)
    return x, y


def test_psnr_of_a_known_error():
    x = np.zeros((2, 4, 4, 3), np.float32)
    y = x + np.array([0.2, 0.02], np.float32)[:, None, None, None]  # 1/10 and 1/100 of the range
    np.testing.assert_allclose(psnr(x, y, SIGNED), [20.0, 40.0], rtol=1e-5)
    assert np.isinf(psnr(x, x, SIGNED)).all()


def test_psnr_matches_scikit_image():
    x, y = pair()
    want = [peak_signal_noise_ratio(a, b) for a, b in zip(x, y)]
    np.testing.assert_allclose(psnr(x, y, UINT8), want, rtol=1e-5)


def reference_ssim(a, b):
    options = dict(gaussian_weights=True, use_sample_covariance=False, channel_axis=-1)
    return structural_similarity(a, b, data_range=255, sigma=1.5, **options)


@pytest.mark.parametrize("shape", [(3, 24, 17, 3), (2, 11, 32, 1)])
def test_ssim_matches_scikit_image(shape):
    x, y = pair(shape)
    x[0, :, :8] //= 8  # smooth and dark parts, where the constants count
    y[0, :, :8] //= 8
    want = [reference_ssim(a, b) for a, b in zip(x, y)]
    np.testing.assert_allclose(ssim(x, y, UINT8), want, rtol=2e-5)
    with jax.enable_x64(True):
        exact = ssim(x.astype(np.float64), y.astype(np.float64), UINT8)
    np.testing.assert_allclose(exact, want, rtol=1e-7)
    assert min(want) < 0.99


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_the_same_pictures_score_the_same_in_both_ranges(metric):
    x, y = pair()
    signed = [a.astype(np.float32) / 127.5 - 1 for a in (x, y)]
    np.testing.assert_allclose(metric(*signed, SIGNED), metric(x, y, UINT8), rtol=1e-4)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_bad_images_are_refused(metric):
    x, y = pair()
    with pytest.raises(ValueError, match="uint8 images"):
        metric(x, y, SIGNED)
    with pytest.raises(ValueError, match="shapes"):
        metric(x, y[:, :-1], UINT8)


def test_ssim_refuses_images_below_its_window():
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(np.zeros((1, 10, 32, 3)), np.zeros((1, 10, 32, 3)), SIGNED)
