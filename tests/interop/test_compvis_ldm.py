"""CompVis's U-Nets and text encoders: by Diffusers' own converter, and by the authors' formulas."""

import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from diffusion.interop import compvis_ldm
from diffusion.interop.files import Weights
from diffusion.interop.unet import unet_shapes
from diffusion.models.attention import AttentionBlock
from diffusion.models.embedders import ClassEmbedder, SpatialRescaler
from diffusion.models.text_encoder import TextTransformer, ldm_bert
from diffusion.models.unet import UNet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers.loaders import single_file_utils

FILE = Path("model.ckpt")
SD = UNet(
    out_channels=4,
    channels=16,
    multipliers=(1, 2, 2),
    blocks=2,
    attention=(True, True, False),
    heads=2,
    transformer_depth=1,
    groups=8,
    epsilon=1e-5,
    downsample_padding=1,
    flip_sin_to_cos=True,
    freq_shift=0,
)
PLAIN = UNet(
    out_channels=3,
    channels=16,
    multipliers=(1, 2),
    blocks=1,
    attention=(False, True),
    heads=None,
    head_dim=8,
    groups=8,
    scale_shift=True,
    resblock_updown=True,
)


def shapes(module, *inputs, **named):
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **named))["params"]


def drawn(tree, seed=0):
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(lambda s: jnp.asarray(draw(0, 1, s.shape), jnp.float32), tree)


def unet_params(module, channels, context=None):
    x = jnp.zeros((1, 8, 8, channels))
    given = {} if context is None else {"context": jnp.zeros((1, 2, context))}
    return drawn(shapes(module, x, jnp.zeros(1), **given))


def weights(tensors):
    return Weights(tensors, dict.fromkeys(tensors, FILE), FILE.parent)


def same(found, wanted):
    a, b = flatten_dict(found), flatten_dict(wanted)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=str(path))


@pytest.mark.parametrize(("module", "channels", "context"), [(SD, 4, 12), (PLAIN, 3, None)])
def test_a_unet_goes_round(module, channels, context):
    params = unet_params(module, channels, context)
    tensors = compvis_ldm.unet_tensors(module, params)
    assert "model.diffusion_model.time_embed.0.weight" in tensors
    same(compvis_ldm.read_unet(weights(tensors), module), params)


@pytest.mark.parametrize("linear", [False, True])
def test_names_are_those_that_diffusers_converts(linear):
    """Its converter takes our tensors to what our Diffusers writer calls them."""
    import dataclasses

    from diffusion.interop.files import to_tensors
    from diffusion.interop.unet import RULES
    from diffusion.interop.unet_config import unet_config

    module = dataclasses.replace(SD, linear_projection=linear)
    params = unet_params(module, 4, 12)
    tensors = compvis_ldm.unet_tensors(module, params)
    config = {"class_embed_type": None, **unet_config(module, params)}
    found = single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), config)
    wanted = to_tensors(params, RULES)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(np.squeeze(tensor), np.squeeze(wanted[name]), err_msg=name)


def test_averages_are_taken_and_other_networks_left():
    params = unet_params(SD, 4, 12)
    tensors = compvis_ldm.unet_tensors(SD, params)
    raw = {name: tensor + 1 for name, tensor in tensors.items()}
    stem = "model."
    averages = {"model_ema." + n.removeprefix(stem).replace(".", ""): t for n, t in tensors.items()}
    rest = {"model_ema.decay": np.ones(()), "scale_factor": np.array(0.23, np.float32)}
    held = weights({**raw, **averages, **rest, "first_stage_model.x": np.ones(3)})
    same(compvis_ldm.read_unet(held, SD), params)
    assert compvis_ldm.scale_factor(held) == pytest.approx(0.23)
    assert compvis_ldm.scale_factor(weights({})) is None


def test_joined_q_k_v_are_taken_apart_head_by_head():
    """Against QKVAttentionLegacy's formula (openaimodel.py) on the joined tensor."""
    heads, width, length = 4, 32, 9
    block = AttentionBlock(heads, width // heads, groups=8)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 3, width)), jnp.float32)
    params = drawn(shapes(block, x), seed=2)
    module = UNet(channels=width, multipliers=(1,), attention=(True,), heads=heads, groups=8)
    place = {"mid_attn": params}
    tensors = {
        name.removeprefix("model.diffusion_model.middle_block.1."): tensor
        for name, tensor in compvis_ldm.unet_tensors(module, place).items()
    }
    assert tensors["qkv.weight"].shape == (3 * width, width, 1)
    with jax.default_matmul_precision("highest"):
        found = block.apply({"params": params}, x)
    from diffusion.models.layers import GroupNorm

    norm = {"scale": tensors["norm.weight"], "bias": tensors["norm.bias"]}
    h = np.asarray(GroupNorm(8).apply({"params": norm}, x)).reshape(2, length, width)
    qkv = np.einsum("oi,bti->bot", tensors["qkv.weight"][..., 0], h) + tensors["qkv.bias"][:, None]
    q, k, v = np.split(qkv.reshape(2 * heads, -1, length), 3, axis=1)
    scores = np.einsum("bct,bcs->bts", q, k) / np.sqrt(width // heads)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    a = np.einsum("bts,bcs->bct", scores, v).reshape(2, width, length)
    projected = np.einsum("oi,bit->bto", tensors["proj_out.weight"][..., 0], a)
    wanted = np.asarray(x) + (projected + tensors["proj_out.bias"]).reshape(x.shape)
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 1e-5


# -- text encoders -------------------------------------------------------------------------------

TOKENS = jnp.zeros((1, 9), jnp.int32)
CLIP = TextTransformer(50, 9, 16, 2, 4, activation="gelu")


def text_tensors(params, prefix):
    from diffusion.interop.files import to_tensors
    from diffusion.interop.text_encoder import RULES

    return {prefix + name: tensor for name, tensor in to_tensors(params, RULES).items()}


@pytest.mark.parametrize("prefix", ["text_model.", ""])  # "": as some merged files have it
def test_clip_of_stable_diffusion_1(prefix):
    params = drawn(shapes(CLIP, TOKENS))
    held = text_tensors(params, f"cond_stage_model.transformer.{prefix}")
    held[f"cond_stage_model.transformer.{prefix}embeddings.position_ids"] = np.arange(9)
    same(compvis_ldm.read_text_encoder(weights(held), CLIP), params)


def test_open_clip_of_stable_diffusion_2_without_its_last_layer():
    """By OpenCLIP's names (mlfoundations/open_clip:src/open_clip/transformer.py), q k v joined."""
    params = drawn(shapes(CLIP, TOKENS))
    held = {}
    for name, tensor in text_tensors(params, "").items():
        for ours, theirs in (
            ("embeddings.token_embedding.weight", "token_embedding.weight"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("encoder.layers.", "transformer.resblocks."),
            ("layer_norm", "ln_"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("self_attn.out_proj", "attn.out_proj"),
            ("final_ln_", "ln_final"),
            ("final_layer_norm", "ln_final"),
        ):
            name = (
                name.replace(ours, theirs)
                if not name.startswith("final") or "final" in ours
                else name
            )
        held[f"cond_stage_model.model.{name}"] = tensor
    for i in range(2):
        stem = f"cond_stage_model.model.transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            parts = [held.pop(f"{stem}self_attn.{key}_proj.{kind}") for key in "qkv"]
            held[f"{stem}attn.in_proj_{kind}"] = np.concatenate(parts)
    last = {n.replace("resblocks.1", "resblocks.2"): t for n, t in held.items() if "blocks.1" in n}
    extra = {f"cond_stage_model.model.{n}": np.ones(2) for n in ("logit_scale", "text_projection")}
    same(compvis_ldm.read_text_encoder(weights({**held, **last, **extra}), CLIP), params)


def test_ldms_bert_and_class_embedding():
    """Names as in ldm/modules/x_transformer.py: a norm and a branch in each of 2 x layers."""
    module = ldm_bert(width=16, layers=2, vocab_size=30, heads=2, head_dim=8, max_length=9)
    params = drawn(shapes(module, TOKENS))
    stem, held = "cond_stage_model.transformer.", {}

    def put(name, kernel=None, **rest):
        for key, value in ({"weight": kernel.T} if kernel is not None else {}).items():
            held[stem + name + "." + key] = np.ascontiguousarray(value)
        for key, value in rest.items():
            held[stem + name + "." + key] = np.asarray(value)

    put("token_emb", weight=params["token_embedding"]["embedding"])
    put("pos_emb.emb", weight=params["position_embedding"]["embedding"])
    put("norm", weight=params["final_norm"]["scale"], bias=params["final_norm"]["bias"])
    put("to_logits", **params["to_logits"])
    for i in range(2):
        layer, even, odd = (
            params[f"layers_{i}"],
            f"attn_layers.layers.{2 * i}",
            f"attn_layers.layers.{2 * i + 1}",
        )
        for key, place in (("norm1", even), ("norm2", odd)):
            put(f"{place}.0", weight=layer[key]["scale"], bias=layer[key]["bias"])
        for key, leaves in layer["attention"].items():
            put(f"{even}.1.{key}", **leaves)
        put(f"{odd}.1.net.0.0", **layer["ff"]["proj_in"])
        put(f"{odd}.1.net.2", **layer["ff"]["proj_out"])
    same(compvis_ldm.read_text_encoder(weights(held), module), params)

    embedder = ClassEmbedder(7, 5)
    table = drawn(shapes(embedder, jnp.zeros(1, jnp.int32)))
    held = {"cond_stage_model.embedding.weight": np.asarray(table["embedding"]["embedding"])}
    same(compvis_ldm.read_class_embedder(weights(held), embedder), table)

    rescaler = SpatialRescaler(5, 3)
    kernel = drawn(shapes(rescaler, jnp.zeros((1, 4, 4), jnp.int32)))["kernel"]
    held = {"cond_stage_model.channel_mapper.weight": np.asarray(kernel).T[..., None, None]}
    same(compvis_ldm.read_rescaler(weights(held), rescaler), {"kernel": kernel})
    with pytest.raises(ValueError, match=r"channel_mapper\.weight of 6 labels to 3"):
        compvis_ldm.read_rescaler(weights(held), SpatialRescaler(6, 3))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {}, "no U-Net"),
        (lambda t: {k: v for k, v in t.items() if "out.2.bias" not in k}, "out.2.bias"),
        (lambda t: {**t, "model.diffusion_model.odd.weight": np.ones(2)}, "odd.weight"),
        (
            lambda t: {**t, "model.diffusion_model.time_embed.0.bias": np.ones(3)},
            "time_embed.0.bias",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    tensors = compvis_ldm.unet_tensors(SD, unet_params(SD, 4, 12))
    with pytest.raises(ValueError, match=words):
        compvis_ldm.read_unet(weights(change(tensors)), SD)
    with pytest.raises(ValueError, match="no text encoder"):
        compvis_ldm.read_text_encoder(weights(tensors), CLIP)


def test_levels_of_one_width_with_other_heads_are_refused():
    """One layer's q, k and v would be cut by another's heads."""
    module = UNet(
        channels=32, multipliers=(1, 1), blocks=1, attention=(True, True), heads=(2, 4), groups=8
    )
    shapes = unet_shapes(module, 3, None)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    with pytest.raises(ValueError, match=r"levels \[0, 1\].* 32 channels .*\[2, 4\] heads"):
        compvis_ldm.unet_tensors(module, params)
