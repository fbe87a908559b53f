"""T5's encoder in Transformers' format, both ways: a `T5EncoderModel`, or a T5 less its decoder."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.interop import files, text_encoder
from diffusion.interop.weight_files import read_weights
from diffusion.models.t5 import T5Encoder

STEM = "model"
CLASSES = ("T5EncoderModel", "T5ForConditionalGeneration", "T5Model")
ACTIVATIONS = {"relu": ("relu", False), "gated-gelu": ("gelu_tanh", True)}
LAYER = r"/encoder/block/\1/layer"
RULES: files.Rules = (
    (r"^/tokens/", "/shared/"),
    (r"^/layers_(\d+)_norm1/", rf"{LAYER}/0/layer_norm/"),
    (r"^/layers_(\d+)_norm2/", rf"{LAYER}/1/layer_norm/"),
    (r"^/layers_(\d+)_([qkvo])/", rf"{LAYER}/0/SelfAttention/\2/"),
    (r"^/layers_(\d+)_(w\w+)/", rf"{LAYER}/1/DenseReluDense/\2/"),
    (r"^/final_norm/", "/encoder/final_layer_norm/"),
)
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
NUMBERS = {  # ours, theirs and what a missing one means
    "vocab_size": ("vocab_size", 32128),
    "width": ("d_model", 512),
    "layers": ("num_layers", 6),
    "heads": ("num_heads", 8),
    "head_dim": ("d_kv", 64),
    "inner": ("d_ff", 2048),
    "buckets": ("relative_attention_num_buckets", 32),
    "max_distance": ("relative_attention_max_distance", 128),
    "epsilon": ("layer_norm_epsilon", 1e-6),
}

WHOLE = {"pruned_heads": ({},), "quantization_config": (None,)}
# Of no effect on the encoder's states: of the decoder, of training, and CLIP's.
FREE = (
    *("num_decoder_layers", "dropout_rate", "classifier_dropout", "scale_decoder_outputs"),
    *("output_past", "n_positions"),  # of old files: nothing reads them
    *text_encoder.FREE,
)


def load_t5(directory: str | os.PathLike, dtype: Any = None) -> tuple[T5Encoder, dict[str, Any]]:
    """(module, float32 parameters) of a Transformers directory; `dtype`: what it computes in.

    Its tokenizer is read by `data/tokenizer_files.py`, from its tokenizer.json. ValueError naming
    the file for anything missing, broken, of another shape, or of another architecture.
    """
    config, path = files.read_config(directory, CLASSES), Path(directory) / "config.json"
    files.require(config, {"feed_forward_proj": tuple(ACTIVATIONS)}, path)
    activation, gated = ACTIVATIONS[config.get("feed_forward_proj", "relu")]
    same = {"dense_act_fn": ("gelu_new" if gated else "relu",), "is_gated_act": (gated,)}
    files.require(config, {**same, **WHOLE}, path)
    known = (theirs for theirs, _ in NUMBERS.values())
    files.refuse_unknown(config, {"feed_forward_proj", *same, *WHOLE, *FREE, *known}, path)
    numbers = [theirs for theirs, default in NUMBERS.values() if isinstance(default, int)]
    files.whole_numbers(config, numbers, path)
    sizes = {ours: config.get(theirs, value) for ours, (theirs, value) in NUMBERS.items()}
    module = T5Encoder(**sizes, activation=activation, gated=gated, dtype=dtype)
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
    weights = read_weights(directory, STEM).without(r"^(decoder\.|lm_head\.)")
    embedding = r"^encoder\.embed_tokens\.weight$"
    if "shared.weight" in weights.tensors:
        weights = weights.without(embedding)  # the same again
    weights = weights.renamed([(embedding, "shared.weight"), (rf"^{BIAS}$", "bias")])
    return module, files.to_params(weights, shapes, RULES)


def save_t5(directory: str | os.PathLike, module: T5Encoder, params: Mapping[str, Any]) -> None:
    """Writes a directory that Transformers loads as `T5EncoderModel`, whole or not at all."""
    kinds = {kind: name for name, kind in ACTIVATIONS.items()}
    kind = (module.activation, module.gated)
    if kind not in kinds:
        raise ValueError(
            f"activation={kind[0]!r} with gated={kind[1]} cannot be written for Transformers: its "
            f"T5 has {' or '.join(map(str, kinds))}"
        )
    config = {theirs: getattr(module, ours) for ours, (theirs, _) in NUMBERS.items()}
    config |= {"architectures": ["T5EncoderModel"], "model_type": "t5"}
    config |= {"feed_forward_proj": kinds[kind], "is_encoder_decoder": False}
    tensors = files.to_tensors(params, RULES)
    tensors[BIAS] = tensors.pop("bias")
    files.write_directory(directory, config, tensors, STEM)
