"""Text encoders in Transformers' format: directories of `CLIPTextModel`, quick GELU or GELU.

Read are also a `CLIPTextModelWithProjection` and the text half of a `CLIPModel`; their projections
are `text_pair.py`'s. Names come with the prefix `text_model.`
(published files, Transformers 4) or without (Transformers 5), and with the buffer `position_ids` in
files from before Transformers 4.31.

Stable Diffusion 2.x stores OpenCLIP's first 23 of 24 layers; what is written of an encoder with
`skip_layers` is likewise the layers that run.
"""

import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from diffusion.interop.files import (
    Rules,
    naming,
    read_config,
    refuse_unknown,
    require,
    to_params,
    to_tensors,
    whole_numbers,
    write_directory,
)
from diffusion.interop.weight_files import read_weights
from diffusion.models.text_encoder import TextTransformer

STEM = "model"
CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")
PREFIX = "text_model."

RULES: Rules = (
    (r"^/(token|position)_embedding/", r"/embeddings/\1_embedding/"),
    (r"^/layers_(\d+)/", r"/encoder/layers/\1/"),
    (r"/norm(\d)/", r"/layer_norm\1/"),
    (r"/attention/to_out/", r"/self_attn/out_proj/"),
    (r"/attention/to_(\w)/", r"/self_attn/\1_proj/"),
    (r"/ff/proj_in/", r"/mlp/fc1/"),
    (r"/ff/proj_out/", r"/mlp/fc2/"),
    (r"^/final_norm/", r"/final_layer_norm/"),
)

# The first value of each is the default; heads that were pruned have other shapes.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("quick_gelu", "gelu"),
    "pruned_heads": ({},),
    "quantization_config": (None,),
}
SIZES = {
    *("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"),
    *("num_hidden_layers", "num_attention_heads"),
}
# What changes no hidden state without dropout: how to begin, to project, to pool, to generate, and
# what Transformers notes of every model.
FREE = """
    architectures model_type transformers_version torch_dtype dtype projection_dim attention_dropout
    dropout initializer_range initializer_factor bos_token_id eos_token_id pad_token_id sep_token_id
    return_dict output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss
    tie_word_embeddings chunk_size_feed_forward is_encoder_decoder is_decoder use_cache prefix
    cross_attention_hidden_size add_cross_attention tie_encoder_decoder max_length min_length
    do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens finetuning_task id2label label2id tokenizer_class problem_type
    decoder_start_token_id task_specific_params gradient_checkpointing
""".split()

NOT_TEXT = r"^(vision_model|visual_projection|text_projection|logit_scale)\b|position_ids$"


def load_text_encoder(
    directory: str | os.PathLike, dtype: Any = None
) -> tuple[TextTransformer, dict[str, Any]]:
    """(module, float32 parameters) of a Transformers CLIP text model directory.

    `dtype`: what the module computes in. ValueError naming the file for anything missing, broken,
    of another shape, or of an architecture that is not CLIP's.
    """
    module, shapes = described(directory, dtype)
    weights = read_weights(directory, STEM).without(NOT_TEXT)
    return module, to_params(weights.renamed([(rf"^{re.escape(PREFIX)}", "")]), shapes, RULES)


def described(directory: str | os.PathLike, dtype: Any = None) -> tuple[TextTransformer, Any]:
    """(module, the shapes of its parameters), by the directory's config."""
    config = read_config(directory, CLASSES)
    with naming(Path(directory) / "config.json"):
        module = _module(_text_config(config, directory), directory, dtype)
        tokens = jnp.zeros((1, 1), jnp.int32)
        return module, jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]


def save_text_encoder(
    directory: str | os.PathLike, module: TextTransformer, params: PyTree, prefix: str = PREFIX
) -> None:
    """Writes a directory that Transformers loads as `CLIPTextModel`, whole or not at all.

    `prefix`: of every tensor's name; the default is what versions 4 and 5 load, "" what 5 writes.
    ValueError for an encoder that is not CLIP's (not causal, say).
    """
    check(module)
    skipped = {f"layers_{i}" for i in range(_layers(module), module.layers)}
    kept = {name: value for name, value in params.items() if name not in skipped}
    tensors = {prefix + name: value for name, value in to_tensors(kept, RULES).items()}
    write_directory(directory, config_of(module), tensors, STEM)


def _layers(module: TextTransformer) -> int:
    return module.layers - module.skip_layers


def _text_config(config: dict[str, Any], source: object) -> dict[str, Any]:
    """Of the text half; Transformers lets text_config_dict win over text_config."""
    found = config.get("text_config") or config
    for key, value in (config.get("text_config_dict") or {}).items():
        if key not in FREE and found.get(key, value) != value:
            raise ValueError(
                f"{source}: text_config has {key}={found[key]!r} and text_config_dict {value!r}: "
                "say the same in both"
            )
    return found


def _module(config: dict[str, Any], source: object, dtype: Any) -> TextTransformer:
    """Defaults are those of `CLIPTextConfig`, which older files leave out."""
    width, inner = config.get("hidden_size", 512), config.get("intermediate_size", 2048)
    require(config, SUPPORTED, source)
    refuse_unknown(config, {*SUPPORTED, *SIZES, "layer_norm_eps", *FREE}, source)
    whole_numbers(config, SIZES, source)
    return TextTransformer(
        vocab_size=config.get("vocab_size", 49408),
        max_length=config.get("max_position_embeddings", 77),
        width=width,
        layers=config.get("num_hidden_layers", 12),
        heads=config.get("num_attention_heads", 8),
        mult=multiple(inner, width),
        activation=config.get("hidden_act", "quick_gelu"),
        epsilon=config.get("layer_norm_eps", 1e-5),
        dtype=dtype,
    )


def multiple(inner: int, width: int) -> int | float:
    """m with int(m * width) = inner, an integer where it can be."""
    return inner // width if inner % width == 0 else (inner + 0.5) / width


def config_of(module: TextTransformer) -> dict[str, Any]:
    """CLIP's vocabulary ends in the start and the end token."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": module.vocab_size,
        "max_position_embeddings": module.max_length,
        "hidden_size": module.width,
        "intermediate_size": int(module.width * module.mult),
        "num_hidden_layers": _layers(module),
        "num_attention_heads": module.heads,
        "hidden_act": module.activation,
        "layer_norm_eps": module.epsilon,
        "bos_token_id": module.vocab_size - 2,
        "eos_token_id": module.vocab_size - 1,
    }


def check(module: TextTransformer) -> None:
    """ValueError where `CLIPTextModel` has no key for what the module is."""
    wanted = {
        "causal": (True,),
        "qkv_bias": (True,),
        "logits_head": (False,),
        "head_dim": (None, module.width // module.heads),
        "activation": ("quick_gelu", "gelu"),
    }
    for key, values in wanted.items():
        value = getattr(module, key)
        if value not in values:
            raise ValueError(
                f"{key}={value!r} cannot be written for Transformers, whose CLIPTextModel has "
                f"{key}={values[0]!r}: keep this text encoder in its own checkpoint"
            )
