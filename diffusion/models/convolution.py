"""Convolution of any rank, channels last, and its kernel's gradient on CPUs.

For y = conv(x, w), stride s and places k of the kernel, the gradient of w is a matrix product for
each place, over batch and space p:

    dw[k] = sum_p x[s p + k] (x) dy[p]

XLA makes one convolution of it. On CPUs that is the slowest part of a training step: the products
take mostly 0.5 to 0.85 times as long from some size on (experiments/results/speed), and are used
there.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from diffusion.models import target

# Multiply-adds from which the products are faster, their loops included.
LARGE = 2**28


def conv(
    x: Float[Array, "batch *space channels"],
    kernel: Float[Array, "*size channels features"],
    strides: int,
    padding: tuple[int, int],
) -> Float[Array, "batch *out_space features"]:
    """Convolution (cross-correlation), the same stride and padding on every axis.

    Several devices keep XLA's gradient: only of that does a partitioned program exchange the sum
    once. So does `target.forward_mode`, without which a large one for a single CPU device refuses
    `jax.jvp`.
    """
    sizes = zip(x.shape[1:-1], kernel.shape[:-2], strict=True)
    places = [(n + sum(padding) - k) // strides + 1 for n, k in sizes]
    large = x.shape[0] * math.prod(places) * kernel.size >= LARGE
    aim = target.current()
    alone = aim.platform == "cpu" and aim.devices == 1 and not aim.forward_mode
    return (_by_products if alone and large else _conv)(x, kernel, strides, padding)


def _conv(x: Any, kernel: Any, strides: int, padding: tuple[int, int]) -> Any:
    rank = x.ndim - 2
    space = tuple(range(1, rank + 1))
    image = (0, rank + 1, *space)
    numbers = lax.ConvDimensionNumbers(image, (rank + 1, rank, *range(rank)), image)
    every, padded = (strides,) * rank, [padding] * rank
    return lax.conv_general_dilated(x, kernel, every, padded, dimension_numbers=numbers)


_by_products = jax.custom_vjp(_conv, nondiff_argnums=(2, 3))


def _forward(x, kernel, strides, padding):
    return _conv(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, saved, grad):
    x, kernel = saved
    _, input_gradient = jax.vjp(lambda x: _conv(x, kernel, strides, padding), x)
    return *input_gradient(grad), kernel_gradient(x, grad, kernel.shape[:-2], strides, padding)


_by_products.defvjp(_forward, _backward)


def kernel_gradient(
    x: Float[Array, "batch *space channels"],
    grad: Float[Array, "batch *out_space features"],
    size: tuple[int, ...],
    strides: int,
    padding: tuple[int, int],
) -> Float[Array, "*size channels features"]:
    """dw of the module's equation.

    Loops, for two reasons: what is shifted or transposed is small enough for the cache, and XLA
    computes their operands once, where it would repeat all that made `grad` within each copy of it.
    """
    _, *space, features = grad.shape
    rank, channels = len(space), x.shape[-1]
    x = jnp.pad(x, ((0, 0), *[padding] * rank, (0, 0)))
    reach = [strides * (n - 1) + 1 for n in space]
    every = (1, *[strides] * rank, 1)
    transposed = lax.map(lambda g: g.reshape(-1, features).T, grad)  # (batch, features, places)
    transposed = transposed.swapaxes(0, 1).reshape(features, -1)

    starts = np.array([(0, *place, 0) for place in np.ndindex(*size)], np.int32)

    def product(start):
        window = lax.dynamic_slice(x, start, (x.shape[0], *reach, channels))
        window = lax.slice(window, (0,) * x.ndim, window.shape, every)
        return transposed @ window.reshape(-1, channels)

    products = lax.map(product, starts)
    return products.swapaxes(1, 2).reshape(*size, channels, features)
