"""T5's encoder and its tokenizer against Transformers', live; all parameters random."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.data import tokenizer_files
from diffusion.interop import load_t5
from diffusion.models.t5 import T5Encoder, relative_buckets

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tokenizers
    import torch
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
    from transformers import T5ForConditionalGeneration as T5
    from transformers.models.t5.modeling_t5 import T5Attention

SIZES = {"vocab_size": 40, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_heads": 4}


def reference(cls, directory, **changes):
    torch.manual_seed(0)
    model = cls(T5Config(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn_like(p))
    model.save_pretrained(directory)
    return model.get_encoder() if cls is T5 else model


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize(
    ("cls", "changes"),
    [
        (T5EncoderModel, {"feed_forward_proj": "gated-gelu"}),
        (T5, {"feed_forward_proj": "relu", "relative_attention_num_buckets": 16}),
    ],
    ids=["v1_1", "v1_with_a_decoder"],
)
def test_hidden_states_and_gradients_are_transformers(tmp_path, cls, changes):
    model = reference(cls, tmp_path, **changes)
    module, params = load_t5(tmp_path)
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(0, 40, (2, 150)), np.arange(150) < np.array([[150], [97]])
    theirs = model(torch.tensor(tokens), attention_mask=torch.tensor(mask)).last_hidden_state
    weight = rng.normal(size=theirs.shape).astype(np.float32) * mask[..., None]
    table = model.get_input_embeddings().weight
    wanted = torch.autograd.grad((theirs * torch.tensor(weight)).sum(), table)[0].numpy()

    def loss(params):
        out = module.apply({"params": params}, jnp.asarray(tokens), jnp.asarray(mask))
        return (out * weight).sum(), out

    with jax.default_matmul_precision("highest"):
        grads, ours = jax.grad(loss, has_aux=True)(params)
    assert distance(ours[mask], theirs.detach().numpy()[mask]) < 1e-5
    assert distance(grads["tokens"]["embedding"], wanted) < 1e-4


@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (16, 40)])
def test_buckets_are_transformers_to_the_last_distance(buckets, far):
    place = torch.arange(300)
    wanted = T5Attention._relative_position_bucket(
        place[None] - place[:, None], num_buckets=buckets, max_distance=far
    )
    np.testing.assert_array_equal(relative_buckets(300, buckets, far), wanted.numpy())


def test_its_tokenizer_is_read_from_its_file(tmp_path):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(p, -4.0 - i / 9) for i, p in enumerate(("▁a", "▁cat", "▁c", "at", "s", "t", "."))]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    theirs.save_pretrained(tmp_path)
    texts = ["a cat", "cats at a cat. cats cats cats", "", "dog"]
    wanted = theirs(texts, padding="max_length", max_length=8, truncation=True)["input_ids"]
    tokens, cut = tokenizer_files.load(tmp_path).encode_and_mark(texts, 8)
    np.testing.assert_array_equal(tokens, wanted)
    assert cut.tolist() == [False, True, False, False] and (tokens[2] == [1] + [0] * 7).all()


def test_version_1_1_xxl_has_its_parameters():
    tokens = jnp.zeros((1, 1), int)
    shapes = jax.eval_shape(lambda: T5Encoder().init(jax.random.key(0), tokens))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 4_762_310_656


def test_another_feed_forward_is_refused(tmp_path):
    reference(T5EncoderModel, tmp_path, feed_forward_proj="gated-silu")
    with pytest.raises(ValueError, match="feed_forward_proj='gated-silu' is not supported"):
        load_t5(tmp_path)
