"""DINOv2 in Transformers' format: a directory of `Dinov2Model`."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.interop import files, text_encoder
from diffusion.interop.weight_files import read_weights
from diffusion.models.dinov2 import DinoV2

STEM = "model"
CLASSES = ("Dinov2Model", "Dinov2ForImageClassification", "Dinov2Backbone")
PATCHES = "embeddings.patch_embeddings.projection.weight"
LAYER = r"/encoder/layer/\1"
RULES: files.Rules = (
    (r"^/$", "/embeddings/"),  # tokens, positions and scales are leaves of the whole
    (r"^/patches/", "/embeddings/patch_embeddings/projection/"),
    (r"^/norm/", "/layernorm/"),
    (r"^/blocks_(\d+)_norm(\d)/", rf"{LAYER}/norm\2/"),
    (r"^/blocks_(\d+)_attention/to_out/", rf"{LAYER}/attention/output/dense/"),
    (r"^/blocks_(\d+)_attention/to_q/", rf"{LAYER}/attention/attention/query/"),
    (r"^/blocks_(\d+)_attention/to_k/", rf"{LAYER}/attention/attention/key/"),
    (r"^/blocks_(\d+)_attention/to_v/", rf"{LAYER}/attention/attention/value/"),
    (r"^/blocks_(\d+)_ff/proj_in/", rf"{LAYER}/mlp/fc1/"),
    (r"^/blocks_(\d+)_ff/proj_out/", rf"{LAYER}/mlp/fc2/"),
)
LEAVES: files.Rules = (
    (r"^embeddings\.cls_token$", "embeddings.class_token"),
    (r"^embeddings\.position_embeddings$", "embeddings.positions"),
    (r"^encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1$", r"embeddings.blocks_\1_scale\2"),
)
NUMBERS = {  # ours, theirs and what a missing one means
    "image_size": ("image_size", 224),
    "patch": ("patch_size", 14),
    "width": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "mult": ("mlp_ratio", 4),
    "epsilon": ("layer_norm_eps", 1e-6),
}
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "num_channels": (3,),
    "qkv_bias": (True,),
    "use_swiglu_ffn": (False,),
    "pruned_heads": ({},),
    "quantization_config": (None,),
}
# Of training, of what a backbone hands out, and where scales begin: the features are the same.
FREE = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "layerscale_value"),
    *("use_mask_token", "out_features", "out_indices", "stage_names", "apply_layernorm"),
    *("reshape_hidden_states", *text_encoder.FREE),
)


def load_dinov2(directory: str | os.PathLike, dtype: Any = None) -> tuple[DinoV2, dict[str, Any]]:
    """(module, float32 parameters); `dtype`: what it computes in.

    ValueError naming the file for anything missing, broken, of another shape, or of another
    architecture (giant's SwiGLU, registers).
    """
    config, path = files.read_config(directory, CLASSES), Path(directory) / "config.json"
    files.require(config, SUPPORTED, path)
    known = (theirs for theirs, _ in NUMBERS.values())
    files.refuse_unknown(config, {*SUPPORTED, *FREE, *known}, path)
    whole = (theirs for ours, (theirs, _) in NUMBERS.items() if ours not in ("mult", "epsilon"))
    files.whole_numbers(config, whole, path)
    sizes = {ours: config.get(theirs, value) for ours, (theirs, value) in NUMBERS.items()}
    if sizes["width"] % sizes["heads"] or sizes["image_size"] % sizes["patch"]:
        raise ValueError(
            f"{path}: hidden_size={sizes['width']} must be a multiple of num_attention_heads="
            f"{sizes['heads']}, and image_size={sizes['image_size']} of patch_size="
            f"{sizes['patch']}: fetch it again"
        )
    with files.naming(path):
        module = DinoV2(**sizes, dtype=dtype)
        image = jnp.zeros((1, module.image_size, module.image_size, 3))
        shapes = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
    weights = read_weights(directory, STEM).without(r"mask_token$|^classifier\.")
    weights = weights.renamed([(r"^dinov2\.", ""), *LEAVES])
    tensors = dict(weights.tensors)
    if tensors.get(PATCHES, np.zeros(())).ndim == 4:  # one dense layer here
        tensors[PATCHES] = np.moveaxis(tensors[PATCHES], 1, -1).reshape(len(tensors[PATCHES]), -1)
    found = files.Weights(tensors, weights.files, weights.directory)
    return module, files.to_params(found, shapes, RULES)
