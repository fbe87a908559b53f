"""Layers against torch, closed forms and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.test_util import check_grads

from diffusion.models import layers

RANKS = (1, 2, 3)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def to_torch(x) -> torch.Tensor:
    """(batch, *space, channels) to torch's (batch, channels, *space)."""
    return torch.tensor(np.moveaxis(np.asarray(x), -1, 1).copy())


def from_torch(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.numpy(), 1, -1)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(
    "kernel,strides,padding", [(3, 1, None), (3, 2, 1), (3, 2, (0, 1)), (1, 1, None), (4, 2, 1)]
)
def test_conv_equals_torch(rank, kernel, strides, padding):
    x = normal(0, 2, *(4, 6, 8)[:rank], 3)
    conv = layers.Conv(5, kernel, strides, padding)
    weights = {"kernel": normal(1, *(kernel,) * rank, 3, 5), "bias": normal(2, 5)}
    low, high = (kernel // 2,) * 2 if padding is None else np.broadcast_to(padding, 2).tolist()
    torch_kernel = torch.tensor(np.moveaxis(np.asarray(weights["kernel"]), (-1, -2), (0, 1)).copy())
    expected = getattr(torch.nn.functional, f"conv{rank}d")(
        torch.nn.functional.pad(to_torch(x), (low, high) * rank),
        torch_kernel,
        torch.tensor(np.asarray(weights["bias"])),
        strides,
    )
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(
            conv.apply({"params": weights}, x), from_torch(expected), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("rank", RANKS)
def test_group_norm_equals_torch(rank):
    x = 3 * normal(0, 2, *(4, 6, 8)[:rank], 12) + 5
    scale, bias = normal(1, 12), normal(2, 12)
    norm = layers.GroupNorm(groups=4, epsilon=0.1)
    expected = torch.nn.functional.group_norm(
        to_torch(x), 4, *(torch.tensor(np.asarray(v)) for v in (scale, bias)), eps=0.1
    )
    output = norm.apply({"params": {"scale": scale, "bias": bias}}, x)
    np.testing.assert_allclose(output, from_torch(expected), rtol=1e-4, atol=1e-4)


def test_group_norm_of_bfloat16_has_float32_statistics():
    # Around 100 bfloat16 has steps of 0.5, and around 100^2 of 64: no variance could be seen.
    x = (100 + 3 * normal(0, 1, 4096, 2)).astype(jnp.bfloat16)
    norm = layers.GroupNorm(groups=1, dtype=jnp.bfloat16)
    output = norm.apply(norm.init(jax.random.key(0), x), x)
    assert output.dtype == jnp.bfloat16
    assert abs(float(output.astype(jnp.float32).mean())) < 1e-2
    assert abs(float(output.astype(jnp.float32).std()) - 1) < 1e-2


def test_group_norm_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="groups=5 does not divide 12 channels"):
        layers.GroupNorm(groups=5).init(jax.random.key(0), jnp.ones((1, 4, 12)))


@pytest.mark.parametrize("rank", RANKS)
def test_upsample_repeats_and_average_pool_undoes_it(rank):
    x = normal(0, 2, *(2, 3, 4)[:rank], 5)
    expected = np.asarray(x)
    for axis in range(1, rank + 1):
        expected = expected.repeat(2, axis)
    np.testing.assert_array_equal(layers.upsample(x), expected)
    np.testing.assert_allclose(layers.average_pool(layers.upsample(x)), x, rtol=1e-6)


def test_average_pool_equals_torch_and_refuses_odd_sizes():
    x = normal(0, 2, 4, 6, 3)
    expected = torch.nn.functional.avg_pool2d(to_torch(x), 2)
    np.testing.assert_allclose(layers.average_pool(x), from_torch(expected), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"size \(4, 5\) is not a multiple of 2"):
        layers.average_pool(x[:, :, :5])


def test_upsample_and_its_gradient_need_no_gather():
    x = normal(0, 1, 4, 4, 2)
    lowered = jax.jit(jax.grad(lambda x: (layers.upsample(x) ** 2).sum())).lower(x).as_text()
    assert "gather" not in lowered
    assert "scatter" not in lowered


@pytest.mark.parametrize("padding,size", [(1, 3), ((0, 1), 3)])
def test_downsample_halves_and_upsample_doubles(padding, size):
    x = normal(0, 1, 6, 2)
    down, up = layers.Downsample(4, padding), layers.Upsample(4)
    y, params = down.init_with_output(jax.random.key(0), x)
    assert y.shape == (1, size, 4)
    (kernel,) = [v for v in jax.tree.leaves(params) if v.ndim == 3]  # (3, 2, 4); the bias is 0
    left = 1 if padding == 1 else 0
    padded = np.pad(np.asarray(x), ((0, 0), (left, 2), (0, 0)))
    windows = np.stack([padded[:, 2 * i : 2 * i + 3] for i in range(size)], 1)
    np.testing.assert_allclose(y, np.einsum("bikc,kcd->bid", windows, kernel), rtol=2e-5, atol=1e-6)
    z, params = up.init_with_output(jax.random.key(0), x)
    assert z.shape == (1, 12, 4)
    (kernel,) = [v for v in jax.tree.leaves(params) if v.ndim == 3]
    padded = np.pad(np.repeat(np.asarray(x), 2, 1), ((0, 0), (1, 1), (0, 0)))
    windows = np.stack([padded[:, i : i + 3] for i in range(12)], 1)
    np.testing.assert_allclose(z, np.einsum("bikc,kcd->bid", windows, kernel), rtol=2e-5, atol=1e-6)


def test_asymmetric_padding_is_tensorflows_same():
    """DDPM's downsampling: the output at 0 looks at 0, 1, 2, not at -1, 0, 1."""
    x = jnp.arange(1.0, 9.0)[None, :, None]
    params = {"conv": {"kernel": jnp.ones((3, 1, 1)), "bias": jnp.zeros(1)}}
    outputs = [
        layers.Downsample(1, padding).apply({"params": params}, x)[0, :, 0]
        for padding in ((0, 1), 1)
    ]
    np.testing.assert_array_equal(outputs[0], [6, 12, 18, 15])
    np.testing.assert_array_equal(outputs[1], [3, 9, 15, 21])


class TestDropout:
    KEYS = jax.random.split(jax.random.key(0), 8)

    def test_without_keys_it_is_the_identity(self):
        x = normal(0, 8, 100)
        assert layers.Dropout(0.5).apply({}, x) is x

    def test_keeps_the_mean_and_drops_the_rate(self):
        x = jnp.ones((8, 10_000))
        y = layers.Dropout(0.2).apply({}, x, self.KEYS)
        assert abs(float((y == 0).mean()) - 0.2) < 0.01
        np.testing.assert_allclose(y[y != 0], 1 / 0.8, rtol=1e-6)

    def test_mask_of_an_example_depends_on_its_key_alone(self):
        x = jnp.ones((8, 100))
        whole = layers.Dropout(0.5).apply({}, x, self.KEYS)
        np.testing.assert_array_equal(
            whole[3:5], layers.Dropout(0.5).apply({}, x[3:5], self.KEYS[3:5])
        )
        assert not np.array_equal(whole[3], whole[4])

    def test_two_layers_draw_apart(self):
        """Each by its own path, so that a module of the same name elsewhere draws apart too."""

        class Two(layers.nn.Module):
            @layers.nn.compact
            def __call__(self, x, keys):
                return [layers.Dropout(0.5, name=name)(x, keys) for name in "ab"]

        class Nested(layers.nn.Module):
            @layers.nn.compact
            def __call__(self, x, keys):
                return [*Two(name="first")(x, keys), *Two(name="second")(x, keys)]

        x = jnp.ones((8, 1000))
        masks = [np.asarray(mask != 0) for mask in Nested().apply({}, x, self.KEYS)]
        for i in range(4):
            for j in range(i):  # independent masks agree in half of the places
                assert abs((masks[i] == masks[j]).mean() - 0.5) < 0.05
        again = Nested().apply({}, x, self.KEYS)
        np.testing.assert_array_equal(again[2] != 0, masks[2])


class TestTimestepEmbedding:
    T = jnp.array([0, 1, 500, 999])

    def test_ddpm_is_sine_then_cosine_with_the_last_period_max_period(self):
        emb = layers.timestep_embedding(self.T, 8, flip_sin_to_cos=False, freq_shift=1)
        w = 10000.0 ** (-np.arange(4) / 3)
        angle = np.asarray(self.T)[:, None] * w
        np.testing.assert_allclose(emb, np.hstack([np.sin(angle), np.cos(angle)]), atol=1e-4)

    def test_ldm_is_cosine_then_sine(self):
        emb = layers.timestep_embedding(self.T, 8)
        angle = np.asarray(self.T)[:, None] * 10000.0 ** (-np.arange(4) / 4)
        np.testing.assert_allclose(emb, np.hstack([np.cos(angle), np.sin(angle)]), atol=1e-4)

    def test_odd_widths_end_in_zero_and_fractions_count(self):
        emb = layers.timestep_embedding(jnp.array([0.5, 1.5]), 7)
        assert emb.shape == (2, 7)
        np.testing.assert_array_equal(emb[:, -1], 0)
        assert not np.array_equal(emb[0], emb[1])

    def test_float64_times_give_float64(self, x64):
        t = jnp.array([999.0], jnp.float64)
        emb = layers.timestep_embedding(t, 8)
        assert emb.dtype == jnp.float64
        angle = 999.0 * 10000.0 ** (-np.arange(4) / 4)
        np.testing.assert_allclose(emb[0], np.hstack([np.cos(angle), np.sin(angle)]), rtol=1e-10)


def randomised(module, seed, *args):
    """Random parameters throughout, in the dtype of the first argument."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    draw = np.random.default_rng(seed).normal  # jax.random would compile once a shape
    return jax.tree.map(lambda s: jnp.asarray(draw(0, 0.3, s.shape), args[0].dtype), shapes)


@pytest.mark.parametrize("rank", (1, 3))
@pytest.mark.parametrize("resample,scale_shift", [(None, False), ("up", True), ("down", False)])
def test_res_block_gradient_equals_finite_differences(rank, resample, scale_shift, x64):
    block = layers.ResBlock(6, groups=2, scale_shift=scale_shift, resample=resample)
    x = normal(0, 1, *(4, 2, 2)[:rank], 4).astype(jnp.float64)
    temb = normal(1, 1, 5).astype(jnp.float64)
    params = randomised(block, 2, x, temb)

    @jax.jit
    def loss(point):
        return jnp.sin(block.apply(*point)).sum()

    point = (params, x, temb)
    check_grads(loss, (point,), order=1, modes=["rev"], eps=1e-5, rtol=1e-6)


def test_res_block_starts_as_its_shortcut():
    x, temb = normal(0, 2, 4, 4, 8), normal(1, 2, 6)
    block = layers.ResBlock(8, groups=4)
    output, _ = block.init_with_output(jax.random.key(0), x, temb)
    np.testing.assert_allclose(output, x, atol=1e-3)
    assert not np.array_equal(output, x)
    far, _ = layers.ResBlock(8, groups=4, zero_conv=False).init_with_output(
        jax.random.key(0), x, temb
    )
    assert np.abs(far - x).max() > 0.1


def test_res_block_drops_just_before_conv2():
    """Where almost everything is dropped, the shortcut and the bias of conv2 are left."""
    x = normal(0, 2, 4, 8)
    block = layers.ResBlock(8, groups=4, dropout=1 - 1e-9)
    params = randomised(block, 1, x)
    keys = jax.random.split(jax.random.key(0), 2)
    expected = x + params["params"]["conv2"]["bias"][None, None]
    np.testing.assert_allclose(block.apply(params, x, keys=keys), expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(block.apply(params, x), expected, atol=1e-2)


def test_res_block_computes_in_its_dtype():
    x, temb = normal(0, 2, 4, 8), normal(1, 2, 6)
    params = randomised(layers.ResBlock(8, groups=4), 1, x, temb)
    exact = layers.ResBlock(8, groups=4).apply(params, x, temb)
    block = layers.ResBlock(8, groups=4, dtype=jnp.bfloat16)
    half = block.apply(params, x.astype(jnp.bfloat16), temb)
    assert half.dtype == jnp.bfloat16
    error = jnp.linalg.norm(half - exact) / jnp.linalg.norm(exact)
    assert 1e-5 < error < 2e-2
