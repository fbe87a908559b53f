"""Attention against its formula; masks; the choice of kernel."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models import attention, target
from diffusion.models.gated import geglu


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def randomised(module, *args, **kwargs):
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))
    draw = np.random.default_rng(7).normal  # jax.random would compile once a shape
    return jax.tree.map(lambda s: jnp.asarray(draw(0, 0.3, s.shape), s.dtype), shapes)


def formula(q, k, v, mask=None):
    """Vaswani et al. eq. 1 in float64, one head at a time."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    scores = scores if mask is None else np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("mask_shape", [None, (2, 1, 1, 5), (1, 1, 4, 5), (2, 3, 4, 5)])
def test_dot_product_attention_is_the_formula(mask_shape):
    q, k, v = normal(0, 2, 4, 3, 8), normal(1, 2, 5, 3, 8), normal(2, 2, 5, 3, 8)
    mask = None
    if mask_shape:
        mask = jax.random.bernoulli(jax.random.key(3), 0.5, mask_shape).at[..., 0].set(True)
    output = attention.dot_product_attention(q, k, v, mask)
    np.testing.assert_allclose(output, formula(q, k, v, mask), rtol=1e-4, atol=1e-5)


def test_bfloat16_attention_has_float32_scores():
    """Scores of some tens have steps of 1/8 in bfloat16, so their weights would be 6% off."""
    q, k, v = (normal(i, 2, 32, 2, 64).astype(jnp.bfloat16) * 2 for i in range(3))
    output = attention.dot_product_attention(q, k, v)
    assert output.dtype == jnp.bfloat16
    expected = formula(q, k, v)
    assert np.linalg.norm(output - expected) / np.linalg.norm(expected) < 5e-3


def test_float64_stays_float64(x64):
    q = normal(0, 1, 4, 2, 8).astype(jnp.float64)
    output = attention.dot_product_attention(q, q, q)
    np.testing.assert_allclose(output, formula(q, q, q), rtol=1e-12)


GPU, TPU = target.Target("gpu", cudnn_head_dim=256), target.Target("tpu")


@pytest.mark.parametrize(
    "dtype,keys,head_dim,masked,aim,kernel",
    [
        (jnp.bfloat16, 1024, 64, False, GPU, "cudnn"),
        (jnp.float16, 1024, 160, False, GPU, "cudnn"),
        (jnp.bfloat16, 1024, 64, False, target.Target("cpu"), "xla"),
        (jnp.bfloat16, 1024, 64, False, target.Target(), "xla"),
        (jnp.float32, 1024, 64, False, GPU, "xla"),
        (jnp.bfloat16, 77, 64, False, GPU, "xla"),
        (jnp.bfloat16, 1024, 512, False, GPU, "xla"),
        (jnp.bfloat16, 1024, 20, False, GPU, "xla"),
        (jnp.bfloat16, 1024, 64, True, GPU, "xla"),
        (jnp.bfloat16, 4096, 40, False, TPU, "pallas"),
        (jnp.bfloat16, 256, 64, False, TPU, "xla"),
        (jnp.bfloat16, 1100, 64, False, TPU, "xla"),
        (jnp.float32, 4096, 64, False, TPU, "xla"),
        (jnp.bfloat16, 4096, 64, True, TPU, "xla"),
    ],
)
def test_the_target_chooses_the_kernel(dtype, keys, head_dim, masked, aim, kernel):
    q = jnp.zeros((1, keys, 1, head_dim), dtype)
    mask = jnp.ones((1, 1, 1, keys), bool) if masked else None
    with target.handed(aim):
        assert attention.chosen_kernel(q, q, q, mask) == kernel
    assert attention.chosen_kernel(q, q, q, mask) == "xla"  # nothing handed in


@pytest.mark.parametrize("capability,limit", [("9.0", 256), ("8.0", 128), ("gfx90a", 0), (None, 0)])
@pytest.mark.parametrize("platform", ["gpu", "cuda"])
def test_cudnns_widest_head_depends_on_the_gpu(platform, capability, limit):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    assert target.of([device]) == target.Target("gpu", 1, limit)


@pytest.mark.parametrize("head_dim", [40, 128])
def test_the_tpus_kernel_is_attention(head_dim):
    """In Pallas' interpreter, values and gradients against equation 1."""
    from jax.experimental.pallas import tpu as pltpu

    q, k, v = (normal(i, 1, 1024, 2, head_dim) for i in range(3))
    weigh = np.cos(np.arange(q.size)).reshape(q.shape)

    def total(q, k, v, implementation):
        out = attention.dot_product_attention(q, k, v, implementation=implementation)
        return (out * weigh).sum(), out

    run = jax.grad(total, (0, 1, 2), has_aux=True)
    wanted = run(q, k, v, "xla")
    with pltpu.force_tpu_interpret_mode():
        found = run(q, k, v, "pallas")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b)


def test_masked_context_is_as_if_it_were_cut_off():
    layer = attention.Attention(heads=2, head_dim=4)
    x, context = normal(0, 2, 3, 8), normal(1, 2, 6, 5)
    params = randomised(layer, x, context)
    mask = jnp.array([[True] * 4 + [False] * 2] * 2)
    np.testing.assert_allclose(
        layer.apply(params, x, context, mask), layer.apply(params, x, context[:, :4]), atol=1e-6
    )
    assert not np.allclose(layer.apply(params, x, context), layer.apply(params, x, context, mask))


def test_causal_mask_hides_the_future():
    block = attention.TransformerBlock(heads=2, head_dim=4, cross=False, activation="quick_gelu")
    x = normal(0, 1, 5, 8)
    params = randomised(block, x)
    mask = jnp.tril(jnp.ones((5, 5), bool))[None, None]
    changed = x.at[:, 3].add(1.0)
    before, after = (block.apply(params, v, mask=mask) for v in (x, changed))
    np.testing.assert_allclose(before[:, :3], after[:, :3], atol=1e-6)
    assert np.abs(before[:, 3:] - after[:, 3:]).min(axis=(0, 2)).max() > 1e-4


def test_transformer_block_does_not_know_the_order_of_tokens():
    block = attention.TransformerBlock(heads=2, head_dim=4)
    x, context = normal(0, 1, 6, 8), normal(1, 1, 4, 3)
    params = randomised(block, x, context)
    order = np.array([3, 1, 5, 0, 2, 4])
    np.testing.assert_allclose(
        block.apply(params, x[:, order], context[:, ::-1]),
        block.apply(params, x, context)[:, order],
        atol=1e-5,
    )


@pytest.mark.parametrize("activation", ["geglu", "gelu", "quick_gelu", "gelu_tanh", "relu", "silu"])
def test_feed_forward_is_its_formula(activation):
    layer = attention.FeedForward(activation, mult=2)
    x = normal(0, 1, 3, 4)
    params = randomised(layer, x)
    p_in, p_out = params["params"]["proj_in"], params["params"]["proj_out"]
    h = x @ p_in["kernel"] + p_in["bias"][None, None]
    if activation == "geglu":
        a, gate = h[..., :8], h[..., 8:]
        h = a * gate * (1 + jax.scipy.special.erf(gate / np.sqrt(2))) / 2
    elif activation == "gelu":
        h = h * (1 + jax.scipy.special.erf(h / np.sqrt(2))) / 2
    elif activation == "gelu_tanh":
        h = h * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))) / 2
    elif activation == "relu":
        h = jnp.maximum(h, 0)
    else:
        h = h / (1 + jnp.exp(-h * (1.702 if activation == "quick_gelu" else 1)))
    expected = h @ p_out["kernel"] + p_out["bias"][None, None]
    np.testing.assert_allclose(layer.apply(params, x), expected, rtol=1e-4, atol=1e-5)


def test_feed_forward_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match="activation='maxout' is unknown"):
        attention.FeedForward("maxout").init(jax.random.key(0), jnp.ones((1, 2, 4)))


@pytest.mark.parametrize("rank", (1, 2, 3))
def test_linear_and_convolutional_projection_compute_the_same(rank):
    x, context = normal(0, 2, *(2, 3, 2)[:rank], 8), normal(1, 2, 4, 5)
    linear = attention.SpatialTransformer(2, 4, groups=4, linear_projection=True)
    params = randomised(linear, x, context)["params"]
    convolutional = dict(params)
    for name in ("proj_in", "proj_out"):
        kernel = params[name]["kernel"]
        convolutional[name] = params[name] | {"kernel": kernel.reshape(*(1,) * rank, *kernel.shape)}
    np.testing.assert_allclose(
        linear.apply({"params": params}, x, context),
        attention.SpatialTransformer(2, 4, groups=4).apply({"params": convolutional}, x, context),
        rtol=1e-4,
        atol=1e-5,
    )


def test_spatial_transformers_norm_has_its_own_epsilon():
    """1e-6 whatever the network's, as in CompVis: seen where the input's variance is as small."""
    x = 1e-3 * normal(0, 1, 16, 4)
    module = attention.SpatialTransformer(1, 4, depth=0, groups=1, linear_projection=True)
    project = {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}
    norm = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    params = {"norm": norm, "proj_in": project, "proj_out": project}
    expected = x + (x - x.mean()) / jnp.sqrt(x.var() + 1e-6)
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["AttentionBlock", "SpatialTransformer"])
def test_blocks_start_as_the_identity(kind):
    x = normal(0, 2, 3, 2, 8)
    output, _ = getattr(attention, kind)(2, 4, groups=4).init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(output, x, atol=1e-3)
    assert not np.array_equal(output, x)


def test_tokens_are_in_row_major_order():
    x = jnp.arange(12).reshape(1, 2, 3, 2).astype(jnp.float32)
    np.testing.assert_array_equal(attention.to_tokens(x)[0, :, 0], [0, 2, 4, 6, 8, 10])


@pytest.mark.parametrize("activation", ["geglu", "swiglu"])
def test_a_gpu_computes_gated_layers_in_halves(activation):
    """The same numbers, the same parameters, and no gradient of both halves side by side."""
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    layer = attention.FeedForward(activation)
    params = layer.init(jax.random.key(1), x)["params"]

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return attention.Dense(2 * 32, name="proj_in")(x)

    of_dense = Plain().init(jax.random.key(1), x)["params"]["proj_in"]
    jax.tree.map(np.testing.assert_array_equal, params["proj_in"], of_dense)

    def loss(params, x):
        return jnp.sin(layer.apply({"params": params}, x)).sum()

    plain = jax.grad(loss, (0, 1))(params, x)
    with target.handed(target.Target("gpu")):
        gpu = jax.grad(loss, (0, 1))(params, x)
        text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gpu, plain)
    assert "f32[2,5,64]" not in text


@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-6), ("bfloat16", 4e-3)])
def test_a_gpu_keeps_of_geglu_what_it_is_given(dtype, within):
    """Two arrays for the way back; the numbers are those of autodiff, or nearer in bfloat16."""
    h, gate, dz = (
        jax.random.normal(key, (64, 32)) for key in jax.random.split(jax.random.key(0), 3)
    )
    true, back = jax.vjp(geglu, h, gate)
    narrow = [x.astype(dtype) for x in (h, gate)]
    with target.handed(target.Target("gpu")):
        found, of_gpu = jax.vjp(geglu, *narrow)
        with target.forward_mode():
            jax.jvp(geglu, narrow, narrow)
    assert len(jax.tree.leaves(of_gpu)) == 2 < len(jax.tree.leaves(back))
    pairs = zip((found, *of_gpu(dz.astype(dtype))), (true, *back(dz)))
    for a, b in pairs:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) < within * np.linalg.norm(b)
