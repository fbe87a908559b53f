"""Text encoders against Transformers, live, every parameter drawn at random; and round trips."""

import json

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusion.interop.text_encoder import load_text_encoder, save_text_encoder
from diffusion.models.text_encoder import TextTransformer

TOLERANCE = 1e-5
WEIGHTS = "model.safetensors"
FIELDS = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 9,
    "layer_norm_eps": 1e-5,
    "projection_dim": 8,
    "bos_token_id": 48,
    "eos_token_id": 49,
}
TOKENS = np.random.default_rng(0).integers(0, 50, (3, 8)).astype(np.int32)


def build(activation="quick_gelu", cls=CLIPTextModel, **fields):
    """Transformers' model with every parameter redrawn."""
    model = cls(CLIPTextConfig(**(FIELDS | {"hidden_act": activation} | fields))).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def run(module, params, tokens, mask=None):
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda p, t, m: module.apply({"params": p}, t, m))(params, tokens, mask)


def run_torch(model, tokens, mask=None):
    mask = None if mask is None else torch.from_numpy(mask).long()
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long(), attention_mask=mask).last_hidden_state.numpy()


def error(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_hidden_states_match_transformers(tmp_path, activation):
    model = build(activation)
    model.save_pretrained(tmp_path)
    module, params = load_text_encoder(tmp_path)
    assert module.activation == activation
    assert error(run(module, params, TOKENS), run_torch(model, TOKENS)) < TOLERANCE


def test_masked_hidden_states_match_transformers(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    module, params = load_text_encoder(tmp_path)
    mask = np.arange(8)[None] < np.array([[8], [3], [5]])
    ours, theirs = run(module, params, TOKENS, mask), run_torch(model, TOKENS, mask)
    assert error(ours[mask], theirs[mask]) < TOLERANCE


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_prefix_and_position_ids_are_accepted(tmp_path, prefix):
    """Published files of Stable Diffusion 1.x have both."""
    model = build()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    tensors[f"{prefix}embeddings.position_ids"] = np.arange(9)[None]
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    module, params = load_text_encoder(tmp_path)
    assert error(run(module, params, TOKENS), run_torch(model, TOKENS)) < TOLERANCE


def test_a_model_with_projection_is_read_without_it(tmp_path):
    model = build(cls=CLIPTextModelWithProjection)
    model.save_pretrained(tmp_path)
    module, params = load_text_encoder(tmp_path)
    assert error(run(module, params, TOKENS), run_torch(model, TOKENS)) < TOLERANCE


def test_what_is_saved_again_is_equal_tensor_for_tensor(tmp_path):
    build().save_pretrained(tmp_path / "theirs")
    save_text_encoder(tmp_path / "ours", *load_text_encoder(tmp_path / "theirs"), prefix="")
    theirs, ours = load_file(tmp_path / "theirs" / WEIGHTS), load_file(tmp_path / "ours" / WEIGHTS)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_transformers_loads_what_is_saved(tmp_path, prefix):
    model = build("gelu")
    model.save_pretrained(tmp_path / "theirs")
    module, params = load_text_encoder(tmp_path / "theirs")
    save_text_encoder(tmp_path / "ours", module, params, prefix)
    loaded = CLIPTextModel.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_array_equal(run_torch(loaded, TOKENS), run_torch(model, TOKENS))
    again, _ = load_text_encoder(tmp_path / "ours")
    assert again == module


def test_skipped_layers_match_the_penultimate_hidden_state(tmp_path):
    """Stable Diffusion 2.x: the layer before the last, then the final norm; and so when written."""
    model = build("gelu")
    model.save_pretrained(tmp_path / "theirs")
    module, params = load_text_encoder(tmp_path / "theirs")
    module = module.clone(skip_layers=1)
    with torch.no_grad():
        hidden = model(torch.from_numpy(TOKENS).long(), output_hidden_states=True).hidden_states
        theirs = model.final_layer_norm(hidden[-2]).numpy()
    assert error(run(module, params, TOKENS), theirs) < TOLERANCE
    save_text_encoder(tmp_path / "ours", module, params)
    short = CLIPTextModel.from_pretrained(tmp_path / "ours").eval()
    assert short.config.num_hidden_layers == 2
    assert error(run_torch(short, TOKENS), theirs) < TOLERANCE
    assert not [n for n in load_file(tmp_path / "ours" / WEIGHTS) if "layers.2." in n]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BertModel"]}, "BertModel"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"num_hidden_layers": 4}, "layers.3"),
        ({"num_hidden_layers": 2}, "layers.2"),
        ({"vocab_size": 51}, "token_embedding"),
    ],
)
def test_another_architecture_is_refused(tmp_path, change, message):
    build().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_text_encoder(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("causal", False), ("qkv_bias", False), ("head_dim", 8)]
)
def test_what_transformers_cannot_hold_is_not_written(tmp_path, field, value):
    fields = {"vocab_size": 8, "width": 8, "layers": 1, "heads": 2, field: value}
    module = TextTransformer(**fields)
    params = jax.jit(module.init)(jax.random.key(0), TOKENS[:, :2])["params"]
    with pytest.raises(ValueError, match=f"{field}={value}"):
        save_text_encoder(tmp_path / "ours", module, params)
    assert not (tmp_path / "ours").exists()


@pytest.mark.slow
def test_clip_of_stable_diffusion_1_at_full_width(tmp_path):
    published = {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "eos_token_id": 49407,
        "bos_token_id": 49406,
    }
    model = build(**published)
    model.save_pretrained(tmp_path)
    module, params = load_text_encoder(tmp_path)
    assert sum(p.size for p in jax.tree.leaves(params)) == 123_060_480
    tokens = np.random.default_rng(0).integers(0, 49408, (1, 77)).astype(np.int32)
    assert error(run(module, params, tokens), run_torch(model, tokens)) < TOLERANCE
