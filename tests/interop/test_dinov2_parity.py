"""DINOv2's features of patches against Transformers' `Dinov2Model`, live; all parameters random."""

import inspect
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.interop import dinov2, load_dinov2

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from transformers import Dinov2Config, Dinov2Model

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 3}
SIZES |= {"image_size": 28, "patch_size": 4, "layer_norm_eps": 1e-4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    made, directory = Dinov2Model(Dinov2Config(**SIZES)).eval(), tmp_path_factory.mktemp("dino")
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    made.save_pretrained(directory)
    return made, directory


@pytest.mark.parametrize("size", [(28, 28), (36, 16)], ids=["own", "interpolated"])
def test_features_are_transformers(model, size):
    module, params = load_dinov2(model[1])
    x = np.random.default_rng(1).normal(size=(2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model[0](torch.tensor(x).permute(0, 3, 1, 2)).last_hidden_state[:, 1:].numpy()
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(module.apply({"params": params}, jnp.asarray(x)))
    assert ours.shape == (2, size[0] // 4, size[1] // 4, 24)
    difference = np.linalg.norm(ours.reshape(theirs.shape) - theirs)
    assert difference / np.linalg.norm(theirs) < 1e-5


def test_a_picture_is_brought_to_the_grid_and_to_imagenets_moments(model):
    module, params = load_dinov2(model[1])
    mean = np.array((0.485, 0.456, 0.406), np.float32)
    grey = jnp.asarray(np.full((1, 8, 8, 3), 2 * mean - 1))
    found = module.apply({"params": params}, grey, (7, 7), method="feature_map")
    wanted = module.apply({"params": params}, jnp.zeros((1, 28, 28, 3)))
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_every_key_is_honoured_or_named(model, tmp_path):
    known = {theirs for theirs, _ in dinov2.NUMBERS.values()} | {*dinov2.SUPPORTED, *dinov2.FREE}
    mine = (
        set(inspect.signature(Dinov2Config.__init__).parameters) | Dinov2Config().to_dict().keys()
    )
    assert not {key for key in mine if key[0] != "_"} - known - {"self", "kwargs", "args"}
    config = json.loads((model[1] / "config.json").read_text())
    changes = [{"use_swiglu_ffn": True}, {"qkv_bias": False}, {"num_register_tokens": 4}]
    changes += [{"num_attention_heads": 0}, {"hidden_size": "16"}, {"image_size": 30}]
    changes += [{"num_attention_heads": 5}, {"layer_norm_eps": "a"}]
    for change in changes:
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        named = "config.json" if "layer_norm_eps" in change else next(iter(change))
        with pytest.raises(ValueError, match=named):
            load_dinov2(tmp_path)
