"""How near a reconstruction is to its image: PSNR, SSIM, and how sharp it is.

Images are brought to [0, 1] by the range that the caller names, so that the same pictures give the
same numbers as uint8 in (0, 255) and as floats in (-1, 1). Peak signal-to-noise ratio, in decibels:

    PSNR = -10 log10 mean (x - y)²                                                              (1)

Structural similarity (Wang et al. 2004, IEEE TIP 13:600, eq. 13), with means, variances and
covariance under an 11-tap Gaussian window of standard deviation 1.5 pixels, C1 = 0.01² and C2 =
0.03²:

    SSIM = (2 mx my + C1)(2 sxy + C2) / ((mx² + my² + C1)(sxx + syy + C2))                      (2)

averaged over channels and over the positions where the window lies inside the image. That is
scikit-image's `structural_similarity(gaussian_weights=True, use_sample_covariance=False)`.

Sharpness is judged by the energy of high frequencies. With X the discrete Fourier transform of an
image of n pixels, and frequencies f in cycles a pixel (at most 1/2 along an axis),

    E = sum over |f| > 1/4 of |X(f)|² / n²,                                                     (3)

the mean square of what a high-pass filter leaves (Parseval), averaged over channels. The ratio of
the means of E over reconstructions and over their images is below 1 for blur and above 1 for
invented detail.

Means over a set are means of the per-image values returned here; the PSNR of the pooled error is
another number.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

UINT8 = (0.0, 255.0)
SIGNED = (-1.0, 1.0)
WINDOW_SIZE, WINDOW_SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2

Range = tuple[float, float]


@functools.partial(jax.jit, static_argnames="value_range")
def psnr(
    x: Shaped[Array | np.ndarray, "batch height width channels"],
    y: Shaped[Array | np.ndarray, "..."],
    value_range: Range,
) -> Float[Array, "batch"]:
    """PSNR of each image in decibels, eq. (1); infinite for equal images.

    `value_range` is what black and white are: `UINT8` or `SIGNED`. It is not read off the dtype,
    since floats in [0, 1] and in [-1, 1] differ by 6 dB. ValueError if uint8 images come with
    another range, or shapes differ.
    """
    x, y = _unit_range(x, y, value_range)
    return -10 * jnp.log10(jnp.mean(jnp.square(x - y), axis=(1, 2, 3)))


@functools.partial(jax.jit, static_argnames="value_range")
def ssim(
    x: Shaped[Array | np.ndarray, "batch height width channels"],
    y: Shaped[Array | np.ndarray, "..."],
    value_range: Range,
) -> Float[Array, "batch"]:
    """SSIM of each image, eq. (2), in [-1, 1]; `value_range` and errors as for `psnr`.

    ValueError if a side is shorter than the 11-pixel window.
    """
    if min(x.shape[1:3]) < WINDOW_SIZE:
        raise ValueError(
            f"image size {x.shape[1:3]}: SSIM's window needs at least {WINDOW_SIZE} pixels a side; "
            "use larger images, or PSNR"
        )
    x, y = _unit_range(x, y, value_range)
    mx, my = _window_mean(x), _window_mean(y)
    sxx = _window_mean(x * x) - mx * mx
    syy = _window_mean(y * y) - my * my
    sxy = _window_mean(x * y) - mx * my
    likeness = (2 * mx * my + C1) * (2 * sxy + C2)
    return jnp.mean(likeness / ((mx * mx + my * my + C1) * (sxx + syy + C2)), axis=(1, 2, 3))


HIGH_FREQUENCY = 0.25  # cycles a pixel


@functools.partial(jax.jit, static_argnames="value_range")
def high_frequency_energy(
    x: Shaped[Array | np.ndarray, "batch height width channels"], value_range: Range
) -> Float[Array, "batch"]:
    """Mean square of each image above a quarter of a cycle a pixel, eq. (3)."""
    x, _ = _unit_range(x, x, value_range)
    height, width = x.shape[1:3]
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij"))
    high = jnp.asarray(frequency > HIGH_FREQUENCY)[None, :, :, None]
    spectrum = jnp.abs(jnp.fft.fft2(x, axes=(1, 2))) / (height * width)
    return jnp.sum(jnp.where(high, jnp.square(spectrum), 0), axis=(1, 2)).mean(-1)


def per_example(
    x: Shaped[Array, "batch *space channels"],
    x_hat: Shaped[Array, "batch *space channels"],
    value_range: Range,
) -> dict[str, Float[Array, "batch"]]:
    """Everything here that can be said of these images: no SSIM below its window, and of anything
    but images nothing."""
    if x.ndim != 4:
        return {}
    found = {
        "psnr": psnr(x, x_hat, value_range),
        "high_frequency": high_frequency_energy(x_hat, value_range),
        "high_frequency_of_images": high_frequency_energy(x, value_range),
    }
    if min(x.shape[1:3]) >= WINDOW_SIZE:
        found["ssim"] = ssim(x, x_hat, value_range)
    return found


def _unit_range(x, y, value_range: Range):
    if x.shape != y.shape:
        raise ValueError(f"images of shapes {x.shape} and {y.shape}: compare images of one shape")
    if jnp.uint8 in (x.dtype, y.dtype) and value_range != UINT8:
        raise ValueError(
            f"value_range={value_range} for uint8 images: give {UINT8}, or convert both to floats"
        )
    low, high = value_range
    dtype = jnp.promote_types(jnp.result_type(x, y), jnp.float32)
    return tuple((jnp.asarray(a, dtype) - low) / (high - low) for a in (x, y))


def _window_mean(
    x: Float[Array, "batch height width channels"],
) -> Float[Array, "batch h w channels"]:
    # Two banded matrix products: exact on any device, where a float32 convolution may run in TF32.
    rows, columns = (jnp.asarray(_band(size), x.dtype) for size in x.shape[1:3])
    return jnp.einsum("ij,bjkc,lk->bilc", rows, x, columns, precision="highest")


@functools.lru_cache
def _band(size: int) -> np.ndarray:
    """Matrix (size - 10, size) whose row i is the window over pixels i .. i + 10."""
    offset = np.arange(WINDOW_SIZE) - WINDOW_SIZE // 2
    window = np.exp(-(offset**2) / (2 * WINDOW_SIGMA**2))
    window /= window.sum()
    band = np.zeros((size - WINDOW_SIZE + 1, size))
    for i in range(band.shape[0]):
        band[i, i : i + WINDOW_SIZE] = window
    return band
