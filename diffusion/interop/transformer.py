"""DiT's weights: Diffusers' `DiTTransformer2DModel`, both ways, and the authors' own `.pt` files.

Diffusers keeps a copy of the time and class embedders in every block; they are one here, and a
directory whose copies differ is refused. Its sinusoids have freq_shift 1 where the authors' have 0,
and the norm before the feed-forward has an epsilon of its own (`models/transformer.py` has both).
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.interop import files, pickled
from diffusion.interop.weight_files import read_weights
from diffusion.models.positions import sincos_positions
from diffusion.models.transformer import Transformer

STEM = "diffusion_pytorch_model"
CLASS = "DiTTransformer2DModel"
ACTIVATIONS = {"gelu-approximate": "gelu_tanh", "gelu": "gelu"}
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation_fn": tuple(ACTIVATIONS),
    "attention_bias": (True,),
    "dropout": (0.0,),
    "norm_elementwise_affine": (False,),
    "norm_type": ("ada_norm_zero",),
    "upcast_attention": (False, True),  # scores are float32 here
}
FREE = ("norm_num_groups",)  # it has no group norm
NUMBERS = {  # theirs, and what a missing one means
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}
COPY = re.compile(r"^transformer_blocks\.[1-9]\d*\.norm1\.emb\.")
RULES: files.Rules = (
    (r"^/patches/", "/pos_embed/proj/"),
    (r"^/time_(\d)/", r"/transformer_blocks/0/norm1/emb/timestep_embedder/linear_\1/"),
    (r"^/class_embedding/", "/transformer_blocks/0/norm1/emb/class_embedder/embedding_table/"),
    (r"^/out_modulation/", "/proj_out_1/"),
    (r"^/out/", "/proj_out_2/"),
    (r"^/blocks_(\d+)/modulation/", r"/transformer_blocks/\1/norm1/linear/"),
    (r"^/blocks_(\d+)/", r"/transformer_blocks/\1/"),
    (r"/ff/proj_in/", "/ff/net/0/proj/"),
    (r"/ff/proj_out/", "/ff/net/2/"),
    (r"/to_out/", "/to_out/0/"),
)


def load_transformer(directory: str | os.PathLike) -> tuple[Transformer, dict[str, Any]]:
    """The transformer of a Diffusers directory: `(module, params)`, parameters in float32.

    ValueError naming the file and the key for what the module cannot express, for embedders that
    differ between blocks, and for weights that are missing, of another shape or left over.
    """
    config = files.read_config(directory, {CLASS})
    module, in_channels = _module(config, Path(directory) / "config.json")
    weights = read_weights(directory, STEM).without(r"^pos_embed\.pos_embed$")
    for name in filter(COPY.match, weights.tensors):
        first = re.sub(r"^(transformer_blocks\.)\d+", r"\g<1>0", name)
        if not np.array_equal(weights.tensors[name], weights.tensors.get(first, ())):
            raise ValueError(
                f"{weights.files[name]}: {name} differs from {first}, but one embedder serves all "
                "blocks here: it is no DiT as its authors have it"
            )
    return module, _params(module, in_channels, weights.without(COPY.pattern), RULES)


def _module(config: Mapping[str, Any], path: Path) -> tuple[Transformer, int]:
    known = {*SUPPORTED, *FREE, *NUMBERS, "out_channels"}
    unknown = sorted(key for key in config.keys() - known if not key.startswith("_"))
    if unknown:
        raise ValueError(f"{path}: {unknown[0]}={config[unknown[0]]!r} is not known of a {CLASS}")
    files.require(config, SUPPORTED, path)
    given = {**NUMBERS, **config}
    heads = given["num_attention_heads"]
    module = Transformer(
        out_channels=given.get("out_channels") or given["in_channels"],
        patch=given["patch_size"],
        width=heads * given["attention_head_dim"],
        depth=given["num_layers"],
        heads=heads,
        size=given["sample_size"],
        num_classes=given["num_embeds_ada_norm"] + 1,
        activation=ACTIVATIONS[given.get("activation_fn", "gelu-approximate")],
        mlp_epsilon=given["norm_eps"],
        freq_shift=1,
    )
    return module, given["in_channels"]


def _params(
    module: Transformer, in_channels: int, weights: files.Weights, rules: files.Rules
) -> dict[str, Any]:
    """As `files.to_params`, patches as one dense layer where PyTorch has a convolution."""
    shapes = transformer_shapes(module, in_channels)
    name = files.torch_name(("patches", "kernel"), rules)
    tensors = dict(weights.tensors)
    if name in tensors and tensors[name].ndim == 4:
        tensors[name] = np.moveaxis(tensors[name], 1, -1).reshape(len(tensors[name]), -1)
    return files.to_params(files.Weights(tensors, weights.files, weights.directory), shapes, rules)


def transformer_shapes(module: Transformer, in_channels: int) -> Any:
    """The tree of parameter shapes for two spatial axes, without computing anything."""
    labels = None if module.num_classes is None else jnp.zeros(1, int)
    x = jnp.zeros((1, module.size, module.size, in_channels))
    key = jax.random.key(0)
    return jax.eval_shape(lambda: module.init(key, x, jnp.zeros(1), labels=labels))["params"]


def save_transformer(
    directory: str | os.PathLike, module: Transformer, params: Mapping[str, Any]
) -> None:
    """Writes a directory that Diffusers loads. ValueError where it has no such network."""
    config = _config(module, params)
    tensors = files.to_tensors(params, RULES)
    patches, patch = "pos_embed.proj.weight", config["patch_size"]
    kernel = tensors[patches].reshape(module.width, patch, patch, -1)
    tensors[patches] = np.ascontiguousarray(np.moveaxis(kernel, -1, 1))
    for name in [name for name in tensors if ".0.norm1.emb." in name]:
        for i in range(1, module.depth):
            tensors[name.replace(".0.", f".{i}.", 1)] = tensors[name].copy()
    files.write_directory(directory, config, tensors, STEM)


def _config(module: Transformer, params: Mapping[str, Any]) -> dict[str, Any]:
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    needed: dict[str, Any] = {
        "modulation": "zero",
        "cross": False,
        "positions": "sincos",
        "norm": "layer",
        "qk_norm": False,
        "registers": 0,
        "mult": 4,
        "freq_shift": 1,
        "epsilon": 1e-6,
        "interpolate": False,
        "position_scale": 1,
        "pool_context": False,
        "second_time": False,
        "bottleneck": None,
        "label_tokens": 0,
        "factorised": False,
    }
    for key, value in needed.items():
        if getattr(module, key) != value:
            raise ValueError(
                f"model.denoiser.{key}={getattr(module, key)!r} cannot be written for Diffusers, "
                f"whose {CLASS} has {value!r}"
            )
    if module.num_classes is None or module.activation not in theirs:
        raise ValueError(
            f"num_classes={module.num_classes} with activation={module.activation!r} cannot be "
            f"written for Diffusers: its {CLASS} has classes, and one of {', '.join(theirs)}"
        )
    if not isinstance(module.patch, int) or not isinstance(module.size, int):
        raise ValueError(
            f"patch={module.patch} and size={module.size} cannot be written for Diffusers: its "
            f"{CLASS} has one number for both axes"
        )
    values = params["patches"]["kernel"].shape[0]
    return {
        "_class_name": CLASS,
        "activation_fn": theirs[module.activation],
        "attention_bias": True,
        "attention_head_dim": module.width // module.heads,
        "in_channels": values // module.patch**2,
        "norm_elementwise_affine": False,
        "norm_eps": module.mlp_epsilon or module.epsilon,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": module.heads,
        "num_embeds_ada_norm": module.num_classes - 1,
        "num_layers": module.depth,
        "out_channels": module.out_channels,
        "patch_size": module.patch,
        "sample_size": module.size,
    }


# -- the authors' own files ----------------------------------------------------------------------

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of S, B, L and XL, which the files do not say
OWN_RULES: files.Rules = (
    (r"^/patches/", "/x_embedder/proj/"),
    (r"^/time_1/", "/t_embedder/mlp/0/"),
    (r"^/time_2/", "/t_embedder/mlp/2/"),
    (r"^/class_embedding/", "/y_embedder/embedding_table/"),
    (r"^/out_modulation/", "/final_layer/adaLN_modulation/1/"),
    (r"^/out/", "/final_layer/linear/"),
    (r"^/blocks_(\d+)/modulation/", r"/blocks/\1/adaLN_modulation/1/"),
    (r"^/blocks_(\d+)/", r"/blocks/\1/"),
    (r"/attn1/to_out/", "/attn/proj/"),
    (r"/attn1/", "/attn/"),
    (r"/ff/proj_in/", "/mlp/fc1/"),
    (r"/ff/proj_out/", "/mlp/fc2/"),
)


def load_dit(path: str | os.PathLike) -> tuple[Transformer, dict[str, Any]]:
    """`(module, params)` of a DiT checkpoint as its authors publish it (`DiT-XL-2-256x256.pt`).

    Sizes are read off the arrays. ValueError naming the file for one that is no DiT, whose width is
    none of S, B, L and XL, or whose stored positions are not those of its size.
    """
    stored = pickled.read(path, entries=("ema", "model"))
    missing = {"x_embedder.proj.weight", "pos_embed", "final_layer.linear.weight"} - set(stored)
    if missing:
        raise ValueError(f"{path} is no checkpoint of DiT: it has no {sorted(missing)[0]}")
    width, channels, patch, _ = stored["x_embedder.proj.weight"].shape
    if width not in HEADS:
        raise ValueError(
            f"{path} has width {width}, but only {', '.join(map(str, HEADS))} are known"
        )
    tensors = {name: np.asarray(value, np.float32) for name, value in stored.items()}
    positions = tensors.pop("pos_embed")[0]
    side = round(len(positions) ** 0.5)
    wanted = sincos_positions([np.arange(side, dtype=np.float64)] * 2, width)
    if positions.shape != wanted.shape or np.abs(positions - wanted).max() > 1e-5:
        raise ValueError(f"{path}: pos_embed is not that of {side} x {side} patches")
    for name in [name for name in tensors if ".attn.qkv." in name]:
        for part, value in zip("qkv", np.split(tensors.pop(name), 3)):
            tensors[name.replace("qkv", f"to_{part}")] = value
    module = Transformer(
        out_channels=len(tensors["final_layer.linear.weight"]) // patch**2,
        patch=patch,
        width=width,
        depth=1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
        heads=HEADS[width],
        size=side * patch,
        num_classes=len(tensors["y_embedder.embedding_table.weight"]),
    )
    place = Path(path)
    weights = files.Weights(tensors, dict.fromkeys(tensors, place), place)
    return module, _params(module, channels, weights, OWN_RULES)
