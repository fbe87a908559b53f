"""The U-Net: published counts, ranks, gradients, conditions, rematerialisation, errors."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from diffusion.models.unet import REMAT_POLICIES, UNet

LDM = {"epsilon": 1e-5, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0}
EIGHT = LDM | {"heads": 8}
WIDE = LDM | {"heads": None, "head_dim": 32}
BIGGAN = {"scale_shift": True, "resblock_updown": True}
F, T = False, True
SD = {
    "out_channels": 4,
    "channels": 320,
    "multipliers": (1, 2, 4, 4),
    "attention": (T, T, T, F),
    "transformer_depth": 1,
}
# Name: (fields, input channels, context width, parameters). REPRODUCTION: the authors' own counts.
PUBLISHED = {
    "ddpm_cifar10": ({}, 3, None, 35_746_307),
    "ddpm_celebahq256_lsun256": (
        {"multipliers": (1, 1, 2, 2, 4, 4), "attention": (F, F, F, F, T, F)},
        3,
        None,
        113_673_219,
    ),
    "ldm_celebahq256": (
        WIDE | {"channels": 224, "multipliers": (1, 2, 3, 4), "attention": (F, T, T, T)},
        3,
        None,
        274_056_163,
    ),
    "ldm_churches256": (
        EIGHT
        | BIGGAN
        | {
            "out_channels": 4,
            "channels": 192,
            "multipliers": (1, 2, 2, 4, 4),
            "attention": (T, T, T, T, F),
        },
        4,
        None,
        294_966_916,
    ),
    # Without the embedding of the 1001 classes, which is a network beside it (ClassEmbedder).
    "ldm_imagenet256_f4": (
        LDM
        | {
            "channels": 192,
            "multipliers": (1, 2, 3, 5),
            "attention": (F, T, T, T),
            "transformer_depth": 1,
        },
        3,
        512,
        400_920_579,
    ),
    "ldm_imagenet256_f8": (
        WIDE
        | {
            "out_channels": 4,
            "channels": 256,
            "multipliers": (1, 2, 4),
            "attention": (T, T, T),
            "transformer_depth": 1,
        },
        4,
        512,
        394_984_196,
    ),
    "ldm_text": (EIGHT | SD, 4, 1280, 872_300_484),
    "stable_diffusion_v1": (EIGHT | SD, 4, 768, 859_520_964),
    "stable_diffusion_v2": (
        WIDE | SD | {"head_dim": 64, "linear_projection": True},
        4,
        1024,
        865_910_724,
    ),
    "adm_imagenet256": (
        WIDE
        | BIGGAN
        | {
            "out_channels": 6,
            "channels": 256,
            "multipliers": (1, 1, 2, 2, 4, 4),
            "attention": (F, F, F, T, T, T),
            "head_dim": 64,
            "num_classes": 1000,
        },
        3,
        None,
        553_838_086,
    ),
}

TINY = UNet(
    out_channels=2,
    channels=8,
    multipliers=(1, 2),
    blocks=1,
    attention=(False, True),
    groups=4,
)
# Attention in the middle alone: what is compiled is most of the time here.
CONDITIONAL = dataclasses.replace(TINY, transformer_depth=1, heads=2, attention=(False, False))


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def randomised(module, x, t, dtype=jnp.float32, **conditions):
    """Every parameter random: as initialised, the output is nearly zero whatever the input."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, t, **conditions))
    draw = np.random.default_rng(7).normal  # jax.random would compile once a shape
    return jax.tree.map(lambda s: jnp.asarray(draw(0, 0.2, s.shape), dtype), shapes)


@functools.cache
def jitted(module):
    return jax.jit(module.apply)


def apply(module, params, *args, **kwargs):
    return jitted(module)(params, *args, **kwargs)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    fields, channels, context_width, count = PUBLISHED[name]
    module = UNet(**fields)
    conditions = {
        "context": None if context_width is None else jnp.zeros((1, 2, context_width)),
        "labels": jnp.zeros(1, int) if module.num_classes else None,
    }
    x = jnp.zeros((1, 32, 32, channels))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, jnp.zeros(1), **conditions))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("rank", (1, 3))
def test_other_ranks_have_the_gradient_of_finite_differences(rank, x64):
    x = normal(0, 1, *(4, 2, 2)[:rank], 3).astype(jnp.float64)
    context = normal(1, 1, 3, 5).astype(jnp.float64)
    t = jnp.array([7])
    params = randomised(CONDITIONAL, x, t, jnp.float64, context=context)

    @jax.jit
    def loss(params, x, context):
        y = CONDITIONAL.apply(params, x, t, context)
        assert y.shape == (*x.shape[:-1], 2)
        assert y.dtype == jnp.float64
        return jnp.sin(3 * y).sum()

    check_grads(loss, (params, x, context), order=1, modes=["rev"], eps=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(6, 4), (4, 7)])
def test_a_size_that_cannot_be_halved_is_refused(size):
    module = dataclasses.replace(TINY, multipliers=(1, 1, 2), attention=(F, F, F))
    message = rf"size \({size[0]}, {size[1]}\) cannot be halved 2 times, as the U-Net's 3 levels"
    with pytest.raises(ValueError, match=message + ".*multiple of 4"):
        module.init(jax.random.key(0), jnp.zeros((1, *size, 3)), jnp.zeros(1))


@pytest.mark.parametrize(
    "changes,conditions,message",
    [
        ({"attention": (True,)}, {}, r"attention=\(True,\) has 1 entries but multipliers"),
        ({"head_dim": 4}, {}, "heads=1 and head_dim=4: give exactly one"),
        ({"heads": None}, {}, "heads=None and head_dim=None: give exactly one"),
        ({"heads": 3}, {}, "heads=3 does not divide level 1's 16 channels"),
        ({"heads": None, "head_dim": 5}, {}, "head_dim=5 does not divide level 1's 16"),
        ({"remat": "some"}, {}, "remat='some' must be one of"),
        ({"num_classes": 3}, {}, "num_classes=3 but labels are not given"),
        ({}, {"labels": jnp.zeros(1, int)}, "num_classes=None but labels are given"),
        ({"pool_context": True}, {}, "pool_context=True needs a context"),
        ({"groups": 3}, {}, "groups=3 does not divide 8 channels"),
    ],
)
def test_contradictions_are_refused(changes, conditions, message):
    module = dataclasses.replace(TINY, **changes)
    with pytest.raises(ValueError, match=message):
        module.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), jnp.zeros(1), **conditions)


@pytest.fixture(scope="module")
def conditional():
    """(x, t, context, params) of a text-conditional U-Net with classes and pooled context."""
    module = dataclasses.replace(CONDITIONAL, num_classes=4, pool_context=True, dropout=0.3)
    x, t, context = normal(0, 4, 4, 8, 3), jnp.array([0, 10, 500, 999]), normal(1, 4, 6, 5)
    labels = jnp.array([0, 1, 2, 3])
    params = randomised(module, x, t, context=context, labels=labels)
    return module, params, x, t, {"context": context, "labels": labels}


@pytest.mark.parametrize("name", ["x", "t", "context", "labels"])
def test_each_example_depends_on_each_of_its_own_inputs_alone(name, conditional):
    module, params, x, t, conditions = conditional
    given = {"x": x, "t": t, **conditions}
    before = apply(module, params, **given)
    changed = apply(module, params, **(given | {name: given[name].at[1].set(given[name][2])}))
    difference = np.abs(before - changed).max((1, 2, 3))
    assert difference[1] > 1e-3
    assert difference[[0, 2, 3]].max() < 1e-5


def test_masked_tokens_are_as_if_cut_off(conditional):
    module, params, x, t, conditions = conditional
    mask = jnp.arange(6)[None].repeat(4, 0) < 4
    masked = apply(module, params, x, t, **conditions, context_mask=mask)
    cut = conditions | {"context": conditions["context"][:, :4]}
    np.testing.assert_allclose(masked, apply(module, params, x, t, **cut), rtol=1e-4, atol=1e-5)
    assert not np.allclose(masked, apply(module, params, x, t, **conditions), atol=1e-3)


def test_a_fully_masked_context_is_finite_and_no_other_example_s_matter(conditional):
    module, params, x, t, conditions = conditional
    mask = jnp.ones((4, 6), bool).at[1].set(False)
    found = apply(module, params, x, t, **conditions, context_mask=mask)
    assert np.isfinite(found).all()
    whole = apply(module, params, x, t, **conditions)
    others = np.array([0, 2, 3])
    np.testing.assert_allclose(found[others], whole[others], rtol=1e-4, atol=1e-5)
    assert not np.allclose(found[1], whole[1], atol=1e-3)


def test_dropout_needs_keys_and_is_the_same_in_any_batch(conditional):
    module, params, x, t, conditions = conditional
    keys = jax.random.split(jax.random.key(0), 4)
    quiet = apply(module, params, x, t, **conditions)
    whole = apply(module, params, x, t, **conditions, keys=keys)
    half = apply(
        module, params, x[2:], t[2:], **jax.tree.map(lambda a: a[2:], conditions), keys=keys[2:]
    )
    np.testing.assert_allclose(whole[2:], half, rtol=1e-4, atol=1e-5)
    assert np.abs(whole - quiet).max() > 1e-2
    without = dataclasses.replace(module, dropout=0.0)
    np.testing.assert_array_equal(apply(without, params, x, t, **conditions), quiet)


def test_one_time_serves_the_whole_batch(conditional):
    module, params, x, _, conditions = conditional
    one = apply(module, params, x, jnp.array(5), **conditions)
    each = apply(module, params, x, jnp.full(4, 5.0), **conditions)
    np.testing.assert_array_equal(one, each)


@functools.cache
def gradient_and_saved(remat):
    """(parameters, gradient, elements kept for the backward pass) of a one-level U-Net."""
    module = dataclasses.replace(
        CONDITIONAL, multipliers=(1,), attention=(False,), dropout=0.3, remat=remat
    )
    x, t, context = normal(0, 2, 8, 8, 3), jnp.array([10, 500]), normal(1, 2, 6, 5)
    params = randomised(module, x, t, context=context)
    keys = jax.random.split(jax.random.key(0), 2)

    def loss(params):
        return jnp.square(module.apply(params, x, t, context, keys=keys)).sum()

    # What the pullback closes over is what the forward pass keeps.
    kept = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
    elements = sum(leaf.size for leaf in jax.tree.leaves(kept))
    return params, jax.jit(jax.grad(loss))(params), elements


@pytest.mark.parametrize("remat", sorted(REMAT_POLICIES))
def test_rematerialisation_changes_no_number_and_saves_memory(remat):
    params, plain, saved = gradient_and_saved(None)
    _, again, saved_again = gradient_and_saved(remat)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())

    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert saved_again - parameters < 0.7 * (saved - parameters)


def test_bfloat16_computes_coarsely_and_returns_float32(conditional):
    module, params, x, t, conditions = conditional
    exact = apply(module, params, x, t, **conditions)
    half = apply(dataclasses.replace(module, dtype=jnp.bfloat16), params, x, t, **conditions)
    assert half.dtype == jnp.float32
    error = np.linalg.norm(half - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 5e-2


def test_residuals_are_added_to_the_skips_and_the_middle(conditional):
    module, params, x, t, conditions = conditional
    shapes = [(4, 8, 8), (4, 8, 8), (2, 4, 8), (2, 4, 16), (2, 4, 16)]
    zeros = [jnp.zeros((4, *shape)) for shape in shapes]
    plain = apply(module, params, x, t, **conditions)
    same = apply(module, params, x, t, **conditions, residuals=zeros)
    np.testing.assert_allclose(same, plain, atol=1e-6)
    for i in range(len(zeros)):
        residuals = [*zeros[:i], zeros[i] + 1, *zeros[i + 1 :]]
        moved = apply(module, params, x, t, **conditions, residuals=residuals)
        assert np.abs(moved - plain).max() > 1e-3
    with pytest.raises(ValueError, match="4 residuals for 4 skips and the middle"):
        apply(module, params, x, t, **conditions, residuals=zeros[1:])


def test_initial_scales_are_ddpms():
    x = jnp.zeros((1, 4, 4, 3))
    params = jax.jit(TINY.init)(jax.random.key(0), x, jnp.zeros(1))["params"]
    block = params["down_1_res_0"]
    # Uniform of variance 1 / mean of fan in (8 * 9) and fan out (16 * 9).
    assert abs(np.std(block["conv1"]["kernel"]) * math.sqrt(108) - 1) < 0.1
    assert np.abs(block["conv1"]["kernel"]).max() <= math.sqrt(3 / 108)
    for small in (block["conv2"], params["conv_out"], params["mid_attn"]["attention"]["to_out"]):
        assert 0 < np.abs(small["kernel"]).max() < 1e-4
        np.testing.assert_array_equal(small["bias"], 0)


def test_levels_may_differ_in_everything():
    module = dataclasses.replace(
        CONDITIONAL,
        multipliers=(1, 1.5, 2),
        blocks=(1, 2, 1),
        attention=(True, False, True),
        heads=(1, 2, 4),
        transformer_depth=(1, 1, 2),
    )
    x, context = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 2, 5))
    params = jax.eval_shape(module.init, jax.random.key(0), x, jnp.zeros(1), context)["params"]
    assert params["down_1_res_1"]["conv1"]["kernel"].shape == (3, 3, 12, 12)
    assert "down_0_attn_0" in params
    assert "down_1_attn_0" not in params
    assert "blocks_1" in params["down_2_attn_0"]
    assert "up_1_res_2" in params
    assert "blocks_1" in params["mid_attn"]
    assert module.head_shape(2) == (4, 4)
