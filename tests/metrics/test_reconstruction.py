"""PSNR and spectra in closed form; SSIM against scikit-image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from diffusion.metrics.reconstruction import (
    SIGNED,
    UINT8,
    high_frequency_energy,
    per_example,
    psnr,
    ssim,
)


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


def wave(cycles, size=32):
    """One channel of cosines along the width, of amplitude 1/2 about 1/2."""
    row = 0.5 + 0.5 * np.cos(2 * np.pi * cycles * np.arange(size) / size)
    return np.broadcast_to(row[None, None, :, None], (1, size, size, 1)).astype(np.float32)


def test_energy_of_high_frequencies_is_the_mean_square_above_a_quarter_cycle():
    for cycles, energy in ((0, 0.0), (4, 0.0), (8, 0.0), (9, 0.125), (12, 0.125)):
        found = high_frequency_energy(wave(cycles), (0.0, 1.0))
        np.testing.assert_allclose(found, energy, atol=1e-6)
    # White noise has its variance evenly over frequencies: the share outside a disc of radius 1/4.
    noise = np.random.default_rng(0).normal(size=(64, 64, 64, 2)).astype(np.float32)
    share = 1 - np.pi / 16
    np.testing.assert_allclose(high_frequency_energy(noise, (0.0, 1.0)).mean(), share, rtol=0.02)


def test_blur_has_less_of_it_and_ranges_do_not_matter():
    x = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    signed = x.astype(np.float32) / 127.5 - 1
    sharp = high_frequency_energy(x, UINT8)
    np.testing.assert_allclose(sharp, high_frequency_energy(signed, SIGNED), rtol=1e-4)
    blurred = (signed + np.roll(signed, 1, 1) + np.roll(signed, 1, 2)) / 3
    assert (high_frequency_energy(blurred, SIGNED) < 0.5 * sharp).all()


def test_per_example_says_what_can_be_said():
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    y = (0.5 * x).astype(np.float32)
    found = per_example(jnp.asarray(x), jnp.asarray(y), SIGNED)
    np.testing.assert_allclose(found["ssim"], ssim(x, y, SIGNED))
    np.testing.assert_allclose(found["high_frequency"] * 4, found["high_frequency_of_images"], 1e-3)
    small, sound = jnp.zeros((2, 8, 8, 3)), jnp.zeros((2, 64, 1))
    assert "ssim" not in per_example(small, small, SIGNED)
    assert per_example(sound, sound, SIGNED) == {}
