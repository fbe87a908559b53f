"""Group normalisation as GPUs compute it: the same numbers, in fewer passes over memory."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models import target
from diffusion.models.group_norm import GroupNorm

GPU = target.Target("gpu")


def drawn(dtype, shape=(3, 4, 6, 8)):
    keys = jax.random.split(jax.random.key(0), 5)
    x = 2 * jax.random.normal(keys[0], shape, dtype) + 0.5
    small = [jax.random.normal(k, (shape[0], shape[-1]), dtype) for k in keys[1:4]]
    return x, small, jax.random.normal(keys[4], (2, shape[-1]), dtype)


def both(network, *arguments, **named):
    """Value and all gradients, as any platform and as a GPU has them."""

    def loss(params, *arguments):
        out = network.apply({"params": params}, *arguments, **named)
        return jnp.sum(jnp.sin(out.astype(jnp.promote_types(out.dtype, jnp.float32)))), out

    run = jax.value_and_grad(loss, argnums=tuple(range(len(arguments))), has_aux=True)
    plain = run(*arguments)
    with target.handed(GPU):
        return plain, run(*arguments)


def close(found, expected, limit):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape and np.linalg.norm(a - b) < limit * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("given", "silu"), list(itertools.product(["nothing", "shift", "scale_shift"], [True, False]))
)
def test_a_gpu_computes_the_same(given, silu):
    with jax.enable_x64(True):
        x, (shift, factor, offset), scales = drawn(jnp.float64)
        params = {"scale": scales[0], "bias": scales[1]}
        network = GroupNorm(groups=4)

        class Told(nn.Module):
            @nn.compact
            def __call__(self, x, *told):
                named = {"shift": told[0]} if given == "shift" else {"scale_shift": told}
                norm = GroupNorm(groups=4, name="norm")
                return norm(x, silu=silu, **(named if told else {}))

        told = {"nothing": (), "shift": (shift,), "scale_shift": (factor, offset)}[given]
        plain, gpu = both(Told(), {"norm": params}, x, *told)
        close(gpu, plain, 1e-12)
        expected = x + (0 if given != "shift" else shift[:, None, None])
        of = np.asarray(expected).reshape(3, -1, 4, 2)
        mean, var = of.mean((1, 3), keepdims=True), of.var((1, 3), keepdims=True)
        y = ((of - mean) / np.sqrt(var + network.epsilon)).reshape(x.shape)
        y = y * np.asarray(scales[0]) + np.asarray(scales[1])
        if given == "scale_shift":
            y = y * (1 + factor[:, None, None]) + offset[:, None, None]
        close(gpu[0][1], nn.silu(y) if silu else y, 1e-12)


def test_half_precision_is_kept_and_near():
    x, (shift, *_), scales = drawn(jnp.bfloat16, (2, 16, 8))
    params = {"scale": scales[0].astype(jnp.float32), "bias": scales[1].astype(jnp.float32)}
    plain, gpu = both(GroupNorm(groups=4, dtype=jnp.bfloat16), params, x, shift, silu=True)
    assert gpu[0][1].dtype == gpu[1][1].dtype == jnp.bfloat16
    close(gpu, plain, 2e-2)


def test_forward_mode_has_the_plain_formula():
    x, (shift, *_), scales = drawn(jnp.float32)
    params = {"params": {"scale": scales[0], "bias": scales[1]}}

    def slope(x):
        return jax.jvp(lambda x: GroupNorm(groups=4).apply(params, x, shift, silu=True), (x,), (x,))

    plain = slope(x)
    with target.handed(GPU):
        with pytest.raises(TypeError, match="forward-mode"):
            slope(x)
        with target.forward_mode():
            close(slope(x), plain, 1e-6)
