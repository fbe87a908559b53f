"""CompVis's U-Nets and text encoders in one file, `.ckpt` or `.safetensors`: LDM, SD 1.x and 2.x.

The file says no architecture: the module does, and every tensor must fit it. With blocks counted
through (CompVis/latent-diffusion:ldm/modules/diffusionmodules/openaimodel.py):

    CompVis, under model.diffusion_model.                 here
    input_blocks.0.0                                      conv_in
    input_blocks.n.0, .1 (n = 1 ..; one more a level)     down_i_res_j, down_i_attn_j; down_i_sample
    middle_block.0, .1, .2                                mid_res_0, mid_attn, mid_res_1
    output_blocks.n.0, .1, and the last of a level's end  up_i_res_j, up_i_attn_j; up_i_sample
    in_layers.0, .2, emb_layers.1, out_layers.0, .3       norm1, conv1, time_emb_proj, norm2, conv2
    qkv (a head's q, k and v after each other)            to_q, to_k, to_v

Averages are under model_ema., their names without dots, and are taken where there are any. Text
encoders are under cond_stage_model., SDXL's two under conditioner.embedders.: CLIP as Transformers
names it, OpenCLIP (SD 2.x, the layers that run; SDXL), LDM's BERT (ldm/modules/x_transformer.py),
or an embedding of classes.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.interop import text_encoder
from diffusion.interop.files import Rules, Weights, to_params, to_tensors
from diffusion.interop.unet import unet_shapes
from diffusion.models.embedders import ClassEmbedder, SpatialRescaler
from diffusion.models.text_encoder import TextPair, TextTransformer
from diffusion.models.unet import UNet

UNET, EMA, CONDITION = "model.diffusion_model.", "model_ema.", "cond_stage_model."
PAIR = "conditioner.embedders."  # of Stable Diffusion XL
BLOCK = r"^(/(?:input|output)_blocks/\d+/\d+|/middle_block/\d+)"


def unet_rules(module: UNet) -> Rules:
    """`files.torch_name`'s rules of this U-Net."""
    places = {"conv_in": "input_blocks/0/0", "class_embedding": "label_emb"}
    places |= {"time_1": "time_embed/0", "time_2": "time_embed/2"}
    places |= {"vector_1": "label_emb/0/0", "vector_2": "label_emb/0/2"}
    places |= {"norm_out": "out/0", "conv_out": "out/2", "mid_res_0": "middle_block/0"}
    places |= {"mid_attn": "middle_block/1"}
    places["mid_res_1"] = f"middle_block/{1 + module.mid_attention}"
    blocks, n = module.per_level(module.blocks), 1
    for i in range(module.levels):
        for j in range(blocks[i]):
            places |= {f"down_{i}_res_{j}": f"input_blocks/{n}/0"}
            places |= {f"down_{i}_attn_{j}": f"input_blocks/{n}/1"}
            n += 1
        if i < module.levels - 1:
            conv = "" if module.resblock_updown else "/op"
            places[f"down_{i}_sample" + "/conv" * bool(conv)] = f"input_blocks/{n}/0{conv}"
            n += 1
    n = 0
    for i in range(module.levels):
        level = module.levels - 1 - i
        for j in range(blocks[level] + 1):
            places |= {f"up_{i}_res_{j}": f"output_blocks/{n}/0"}
            places |= {f"up_{i}_attn_{j}": f"output_blocks/{n}/1"}
            n += 1
        places[f"up_{i}_sample"] = f"output_blocks/{n - 1}/{1 + module.attention[level]}"
    return (
        *((rf"^/{ours}/", f"/{theirs}/") for ours, theirs in places.items()),
        (BLOCK + "/norm1/", r"\1/in_layers/0/"),
        (BLOCK + "/conv1/", r"\1/in_layers/2/"),
        (BLOCK + "/time_emb_proj/", r"\1/emb_layers/1/"),
        (BLOCK + "/norm2/", r"\1/out_layers/0/"),
        (BLOCK + "/conv2/", r"\1/out_layers/3/"),
        (BLOCK + "/conv_shortcut/", r"\1/skip_connection/"),
        (r"/group_norm/", "/norm/"),
        (r"/attention/to_out/", "/proj_out/"),
        (r"/blocks_(\d+)/", r"/transformer_blocks/\1/"),
        (r"/ff/proj_in/", "/ff/net/0/proj/"),
        (r"/ff/proj_out/", "/ff/net/2/"),
        (r"/to_out/", "/to_out/0/"),
    )


def read_unet(weights: Weights, module: UNet) -> dict[str, Any]:
    """The U-Net's parameters, averaged where the file has averages.

    ValueError naming the file for a tensor that is missing, of another shape, or left over.
    """
    ours = under(_averaged(weights), UNET)
    if "input_blocks.0.0.weight" not in ours.tensors:
        raise ValueError(
            f"{_file(weights)} holds no U-Net (no {UNET}input_blocks.0.0.weight): give a "
            "checkpoint of CompVis's Latent Diffusion or Stable Diffusion"
        )
    in_channels = ours.tensors["input_blocks.0.0.weight"].shape[1]
    keys = [t for name, t in ours.tensors.items() if name.endswith("attn2.to_k.weight")]
    told = ours.tensors.get("label_emb.0.0.weight") if module.vector else None
    width = None if told is None else told.shape[1]
    shapes = unet_shapes(module, in_channels, keys[0].shape[1] if keys else None, width)
    return to_params(split_qkv(ours, module), shapes, unet_rules(module))


def unet_tensors(module: UNet, params: Any) -> dict[str, np.ndarray]:
    """Tensors by CompVis's names, with prefix: what `read_unet` reads."""
    tensors = to_tensors(params, unet_rules(module))
    joined: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        match = re.match(r"(.*)\.attention\.to_q\.(weight|bias)$", name)
        if match:
            parts = [tensors[name.replace("to_q", key)] for key in ("to_q", "to_k", "to_v")]
            heads = heads_of(module, len(tensor))
            split = [part.reshape(heads, -1, *part.shape[1:]) for part in parts]
            whole = np.stack(split, 1).reshape(-1, *tensor.shape[1:])
            joined[f"{match[1]}.qkv.{match[2]}"] = whole[..., None] if whole.ndim == 2 else whole
        elif not re.search(r"\.attention\.to_[kv]\.", name):
            conv = not module.linear_projection and re.search(r"\.proj_(in|out)\.weight$", name)
            plain = re.search(r"^[^t]*\.proj_out\.weight$", name) and tensor.ndim == 2
            joined[name] = tensor[..., None] if conv and plain else tensor
    return {UNET + name: np.ascontiguousarray(tensor) for name, tensor in joined.items()}


def split_qkv(weights: Weights, module: UNet) -> Weights:
    """With to_q, to_k and to_v in the place of each qkv of the legacy order."""
    tensors, files = dict(weights.tensors), dict(weights.files)
    for name in weights.tensors:
        match = re.match(r"(.*)\.qkv\.(weight|bias)$", name)
        if match:
            tensor, file = tensors.pop(name), files.pop(name)
            width = len(tensor) // 3
            heads = heads_of(module, width)
            split = tensor.reshape(heads, 3, width // heads, *tensor.shape[1:])
            for i, key in enumerate(("to_q", "to_k", "to_v")):
                part = f"{match[1]}.attention.{key}.{match[2]}"
                tensors[part], files[part] = split[:, i].reshape(width, *tensor.shape[1:]), file
    return Weights(tensors, files, weights.directory)


def heads_of(module: UNet, width: int) -> int:
    """Of a layer of so many channels."""
    last = module.levels - 1  # the middle's, with attention on that level or without
    levels = [i for i in range(last + 1) if module.attention[i] or i == last]
    levels = [i for i in levels if module.width(i) == width]
    if not levels:
        raise ValueError(
            f"an attention layer has {width} channels, which no level of the U-Net has"
        )
    heads = {module.head_shape(i)[0] for i in levels}
    if len(heads) > 1:
        raise ValueError(
            f"levels {levels} of the U-Net have {width} channels each, and {sorted(heads)} heads: "
            "a CompVis file does not say whose its attention layers are; give them the same heads"
        )
    return heads.pop()


def _averaged(weights: Weights) -> Weights:
    """With the averages in the place of the parameters that they are of."""
    tensors = dict(weights.tensors)
    for name in weights.tensors:
        average = EMA + name.removeprefix("model.").replace(".", "")
        if name.startswith(UNET) and average in weights.tensors:
            tensors[name] = weights.tensors[average]
    return Weights(tensors, weights.files, weights.directory)


def under(weights: Weights, prefix: str) -> Weights:
    """Those of a prefix, without it."""
    kept = [name for name in weights.tensors if name.startswith(prefix)]
    cut = {name: name.removeprefix(prefix) for name in kept}
    tensors = {cut[name]: weights.tensors[name] for name in kept}
    return Weights(tensors, {cut[n]: weights.files[n] for n in kept}, weights.directory)


def _file(weights: Weights) -> object:
    return next(iter(weights.files.values()), weights.directory)


# -- what stands beside the U-Net ----------------------------------------------------------------


def context_width(tensors: Mapping[str, Any]) -> int | None:
    """Of the context that the U-Net looks at; None: it looks at none."""
    found = [t.shape[1] for n, t in tensors.items() if n.endswith("attn2.to_k.weight")]
    return found[0] if found else None


def scale_factor(weights: Weights) -> float | None:
    """What latents are multiplied with, where the file says (LDM's `scale_by_std`)."""
    found = weights.tensors.get("scale_factor")
    return None if found is None else float(np.asarray(found).reshape(()))


def read_text_pair(weights: Weights, module: TextPair) -> dict[str, Any]:
    """Both encoders' parameters of a Stable Diffusion XL."""
    first, second = (f"{PAIR}{i}." for i in (0, 1))
    name = f"{second}model." + "text_projection"
    projection = weights.tensors.get(name)
    wanted = (module.second.width, module.projection)
    if projection is None or projection.shape != wanted:
        raise ValueError(
            f"{_file(weights)} has no {name} of {wanted}: give a checkpoint "
            "of Stable Diffusion XL's base"
        )
    return {
        "first": read_text_encoder(weights, module.first, first),
        "second": read_text_encoder(weights, module.second, second),
        "project": {"kernel": np.ascontiguousarray(projection, np.float32)},
    }


def read_text_encoder(
    weights: Weights, module: TextTransformer, prefix: str = CONDITION
) -> dict[str, Any]:
    """The parameters of CLIP, OpenCLIP or LDM's BERT, whichever the file has.

    ValueError naming the file where it has none, or one that does not fit the module.
    """
    held = under(weights, prefix)
    if "model.ln_final.weight" in held.tensors:
        found, rules = _open_clip(under(held, "model."), module), text_encoder.RULES
    elif "transformer.token_emb.weight" in held.tensors:
        found, rules = under(held, "transformer."), bert_rules(module.layers)
    elif any(name.endswith("embeddings.token_embedding.weight") for name in held.tensors):
        found = under(held, "transformer.").without(r"position_ids$")
        found, rules = found.renamed([(r"^text_model\.", "")]), text_encoder.RULES
    else:
        raise ValueError(
            f"{_file(weights)} holds no text encoder under {prefix}, which the config has: give "
            "another file or config"
        )
    tokens = jnp.zeros((1, module.max_length), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
    return to_params(found, shapes, rules)


def read_class_embedder(weights: Weights, module: ClassEmbedder) -> dict[str, Any]:
    """The embedding of classes, cond_stage_model.embedding.weight."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(1, jnp.int32))["params"]
    return to_params(under(weights, CONDITION), shapes, ())


def read_rescaler(weights: Weights, module: SpatialRescaler) -> dict[str, Any]:
    """The convolution of maps of labels, cond_stage_model.channel_mapper.weight."""
    name = f"{CONDITION}channel_mapper.weight"
    found = weights.tensors.get(name)
    if found is None or found.shape != (module.channels, module.classes, 1, 1):
        raise ValueError(
            f"{_file(weights)} has no {name} of {module.classes} labels to {module.channels} "
            "channels, which the config has: give another file or config"
        )
    return {"kernel": np.ascontiguousarray(np.asarray(found)[..., 0, 0].T)}


def bert_rules(layers: int) -> Rules:
    """`files.torch_name`'s rules of LDM's BERT, where each half of a layer is one."""
    rules: list[tuple[str, str]] = [
        (r"^/token_embedding/", "/token_emb/"),
        (r"^/position_embedding/", "/pos_emb/emb/"),
        (r"^/final_norm/", "/norm/"),
    ]
    for i in range(layers):
        first, second = f"/attn_layers/layers/{2 * i}", f"/attn_layers/layers/{2 * i + 1}"
        rules += [
            (rf"^/layers_{i}/norm1/", f"{first}/0/"),
            (rf"^/layers_{i}/attention/", f"{first}/1/"),
            (rf"^/layers_{i}/norm2/", f"{second}/0/"),
            (rf"^/layers_{i}/ff/proj_in/", f"{second}/1/net/0/0/"),
            (rf"^/layers_{i}/ff/proj_out/", f"{second}/1/net/2/"),
        ]
    return rules


OPEN_CLIP: Rules = (
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
    (r"^ln_final\.", "final_layer_norm."),
)


def _open_clip(weights: Weights, module: TextTransformer) -> Weights:
    """OpenCLIP's names as Transformers', q, k and v apart, without the layers that do not run."""
    weights = weights.without(r"^(text_projection|logit_scale|attn_mask)$").renamed(OPEN_CLIP)
    tensors, files = dict(weights.tensors), dict(weights.files)
    for name, tensor in weights.tensors.items():
        layer = re.match(r"encoder\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= module.layers:
            del tensors[name], files[name]
        elif match := re.match(r"(.*)\.in_proj_(weight|bias)$", name):
            del tensors[name]
            for key, part in zip("qkv", np.split(tensor, 3)):
                tensors[f"{match[1]}.{key}_proj.{match[2]}"] = part
                files[f"{match[1]}.{key}_proj.{match[2]}"] = weights.files[name]
    return Weights(tensors, files, weights.directory)
