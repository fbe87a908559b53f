"""A ControlNet starts as nothing, learns from there, and refuses pictures of another size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models.controlnet import ControlNet
from diffusion.models.unet import UNet

FIELDS = {
    "out_channels": 2,
    "channels": 8,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention": (False, True),
    "groups": 4,
}
UNET, NET = UNet(**FIELDS), ControlNet(**FIELDS, hint_widths=(4, 6))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X, T, HINT = normal(0, 2, 8, 4, 2), jnp.array([3, 700]), normal(1, 2, 16, 8, 3)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(lambda: UNET.init(jax.random.key(0), X, T))["params"]
    draw = np.random.default_rng(7).normal
    unet = jax.tree.map(lambda s: jnp.asarray(draw(0, 0.2, s.shape), jnp.float32), shapes)
    net = jax.jit(NET.init)(jax.random.key(0), X, T, HINT)["params"]
    return unet, {name: unet.get(name, value) for name, value in net.items()}  # a copy of it


@pytest.fixture(scope="module")
def steer():
    def run(unet, net, hint):
        residuals = NET.apply({"params": net}, X, T, hint)
        return UNET.apply({"params": unet}, X, T, residuals=residuals)

    return jax.jit(run)


def test_it_starts_from_the_unet_and_changes_nothing(params, steer):
    unet, net = params
    shared = [tree["down_0_res_0"]["conv1"]["kernel"] for tree in (net, unet)]
    np.testing.assert_array_equal(*shared)
    assert "up_0_res_0" not in net and not net["zero_mid"]["kernel"].any()
    plain = jax.jit(UNET.apply)({"params": unet}, X, T)
    np.testing.assert_allclose(steer(unet, net, HINT), plain, rtol=1e-5, atol=1e-5)


def test_zero_convolutions_learn_first_and_then_the_picture_counts(params, steer):
    unet, net = params
    grads = jax.grad(lambda net: jnp.sum(jnp.square(steer(unet, net, HINT))))(net)
    assert np.abs(grads["zero_0"]["kernel"]).max() > 0
    assert np.abs(grads["hint_out"]["kernel"]).max() == 0  # behind convolutions that are zero
    stepped = jax.tree.map(lambda p, g: p - 1e-3 * g, net, grads)
    again = jax.grad(lambda net: jnp.sum(jnp.square(steer(unet, net, HINT))))(stepped)
    assert np.abs(again["hint_out"]["kernel"]).max() > 0
    stepped = jax.tree.map(lambda p, g: p - 1e-3 * g, stepped, again)
    change = steer(unet, stepped, HINT) - steer(unet, stepped, 0 * HINT)
    assert np.abs(change).max() > 0


def test_a_picture_of_another_size_is_refused(params):
    with pytest.raises(ValueError, match=r"\(8, 4\).*\(16, 8\)"):
        NET.apply({"params": params[1]}, X, T, HINT[:, ::2, ::2])


def test_a_narrow_first_level_is_that_of_the_unet():
    net = ControlNet(**FIELDS | {"multipliers": (0.5, 1)}, hint_widths=(4, 6))
    params = jax.jit(net.init)(jax.random.key(0), X, T, HINT)["params"]
    assert params["hint_out"]["kernel"].shape[-1] == params["conv_in"]["kernel"].shape[-1] == 4
