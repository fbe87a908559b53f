import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from diffusion.models.text_encoder import TextTransformer, ldm_bert

TINY = {"vocab_size": 40, "max_length": 10, "width": 16, "layers": 2, "heads": 2}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (3, 8)), jnp.int32)


def random_keys(count):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(count))


def build(**fields):
    module = TextTransformer(**{**TINY, **fields})
    return module, randomised(module)


def randomised(module):
    """Variables with every parameter drawn at random."""
    params = jax.eval_shape(module.init, jax.random.key(0), TOKENS)["params"]
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    leaves = [jnp.asarray(rng.standard_normal(p.shape) * 0.5, jnp.float32) for p in leaves]
    return {"params": jax.tree.unflatten(structure, leaves)}


def run(module, variables, tokens, mask=None, keys=None):
    with jax.default_matmul_precision("highest"):
        return jax.jit(module.apply)(variables, tokens, mask, keys)


@pytest.mark.parametrize(
    ("module", "count"),
    [
        (TextTransformer(), 123_060_480),
        (ldm_bert(), 581_994_042),
        (ldm_bert(logits_head=False), 542_895_360),
        # Diffusers' Stable Diffusion 2.x: 23 of OpenCLIP ViT-H's 24 layers.
        (
            TextTransformer(width=1024, layers=24, heads=16, activation="gelu", skip_layers=1),
            340_387_840,
        ),
    ],
    ids=["clip_vit_l", "ldm_bert", "ldm_bert_without_logits", "openclip_vit_h"],
)
def test_published_sizes(module, count):
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    assert sum(p.size for p in jax.tree.leaves(params)) == count


def test_causal_states_do_not_see_what_follows():
    module, variables = build(causal=True)
    changed = TOKENS.at[:, 5].set((TOKENS[:, 5] + 1) % 40)
    before, after = run(module, variables, TOKENS), run(module, variables, changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert float(jnp.abs(before - after)[:, 5:].max(-1).min()) > 1e-4


def test_states_in_both_directions_see_everything():
    module, variables = build(causal=False)
    changed = TOKENS.at[:, 5].set((TOKENS[:, 5] + 1) % 40)
    difference = jnp.abs(run(module, variables, TOKENS) - run(module, variables, changed))
    assert float(difference.max(-1).min()) > 1e-4


@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing(causal):
    """The states of a caption are those of the caption alone, whatever stands behind it."""
    module, variables = build(causal=causal)
    mask = jnp.broadcast_to(jnp.arange(8) < 5, (3, 8))
    other = jnp.where(mask, TOKENS, 7)
    padded, others = run(module, variables, TOKENS, mask), run(module, variables, other, mask)
    alone = run(module, variables, TOKENS[:, :5])
    np.testing.assert_array_equal(padded[:, :5], others[:, :5])
    np.testing.assert_allclose(padded[:, :5], alone, rtol=1e-4, atol=1e-5)
    if not causal:
        unmasked = run(module, variables, TOKENS)
        assert float(jnp.abs(padded - unmasked)[:, :5].max()) > 1e-3


@pytest.mark.parametrize("causal", [False, True])
def test_a_masked_token_is_not_seen_wherever_it_stands(causal):
    module, variables = build(causal=causal)
    mask = jnp.ones((3, 8), bool).at[:, 2].set(False)
    changed = TOKENS.at[:, 2].set((TOKENS[:, 2] + 1) % 40)
    before, after = (run(module, variables, tokens, mask) for tokens in (TOKENS, changed))
    others = np.arange(8) != 2
    np.testing.assert_array_equal(before[:, others], after[:, others])


def test_positions_matter():
    module, variables = build(causal=False)
    states = run(module, variables, np.full((1, 4), 3, np.int32))
    assert float(jnp.abs(states[0, 0] - states[0, 1]).max()) > 1e-3


def test_tokens_stay_apart_where_their_embeddings_start_large():
    """What begins at 0.02 drowns in what the layers add to every token alike."""
    alike = {}
    for std in (0.02, 1.0):
        module = TextTransformer(**TINY, causal=False, embedding_std=std)
        variables = module.init(jax.random.key(0), TOKENS)
        np.testing.assert_allclose(
            np.std(variables["params"]["token_embedding"]["embedding"]), std, rtol=0.1
        )
        out = np.asarray(run(module, variables, TOKENS))
        out = out / np.linalg.norm(out, axis=-1, keepdims=True)
        alike[std] = np.mean(out @ out.swapaxes(1, 2))
    assert alike[0.02] > 0.6 > 0.3 > alike[1.0], alike


def test_dropout_is_each_examples_own():
    module, variables = build(dropout=0.3, embedding_dropout=0.2)
    keys = random_keys(3)
    dropped = run(module, variables, TOKENS, keys=keys)
    assert float(jnp.abs(dropped - run(module, variables, TOKENS)).max()) > 1e-2
    single = run(module, variables, TOKENS[1:2], keys=keys[1:2])
    np.testing.assert_allclose(single, dropped[1:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("field", ["dropout", "embedding_dropout"])
def test_each_dropout_drops(field):
    module, variables = build(**{field: 0.3})
    dropped = run(module, variables, TOKENS, keys=random_keys(3))
    assert float(jnp.abs(dropped - run(module, variables, TOKENS)).max()) > 1e-2


def test_skipped_layers_take_no_part():
    module, variables = build()
    short = module.clone(skip_layers=1)
    states = run(short, variables, TOKENS)
    without = {k: v for k, v in variables["params"].items() if k != "layers_1"}
    np.testing.assert_array_equal(run(short, {"params": without}, TOKENS), states)
    assert float(jnp.abs(states - run(module, variables, TOKENS)).max()) > 1e-3


def test_results_are_float32_under_bfloat16_and_parameters_too():
    module, variables = build()
    exact = run(module, variables, TOKENS)
    half = run(module.clone(dtype=jnp.bfloat16), variables, TOKENS)
    assert half.dtype == jnp.float32
    assert 0 < np.linalg.norm(half - exact) / np.linalg.norm(exact) < 0.1


def test_an_unknown_token_gives_nan():
    module, variables = build()
    assert bool(jnp.isnan(run(module, variables, np.full((1, 2), 40, np.int32))).any())


@pytest.mark.parametrize(
    ("fields", "length", "message"),
    [
        ({}, 11, "length 11.*max_length=10"),
        ({"heads": 3}, 4, "heads=3 does not divide width=16"),
        ({"skip_layers": 2}, 4, "skip_layers=2"),
    ],
)
def test_bad_input_is_refused(fields, length, message):
    module = TextTransformer(**{**TINY, **fields})
    with pytest.raises(ValueError, match=message):
        module.init(jax.random.key(0), jnp.zeros((1, length), jnp.int32))


def x_transformer(params, tokens, heads, head_dim):
    """LDM's encoder in torch, from `ldm/modules/x_transformer.py`."""
    p = jax.tree.map(lambda a: torch.from_numpy(np.array(a)), params)

    def dense(layer, x):
        return x @ layer["kernel"] + layer.get("bias", torch.zeros(()))

    def norm(layer, x):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], layer["scale"], layer["bias"], 1e-5)

    def split(x):
        return x.unflatten(-1, (heads, head_dim)).transpose(1, 2)

    x = p["token_embedding"]["embedding"][torch.from_numpy(np.array(tokens)).long()]
    x = x + p["position_embedding"]["embedding"][: tokens.shape[1]]
    for i in range(sum(name.startswith("layers_") for name in p)):
        layer = p[f"layers_{i}"]
        attention, h = layer["attention"], norm(layer["norm1"], x)
        q, k, v = (split(dense(attention[name], h)) for name in ("to_q", "to_k", "to_v"))
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(head_dim), -1)
        x = x + dense(attention["to_out"], (weights @ v).transpose(1, 2).flatten(-2))
        h = torch.nn.functional.gelu(dense(layer["ff"]["proj_in"], norm(layer["norm2"], x)))
        x = x + dense(layer["ff"]["proj_out"], h)
    return norm(p["final_norm"], x).numpy()


def test_ldm_bert_matches_a_transcription():
    module = ldm_bert(width=24, layers=2, vocab_size=40, max_length=10)
    variables = randomised(module)
    ours = run(module, variables, TOKENS)
    theirs = x_transformer(variables["params"], TOKENS, 8, 64)
    assert variables["params"]["layers_0"]["attention"]["to_q"]["kernel"].shape == (24, 512)
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 1e-5
