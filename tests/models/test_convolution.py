"""The kernel's gradient as matrix products: equal to XLA's, and used where it is meant to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models import convolution, target

SHAPES = [  # batch and space, kernel, strides, padding
    ((3, 9), 3, 1, (1, 1)),
    ((2, 6, 5), 1, 1, (0, 0)),
    ((2, 6, 5), 3, 1, (1, 1)),
    ((2, 6, 8), 3, 2, (0, 1)),
    ((2, 7, 7), 3, 2, (1, 1)),
    ((2, 8, 6), 4, 2, (1, 1)),
    ((2, 8, 6), 4, 1, (1, 1)),
    ((1, 6, 6), 5, 2, (2, 2)),
    ((2, 4, 5, 3), 3, 1, (1, 1)),
]


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(len(shape) + shape[0]).normal(size=shape))


def gradients(x, kernel, strides, padding):
    """Of a sum that weighs every output differently."""

    def total(x, kernel):
        y = convolution.conv(x, kernel, strides, padding)
        return (y * np.cos(np.arange(y.size)).reshape(y.shape).astype(y.dtype)).sum()

    return jax.grad(total, (0, 1))(x, kernel)


@pytest.fixture
def alone(monkeypatch):
    """As for one CPU device, every convolution being large."""
    monkeypatch.setattr(convolution, "LARGE", 1)
    with target.handed(target.Target("cpu")):
        yield


@pytest.mark.parametrize("sizes, kernel, strides, padding", SHAPES)
def test_the_products_are_the_gradient(sizes, kernel, strides, padding, alone, monkeypatch):
    with jax.enable_x64(True):
        x = drawn(*sizes, 4)
        kernel = drawn(*[kernel] * (len(sizes) - 1), 4, 3)
        found = gradients(x, kernel, strides, padding)
        monkeypatch.setattr(convolution, "LARGE", 2**60)
        expected = gradients(x, kernel, strides, padding)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_in_bfloat16_they_are_near_those_of_float32(alone):
    x, kernel = drawn(2, 8, 8, 16), drawn(3, 3, 16, 8)
    short = [a.astype(jnp.bfloat16) for a in (x, kernel)]
    found = gradients(*short, 1, (1, 1))
    expected = gradients(*(a.astype(jnp.float32) for a in short), 1, (1, 1))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.abs(a.astype(jnp.float32) - b).max() < 2e-2 * np.abs(b).max()


def loops(x, kernel):
    return str(jax.make_jaxpr(lambda x, w: gradients(x, w, 1, (1, 1)))(x, kernel)).count("scan[")


def test_large_ones_use_them_for_one_cpu_and_nowhere_else():
    kernel = jax.ShapeDtypeStruct((3, 3, 128, 128), jnp.float32)
    large, small = (jax.ShapeDtypeStruct((n, 16, 16, 128), jnp.float32) for n in (8, 7))
    with target.handed(target.Target("cpu")):
        assert (loops(large, kernel), loops(small, kernel)) == (2, 0)
    for aim in (target.Target("cpu", 2), target.Target("gpu"), target.Target("tpu")):
        with target.handed(aim):
            assert loops(large, kernel) == 0
    assert loops(large, kernel) == 0
