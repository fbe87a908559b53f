import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from diffusion.models.discriminator import PatchDiscriminator

TOLERANCE = 1e-5


def image(size=24, batch=3, seed=0):
    shape = (batch, size, size + 8, 3)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def build(x, **fields):
    """A small discriminator with every parameter and statistic drawn at random."""
    module = PatchDiscriminator(channels=4, **fields)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    leaves, structure = jax.tree.flatten(variables)
    rng = np.random.default_rng(1)
    leaves = [
        jnp.asarray(rng.uniform(0.2, 0.9, p.shape) - 0.5 * (p.ndim > 1), jnp.float32)
        for p in leaves
    ]
    return module, jax.tree.unflatten(structure, leaves)


def transcription(variables, layers, norm, groups):
    """taming's NLayerDiscriminator with our parameters."""

    def conv(name, stride):
        kernel = np.asarray(variables["params"][name]["kernel"])
        bias = variables["params"][name].get("bias")
        layer = nn.Conv2d(*kernel.shape[2:], 4, stride, 1, bias=bias is not None)
        layer.weight.data = torch.from_numpy(np.moveaxis(kernel, (3, 2), (0, 1)).copy())
        if bias is not None:
            layer.bias.data = torch.from_numpy(np.array(bias))
        return layer

    def normalise(name):
        params = {k: torch.from_numpy(np.array(v)) for k, v in variables["params"][name].items()}
        width = len(params["scale"])
        layer = nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(groups, width)
        layer.weight.data, layer.bias.data = params["scale"], params["bias"]
        if norm == "batch":
            statistics = variables["batch_stats"][name]
            layer.running_mean = torch.from_numpy(np.array(statistics["mean"]))
            layer.running_var = torch.from_numpy(np.array(statistics["var"]))
        return layer

    sequence = [conv("conv_0", 2), nn.LeakyReLU(0.2)]
    for i in range(1, layers + 1):
        stride = 2 if i < layers else 1
        sequence += [conv(f"conv_{i}", stride), normalise(f"norm_{i}"), nn.LeakyReLU(0.2)]
    return nn.Sequential(*sequence, conv("conv_out", 1))


def run_torch(model, x):
    with torch.no_grad():
        return np.moveaxis(
            model(torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())).numpy(), 1, -1
        )


def error(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("layers", "norm"), [(3, "batch"), (2, "batch"), (2, "group")])
def test_matches_a_transcription(layers, norm, train):
    x = image()
    module, variables = build(x, layers=layers, norm=norm, groups=4)
    model = transcription(variables, layers, norm, 4).train(train)
    with jax.default_matmul_precision("highest"):
        ours, changed = jax.jit(
            lambda v, x: module.apply(v, x, train=train, mutable=["batch_stats"])
        )(variables, x)
    assert error(ours, run_torch(model, x)) < TOLERANCE
    for i in range(1, layers + 1) if norm == "batch" else ():
        # Sequential: convolution 0, activation, then (convolution, norm, activation) each layer.
        layer, statistics = model[3 * i], changed["batch_stats"][f"norm_{i}"]
        assert error(statistics["mean"], layer.running_mean.numpy()) < TOLERANCE
        assert error(statistics["var"], layer.running_var.numpy()) < TOLERANCE


def test_statistics_stay_where_they_are_not_mutable():
    x = image()
    module, variables = build(x, layers=2)
    trained = module.apply(variables, x, train=True)
    assert error(trained, np.asarray(module.apply(variables, x))) > 1e-2


def test_group_norm_has_no_statistics_and_no_batch():
    x = image()
    module, variables = build(x, layers=2, norm="group", groups=4)
    assert variables.keys() == {"params"}
    logits = module.apply(variables, x, train=True)
    single = module.apply(variables, x[1:2], train=True)
    np.testing.assert_allclose(single, logits[1:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("layers", "reach"), [(2, 34), (3, 70)])
def test_a_logit_sees_a_patch(layers, reach):
    """The receptive field that pix2pix names its discriminators after, measured by the gradient."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 96, 3)), jnp.float32)
    module = PatchDiscriminator(channels=4, layers=layers)
    _, variables = build(x, layers=layers)
    patches = jax.eval_shape(module.apply, variables, x).shape[1]
    grad = jax.jit(jax.grad(lambda x: module.apply(variables, x)[0, patches // 2, 0]))(x)
    assert int((jnp.abs(grad[0]).max(-1) > 0).sum()) == reach


def test_published_size():
    """Kernels, the two biases, and two parameters per normed channel."""
    kernels = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512)
    module = PatchDiscriminator()
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(p.size for p in jax.tree.leaves(variables["params"])) == (
        kernels + 64 + 1 + 2 * (128 + 256 + 512)
    )


@pytest.mark.parametrize("space", [(48,), (24, 24, 24)], ids=["audio", "volume"])
def test_any_rank(space):
    module, x = PatchDiscriminator(channels=4), jnp.zeros((1, *space, 3))
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    logits = jax.eval_shape(module.apply, variables, x)
    assert logits.ndim == x.ndim
    assert logits.shape[-1] == 1


def test_initial_values():
    variables = jax.jit(PatchDiscriminator(channels=16).init)(jax.random.key(0), image())
    params = variables["params"]
    np.testing.assert_allclose(params["conv_2"]["kernel"].std(), 0.02, rtol=0.05)
    scale = params["norm_3"]["scale"]
    np.testing.assert_allclose(scale.mean(), 1.0, atol=0.01)
    np.testing.assert_allclose(scale.std(), 0.02, rtol=0.3)
    np.testing.assert_array_equal(params["norm_3"]["bias"], 0)
    assert "bias" in params["conv_0"]
    assert "bias" not in params["conv_1"]
    # Initialising has seen a batch, but has not counted it.
    np.testing.assert_array_equal(variables["batch_stats"]["norm_1"]["mean"], 0)
    np.testing.assert_array_equal(variables["batch_stats"]["norm_1"]["var"], 1)


def test_bfloat16_keeps_parameters_statistics_and_logits_float32():
    x = image()
    module, variables = build(x, layers=2)
    half = module.clone(dtype=jnp.bfloat16)
    logits, changed = half.apply(variables, x, train=True, mutable=["batch_stats"])
    assert {a.dtype for a in jax.tree.leaves((logits, changed))} == {jnp.dtype("float32")}
    assert 0 < error(logits, np.asarray(module.apply(variables, x, train=True))) < 0.1


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [({"norm": "layer"}, 24, "norm='layer'"), ({}, 15, r"\(15, 23\).*layers=3.*24")],
)
def test_bad_input_is_refused(fields, size, message):
    with pytest.raises(ValueError, match=message):
        PatchDiscriminator(channels=4, **fields).init(jax.random.key(0), image(size))
