"""Transformers over patches: sizes, positions, conditions, and what they start as."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models import positions
from diffusion.models.attention import FeedForward
from diffusion.models.transformer import Transformer

TINY = {"width": 24, "depth": 2, "heads": 2, "out_channels": 3}


def random_params(module, *inputs, scale=0.3, **conditions):
    params = module.init(jax.random.key(0), *inputs, **conditions)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([scale * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves)])


def images(*shape):
    return jax.random.normal(jax.random.key(2), shape)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "count"),
    [
        (384, 12, 6, 32_865_056),
        (768, 12, 12, 130_315_808),
        (1024, 24, 16, 457_840_672),
        (1152, 28, 16, 674_834_720),
    ],
    ids=["S", "B", "L", "XL"],
)
def test_parameter_counts_are_dits(width, depth, heads, count):
    module = Transformer(8, 2, width, depth, heads, size=32, num_classes=1001)
    x, labels = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1, int)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, jnp.zeros(1), labels=labels))[
        "params"
    ]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("shape", [(12,), (6, 12), (4, 6, 12)])
def test_patches_come_back(shape):
    patch = (2, 3, 4)[-len(shape) :]
    x = images(2, *shape, 5)
    u = positions.patches(x, patch)
    grid = tuple(n // p for n, p in zip(shape, patch))
    assert u.shape == (2, *grid, math.prod(patch) * 5)
    np.testing.assert_array_equal(positions.unpatch(u, patch), x)
    # The second patch begins one patch along the last axis.
    first = x[(0, *(0,) * (len(shape) - 1), patch[-1])]
    np.testing.assert_array_equal(u.reshape(2, math.prod(grid), -1)[0, 1, :5], first)


@pytest.mark.parametrize("options", [{}, {"modulation": "single"}], ids=["zero", "single"])
def test_it_starts_as_zero_and_its_blocks_as_the_identity(options):
    module, x, t = Transformer(**TINY, **options), images(2, 8, 8, 3), jnp.ones(2)
    params = module.init(jax.random.key(0), x, t)["params"]
    assert not np.any(module.apply({"params": params}, x, t))
    if options:
        return
    # What leaves the blocks is what entered them: any feed-forward gives the same.
    params["out"] = random_params(module, x, t)["out"]
    before = module.apply({"params": params}, x, t)
    params["blocks_0"]["ff"] = random_params(module, x, t)["blocks_0"]["ff"]
    np.testing.assert_array_equal(before, module.apply({"params": params}, x, t))
    assert np.any(before)


def test_q_k_and_v_start_as_thirds_of_one_matrix():
    module = Transformer(width=192, depth=1, heads=3)
    params = module.init(jax.random.key(0), images(1, 8, 8, 4), jnp.ones(1))["params"]
    for name in ("to_q", "to_k", "to_v"):
        kernel = params["blocks_0"]["attn1"][name]["kernel"]
        assert np.abs(kernel).max() <= math.sqrt(6 / (192 + 3 * 192))
        assert np.std(kernel) == pytest.approx(math.sqrt(2 / (4 * 192)), rel=0.02)


def test_positions_are_those_of_the_paper():
    """Token (row 1, column 2) of a grid: the column's part of the width comes first."""
    found = positions.sincos_positions([np.arange(3.0), np.arange(4.0)], 8)[1 * 4 + 2]
    w = np.array([1.0, 1 / 100])
    wanted = np.concatenate([np.sin(2 * w), np.cos(2 * w), np.sin(1 * w), np.cos(1 * w)])
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_rotary_scores_depend_on_the_distance_alone():
    angles = positions.rotary_angles([np.arange(6.0), np.arange(6.0)], 8)
    q, k = jax.random.normal(jax.random.key(0), (2, 8))

    def score(i, j):
        tokens = jnp.zeros((1, 36, 1, 8))
        a = positions.rotate(tokens.at[0, i, 0].set(q), angles)[0, i, 0]
        b = positions.rotate(tokens.at[0, j, 0].set(k), angles)[0, j, 0]
        return float(a @ b)

    # One row down and two columns right, from two places; another distance; two rows, one column.
    assert score(0, 8) == pytest.approx(score(7, 15), rel=1e-4)
    assert abs(score(0, 8) - score(0, 9)) > 1e-3
    assert abs(score(0, 8) - score(0, 13)) > 1e-3
    assert score(3, 3) == pytest.approx(float(q @ k), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positions": "rotary"},
        {"positions": "rotary", "norm": "rms", "qk_norm": True, "activation": "swiglu"},
        {"registers": 3},
        {"registers": 2, "positions": "rotary", "qk_norm": True},
        {"modulation": "single"},
    ],
    ids=["dit", "rotary", "lightning", "registers", "registers_rotary", "single"],
)
@pytest.mark.parametrize("shape", [(8,), (8, 4), (4, 8, 4)])
def test_any_number_of_axes(options, shape):
    module, x, t = Transformer(**{**TINY, "heads": 2}, **options), images(2, *shape, 5), jnp.ones(2)
    params = random_params(module, x, t)
    out = module.apply({"params": params}, x, t)
    assert out.shape == (2, *shape, 3) and np.isfinite(out).all()
    # Every place of the input is seen by every place of the output.
    seen = jax.grad(lambda x: module.apply({"params": params}, x, t)[0].reshape(-1)[0])(x)
    assert np.all(np.abs(seen[0]) > 0) and not np.any(seen[1])


def test_a_permuted_grid_is_another_input():
    """Without positions attention would not know the order of the patches."""
    for kind in ("sincos", "rotary"):
        module, x, t = Transformer(**TINY, positions=kind), images(1, 8, 8, 3), jnp.ones(1)
        params = random_params(module, x, t)
        out = module.apply({"params": params}, x, t)
        turned = module.apply({"params": params}, jnp.roll(x, 2, axis=1), t)
        assert not np.allclose(jnp.roll(out, 2, axis=1), turned, atol=1e-3), kind


def test_time_label_and_caption_each_matter():
    module = Transformer(**TINY, num_classes=4, cross=True)
    x, t, labels = images(2, 4, 4, 3), jnp.array([1.0, 1.0]), jnp.array([1, 1])
    context, mask = jax.random.normal(jax.random.key(3), (2, 5, 7)), jnp.ones((2, 5), bool)
    params = random_params(module, x, t, context, mask, labels, scale=0.15)

    def out(t=t, labels=labels, context=context, mask=mask):
        return np.asarray(module.apply({"params": params}, x, t, context, mask, labels))

    whole = out()
    for changed in (
        {"t": jnp.array([1.0, 7.0])},
        {"labels": jnp.array([1, 3])},
        {"context": context.at[1, 2].add(1.0)},
        {"mask": mask.at[1, 2].set(False)},
    ):
        found = out(**changed)
        np.testing.assert_array_equal(found[0], whole[0])
        assert np.abs(found[1] - whole[1]).max() > 1e-4, changed
    # A hidden token may hold anything.
    hidden = mask.at[:, 2].set(False)
    np.testing.assert_allclose(
        out(mask=hidden), out(mask=hidden, context=context.at[:, 2].add(5.0)), atol=1e-6
    )


def test_tokens_of_the_label_join_at_their_block_and_leave():
    """JiT: before their block they change nothing, from it on the label speaks through them too."""
    given = {"num_classes": 4, "positions": "both", "width": 48, "bottleneck": 2}
    x, t, labels = images(2, 4, 4, 3), jnp.ones(2), jnp.array([1, 1])
    module = Transformer(**TINY | given, label_tokens=3, label_tokens_from=1)
    params = random_params(module, x, t, labels=labels, scale=0.15)
    assert params["bottleneck"]["kernel"].shape == (12, 2) and "bias" not in params["bottleneck"]
    assert params["label_tokens"].shape == (3, 48)
    plain = {k: v for k, v in params.items() if k != "label_tokens"}

    def blocks(module, params):
        call = {"params": params}, x, t
        state = module.apply(*call, labels=labels, capture_intermediates=True)[1]["intermediates"]
        return [state[f"blocks_{i}"]["__call__"][0] for i in (0, 1)]

    found, without = blocks(module, params), blocks(Transformer(**TINY | given), plain)
    np.testing.assert_array_equal(found[0], without[0])
    assert found[1].shape == (2, 3 + 4, 48)
    assert np.abs(found[1][:, 3:] - without[1]).max() > 1e-3
    assert module.apply({"params": params}, x, t, labels=labels).shape == x.shape


def test_positions_of_another_size_are_stretched_on_request_alone():
    small = Transformer(**TINY, size=8)
    x, t = images(1, 16, 16, 3), jnp.ones(1)
    params = random_params(small, x[:, :8, :8], t)
    with pytest.raises(ValueError, match=r"size=8 .*\(16, 16\).*interpolate"):
        small.apply({"params": params}, x, t)
    stretched = small.copy(interpolate=True).apply({"params": params}, x, t)
    free = small.copy(size=None).apply({"params": params}, x, t)
    assert stretched.shape == free.shape and not np.allclose(stretched, free)
    same = small.copy(interpolate=True).apply({"params": params}, x[:, :8, :8], t)
    np.testing.assert_array_equal(same, small.apply({"params": params}, x[:, :8, :8], t))


@pytest.mark.parametrize("policy", ["full", "conv", "dots"])
def test_rematerialisation_changes_no_gradient(policy):
    module, x, t = Transformer(**TINY), images(2, 4, 4, 3), jnp.ones(2)
    params = random_params(module, x, t)

    def grad(module):
        return jax.grad(lambda p: jnp.square(module.apply({"params": p}, x, t)).sum())(params)

    wanted, found = grad(module), grad(module.copy(remat=policy))
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near_and_returns_float32():
    module, x, t = Transformer(**TINY), images(2, 8, 8, 3), jnp.ones(2)
    params = random_params(module, x, t, scale=0.1)
    exact = module.apply({"params": params}, x, t)
    found = module.copy(dtype=jnp.bfloat16).apply({"params": params}, x, t)
    assert found.dtype == jnp.float32
    assert 0 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.05


def test_swiglu_is_gated_by_silu():
    module, x = FeedForward("swiglu", 2), images(1, 3, 4)
    params = random_params(module, x)
    first, last = (jax.tree.map(np.asarray, params[name]) for name in ("proj_in", "proj_out"))
    h = np.asarray(x) @ first["kernel"] + first["bias"]
    a, g = h[..., :8], h[..., 8:]
    wanted = (a / (1 + np.exp(-a)) * g) @ last["kernel"] + last["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "given", "words"),
    [
        ({"patch": 3}, {}, ("patch=3", "(8, 8)")),
        ({"patch": (2, 2, 2)}, {}, ("patch=(2, 2, 2)", "3 axes", "2")),
        ({"width": 26, "heads": 2}, {}, ("width=26", "multiple of 4")),
        ({"width": 36, "heads": 6, "positions": "rotary"}, {}, ("has 6", "multiple of 4")),
        ({"heads": 5}, {}, ("heads=5", "width=24")),
        ({"modulation": "film"}, {}, ("modulation='film'",)),
        ({"positions": "learned"}, {}, ("positions='learned'",)),
        ({"norm": "batch"}, {}, ("norm='batch'",)),
        ({"num_classes": 3}, {}, ("num_classes=3", "not given")),
        ({}, {"labels": jnp.zeros(2, int)}, ("num_classes=None", "given")),
        ({"cross": True}, {}, ("cross=True", "not given")),
        ({}, {"context": jnp.zeros((2, 3, 4))}, ("cross=False",)),
        ({}, {"residuals": [jnp.zeros(1)]}, ("ControlNet",)),
        ({"label_tokens": 2}, {}, ("label_tokens=2", "num_classes")),
    ],
)
def test_what_does_not_fit_is_refused(fields, given, words):
    module = Transformer(**{**TINY, **fields})
    with pytest.raises(ValueError) as error:
        module.init(jax.random.key(0), images(2, 8, 8, 3), jnp.ones(2), **given)
    assert all(word in str(error.value) for word in words), error.value


def test_the_mean_word_is_told_as_the_time_is():
    module, x, t = Transformer(**TINY, pool_context=True), images(2, 8, 8, 3), jnp.ones(2)
    words, mask = images(2, 5, 6), jnp.array([[True] * 3 + [False] * 2, [True] * 5])
    params = random_params(module, x, t, context=words)
    out = module.apply({"params": params}, x, t, words, mask)
    # Without blocks that look at words, any with the same mean give the same; padding counts not.
    mean = jnp.broadcast_to(words[:1, :3].mean(1, keepdims=True), (1, 5, 6))
    again = module.apply({"params": params}, x[:1], t[:1], mean)
    np.testing.assert_allclose(out[:1], again, atol=1e-5)
    assert np.abs(module.apply({"params": params}, x, t, 2 * words, mask) - out).max() > 1e-2
    with pytest.raises(ValueError, match="pool_context=True but a context is not given"):
        module.apply({"params": params}, x, t)


@pytest.mark.parametrize("kind", ["rotary", "sincos", "both"])
def test_rotary_positions_alone_tell_no_place(kind):
    """Of patches that are all the same it makes patches that are all the same."""
    module, x, t = Transformer(**TINY, positions=kind), jnp.ones((1, 8, 8, 3)), jnp.ones(1)
    out = module.apply({"params": random_params(module, x, t)}, x, t)
    spread = np.ptp(np.asarray(positions.patches(out, (2, 2))), axis=(1, 2)).max()
    assert (spread < 1e-5) == (kind == "rotary")


@pytest.mark.parametrize("std,low,high", [(None, 0.2, 2), (0.02, 0, 0.15)])
def test_time_and_classes_start_of_unit_size_where_they_are_scaled_by_fan(std, low, high):
    """At 0.02 they are faint in a narrow network, and what eq. 3 makes of them grows as slowly."""
    module = Transformer(4, 2, 128, 1, 4, num_classes=11, condition_std=std)
    x, t, labels = images(4, 4, 4, 4), jnp.arange(4.0), jnp.arange(4)
    params = module.init(jax.random.key(1), x, t, labels=labels)
    _, seen = module.apply(params, x, t, labels=labels, capture_intermediates=True)
    for name in ("time_2", "class_embedding"):
        (found,) = seen["intermediates"][name]["__call__"]
        assert low < float(jnp.sqrt(jnp.mean(found**2))) < high, name


def test_words_are_heard_from_the_start_by_a_narrow_network():
    """Cross-attention starts at zero: were its keys and values faint as well, it would stay so."""
    words = jax.random.normal(jax.random.key(0), (4, 8, 96))
    module = Transformer(4, 2, 128, 1, 4, size=4, cross=True, activation="swiglu")
    x, t = images(4, 4, 4, 4), jnp.zeros(4)
    module, seen = module.bind(module.init(jax.random.key(1), x, t, words)), {}

    def keep(call, arguments, options, context):
        seen[context.module.name] = found = call(*arguments, **options)
        return found

    with nn.intercept_methods(keep):
        module(x, t, words)
    for name in ("context_2", "to_v"):
        assert 0.2 < float(jnp.sqrt(jnp.mean(seen[name] ** 2))) < 2, name
