"""PixArt, MMDiT and Latte against Diffusers' `PixArtTransformer2DModel`, `SD3Transformer2DModel`
and `LatteTransformer3DModel`, live.

Every parameter is random, those that start at zero too.
"""

import json
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import interop
from diffusion.models.mmdit import MMDiT
from diffusion.models.transformer import Transformer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from diffusers import (
        LatteTransformer3DModel,
        PixArtTransformer2DModel,
        SD3Transformer2DModel,
    )

HEADS = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "num_layers": 3}
PIXART = {**HEADS, "out_channels": 8, "cross_attention_dim": 24, "sample_size": 8}
PIXART |= {"caption_channels": 10, "use_additional_conditions": False}
LATTE = {**HEADS, "num_layers": 2, "out_channels": 8, "cross_attention_dim": 24, "sample_size": 8}
LATTE |= {"caption_channels": 10, "patch_size": 2, "video_length": 3, "attention_bias": True}
LATTE |= {"norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-3}
LATTE |= {"activation_fn": "gelu-approximate"}
SD3 = {**HEADS, "out_channels": 4, "joint_attention_dim": 10, "caption_projection_dim": 24}
SD3 |= {"pooled_projection_dim": 6, "pos_embed_max_size": 12, "sample_size": 8}
SD35 = {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}


def reference(cls, config, directory):
    torch.manual_seed(0)
    model = cls(**config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.15 * torch.randn_like(p))
    model.save_pretrained(directory)
    return model


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def draws(side, width=8):
    rng = np.random.default_rng(1)
    x, words = rng.normal(size=(2, side, width, 4)), rng.normal(size=(2, 5, 10))
    return (
        x.astype(np.float32),
        words.astype(np.float32),
        rng.normal(size=(2, 6)).astype(np.float32),
    )


def compare(module, params, theirs, x, words, told):
    """Outputs, and gradients with respect to x and words."""
    last = (0, x.ndim - 1, *range(1, x.ndim - 1))  # channels second, as PyTorch has them
    first = (0, *range(2, x.ndim), 1)
    x_t = torch.tensor(x).permute(last).requires_grad_()
    words_t = torch.tensor(words).requires_grad_()
    out = theirs(x_t, words_t)
    weight = np.random.default_rng(2).normal(size=out.shape).astype(np.float32)
    (out * torch.tensor(weight)).sum().backward()

    def loss(x, words):
        out = module.apply({"params": params}, x, jnp.array([3.0, 977.0]), words, **told)
        return (out * weight.transpose(first)).sum(), out

    with jax.default_matmul_precision("highest"):
        grads, ours = jax.grad(loss, (0, 1), has_aux=True)(jnp.asarray(x), jnp.asarray(words))
    assert distance(ours, out.detach().permute(first).numpy()) < 1e-5
    assert distance(grads[0], x_t.grad.permute(first).numpy()) < 1e-4
    assert distance(grads[1], words_t.grad.numpy()) < 1e-4


@pytest.mark.parametrize(
    ("changes", "side"),
    [({}, 8), ({"interpolation_scale": 2, "norm_eps": 1e-3}, 12)],
    ids=["plain", "scaled_and_another_size"],
)
def test_pixart_is_diffusers_both_ways(tmp_path, changes, side):
    model = reference(PixArtTransformer2DModel, {**PIXART, **changes}, tmp_path / "a")
    module, params = interop.load_pixart(tmp_path / "a")
    x, words, _ = draws(side)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    nothing = {"resolution": None, "aspect_ratio": None}

    def theirs(model):
        return lambda x, words: model(
            x,
            words,
            torch.tensor([3, 977]),
            nothing,
            encoder_attention_mask=torch.tensor(mask).long(),
        ).sample

    told = {"context_mask": jnp.asarray(mask)}
    compare(module, params, theirs(model), x, words, told)
    interop.save_pixart(tmp_path / "b", module, params)
    again = PixArtTransformer2DModel.from_pretrained(tmp_path / "b").eval()
    compare(module, params, theirs(again), x, words, told)


def test_latte_is_diffusers_both_ways(tmp_path):
    model = reference(LatteTransformer3DModel, LATTE, tmp_path / "a")
    module, params = interop.load_latte(tmp_path / "a")
    _, words, _ = draws(8)
    x = np.random.default_rng(3).normal(size=(2, 3, 8, 8, 4)).astype(np.float32)

    def theirs(model):
        return lambda x, words: model(x, torch.tensor([3, 977]), words).sample

    compare(module, params, theirs(model), x, words, {})
    interop.save_latte(tmp_path / "b", module, params)
    again = LatteTransformer3DModel.from_pretrained(tmp_path / "b").eval()
    compare(module, params, theirs(again), x, words, {})
    with pytest.raises(ValueError, match="factorised=False cannot be written"):
        interop.save_latte(tmp_path / "c", module.clone(factorised=False), params)


@pytest.mark.parametrize("config", [SD3, SD35], ids=["3", "3.5"])
def test_mmdit_is_diffusers_both_ways(tmp_path, config):
    model = reference(SD3Transformer2DModel, config, tmp_path / "a")
    module, params = interop.load_sd3(tmp_path / "a")
    x, words, pooled = draws(6, 12)  # off the middle of the grid

    def theirs(model):
        return lambda x, words: model(x, words, torch.tensor(pooled), torch.tensor([3, 977])).sample

    told = {"pooled": jnp.asarray(pooled)}
    compare(module, params, theirs(model), x, words, told)
    interop.save_sd3(tmp_path / "b", module, params)
    again = SD3Transformer2DModel.from_pretrained(tmp_path / "b").eval()
    compare(module, params, theirs(again), x, words, told)


@pytest.mark.parametrize(
    ("cls", "module", "told", "config"),
    [
        (
            SD3Transformer2DModel,
            MMDiT(),
            {"context": (1, 1, 4096), "pooled": (1, 2048)},
            {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
            | {"pos_embed_max_size": 192},
        ),
        (
            PixArtTransformer2DModel,
            Transformer(8, 2, 1152, 28, 16, size=64, modulation="single", cross=True),
            {"context": (1, 1, 4096)},
            {"sample_size": 64, "caption_channels": 4096},
        ),
    ],
    ids=["sd3_medium", "pixart_alpha_512"],
)
def test_published_sizes_have_their_parameters(cls, module, told, config):
    with torch.device("meta"):
        wanted = sum(p.numel() for p in cls(**config).parameters())
    x = jnp.zeros((1, 64, 64, 16 if cls is SD3Transformer2DModel else 4))
    told = {name: jnp.zeros(shape) for name, shape in told.items()}
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, jnp.zeros(1), **told))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == wanted


def test_padding_of_a_caption_changes_nothing_and_the_mean_word_may_be_pooled():
    module, (x, words, _) = MMDiT(4, 2, 24, 2, 2, size=8, grid=8, pool="mean"), draws(8)
    x, words = jnp.asarray(x), jnp.asarray(words)
    params = module.init(jax.random.key(0), x, jnp.ones(2), words)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    random = [0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves)]
    params, mask = tree.unflatten(random), jnp.arange(5)[None] < jnp.array([[3], [3]])
    out = module.apply({"params": params}, x, jnp.ones(2), words, mask)
    short = module.apply({"params": params}, x, jnp.ones(2), words[:, :3])
    np.testing.assert_allclose(out, short, atol=2e-5)
    for given, said in (
        ({"context": words, "pooled": words[:, 0]}, "pool='mean' but a pooled caption is given"),
        ({}, "a context be passed"),
    ):
        with pytest.raises(ValueError, match=said):
            module.apply({"params": params}, x, jnp.ones(2), **given)
    with pytest.raises(ValueError, match=r"no multiple of patch=2, or more than grid=8"):
        module.apply({"params": params}, jnp.zeros((2, 18, 8, 4)), jnp.ones(2), words)


@pytest.mark.parametrize(
    ("load", "cls", "config", "changes", "said"),
    [
        (interop.load_pixart, PixArtTransformer2DModel, PIXART, {"dropout": 0.1}, "dropout=0.1"),
        (
            interop.load_pixart,
            PixArtTransformer2DModel,
            PIXART,
            {"use_additional_conditions": True},
            "of resolution and aspect ratio",
        ),
        (interop.load_sd3, SD3Transformer2DModel, SD3, {"qk_norm": "layer_norm"}, "qk_norm="),
        (
            interop.load_sd3,
            SD3Transformer2DModel,
            SD3,
            {"dual_attention_layers": [1]},
            "the first ones",
        ),
        (interop.load_sd3, SD3Transformer2DModel, SD3, {"novel": 1}, "novel=1 is not a key"),
    ],
)
def test_what_is_not_expressed_is_refused_by_name(tmp_path, load, cls, config, changes, said):
    reference(cls, config, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=said):
        load(tmp_path)


def test_a_grid_of_another_size_is_refused(tmp_path):
    reference(SD3Transformer2DModel, SD3, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": 16}))
    with pytest.raises(ValueError, match="pos_embed is not that of 12 patches a side"):
        interop.load_sd3(tmp_path)
