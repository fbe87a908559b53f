"""Files of low-rank updates as people have them: by Diffusers' own loader, else B A by hand."""

import json
import pathlib
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.interop import load_lora, load_text_encoder, load_unet, save_lora
from diffusion.models.lora import merge

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.numpy import save_file
    from safetensors.torch import save_file as torch_save_file
    from transformers import CLIPTextConfig, CLIPTextModel

TOLERANCE = 1e-5
UNET = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
}
TEXT = {
    "vocab_size": 99,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
DRAW = np.random.default_rng(5).normal


@pytest.fixture(autouse=True, scope="module")
def exact():
    with jax.default_matmul_precision("highest"):
        yield


def kernels(model):
    """(name, weight) of every dense layer and convolution."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return [(n, m.weight) for n, m in model.named_modules() if isinstance(m, kinds)]


def updates(model):
    """By layer: A^T, B^T and an alpha; ranks and alphas differ from layer to layer."""
    found = {}
    for number, (name, weight) in enumerate(kernels(model)):
        out, width, *window = weight.shape
        rank = 1 + number % 4
        down = DRAW(0, 0.3 / np.prod(window or [1]) ** 0.5, (rank, width, *window))
        up = DRAW(0, 0.3, (out, rank, *(1 for _ in window)))
        found[name] = down.astype("f4"), up.astype("f4"), np.float32([0.5, 2, 3][number % 3])
    return found


def by_hand(model, found):
    """Weights with alpha / rank B A added."""
    with torch.no_grad():
        weights = dict(kernels(model))
        for name, (down, up, alpha) in found.items():
            delta = np.einsum("or,ri...->oi...", up.reshape(up.shape[:2]), down)
            weights[name] += torch.from_numpy(delta * (alpha / len(down)))
    return model.eval()


def kohya(found, prefix):
    names = {name: prefix + name.replace(".", "_") for name in found}
    return {
        f"{names[name]}.{key}": np.ascontiguousarray(value)
        for name, values in found.items()
        for key, value in zip(("lora_down.weight", "lora_up.weight", "alpha"), values)
    }


def distance(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def given():
    generator = torch.Generator().manual_seed(3)
    return {
        "sample": torch.randn((2, 4, 8, 4), generator=generator),
        "timestep": torch.tensor([7, 900]),
        "encoder_hidden_states": torch.randn((2, 5, 24), generator=generator),
    }


def output(module, params):
    x, t, context = (jnp.asarray(value.numpy()) for value in given().values())
    apply = jax.jit(lambda p: module.apply({"params": p}, jnp.moveaxis(x, 1, -1), t, context))
    return np.moveaxis(np.asarray(apply(params)), -1, 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of the U-Net, of files of updates and of what Diffusers makes of them."""
    root = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    model = UNet2DConditionModel(**UNET)
    model.save_pretrained(root / "unet")
    (root / "files").mkdir()
    found = updates(model)
    even = {k: (a[:1], b[:, :1], np.float32(0.5)) for k, (a, b, _) in found.items()}
    save_file(kohya(even, "lora_unet_"), root / "files/kohya.safetensors")
    save_file(kohya(found, "lora_unet_"), root / "mixed.safetensors")
    few = {k: v for k, v in found.items() if "attentions" in k or "resnets" in k}
    plain = {f"unet.{k}.lora_A.weight": v[0] for k, v in few.items()}
    plain |= {f"unet.{k}.lora_B.weight": v[1] for k, v in few.items()}
    save_file(plain, root / "files/plain.safetensors")
    np.savez(root / "inputs.npz", **{key: value.numpy() for key, value in given().items()})
    script = pathlib.Path(__file__).with_name("peft_reference.py")
    packages = pathlib.Path(sys.prefix) / "alone"
    subprocess.run([sys.executable, script, packages, root, "files"], check=True)
    return root, np.load(root / "outputs.npz"), found


@pytest.mark.parametrize("name", ["kohya", "plain", "dora"])
def test_every_layer_of_a_unet_is_updated_as_by_diffusers(made, name, tmp_path):
    """kohya: proj_in and proj_out, 3x3 (LoCon), resampling, time embedding, ends; own alphas."""
    root, outputs, _ = made
    module, params = load_unet(root / "unet")
    tree = load_lora(
        root / ("dora" if name == "dora" else f"files/{name}.safetensors"), {"unet": params}
    )
    found = output(module, merge(params, tree["unet"]))
    assert distance(found, outputs[name]) < TOLERANCE
    assert distance(output(module, params), outputs[name]) > 0.05
    save_lora(tmp_path / "again.safetensors", tree["unet"])
    again = load_lora(tmp_path / "again.safetensors", {"unet": params})["unet"]
    assert distance(output(module, merge(params, again)), outputs[name]) < TOLERANCE


def test_alphas_and_ranks_of_their_own(made):
    """By hand: Diffusers loses an attention's alpha where a file has several."""
    root, _, found = made
    module, params = load_unet(root / "unet")
    model = by_hand(UNet2DConditionModel.from_pretrained(root / "unet"), found)
    with torch.no_grad():
        wanted = model(**given()).sample.numpy()
    tree = load_lora(root / "mixed.safetensors", {"unet": params})["unet"]
    assert distance(output(module, merge(params, tree)), wanted) < TOLERANCE


def test_a_window_in_a_third_tensor_and_a_magnitude_beside(made, tmp_path):
    """LyCORIS' lora_mid and dora_scale, by hand: Diffusers reads neither."""
    root, _, _ = made
    module, params = load_unet(root / "unet")
    model = UNet2DConditionModel.from_pretrained(root / "unet").eval()
    name = "down_blocks.0.resnets.0.conv1"
    weight = dict(kernels(model))[name]
    out, width = weight.shape[:2]
    up, mid, down = (DRAW(0, 0.3, s).astype("f4") for s in ((out, 3), (3, 3, 3, 3), (3, width)))
    norm = (1 + DRAW(0, 0.1, (out, 1, 1, 1)) ** 2).astype("f4")
    with torch.no_grad():
        whole = weight.numpy() + np.einsum("or,rskl,si->oikl", up, mid, down) / 6
        whole *= norm / np.sqrt((whole**2).sum((1, 2, 3), keepdims=True))
        weight.copy_(torch.from_numpy(whole))
        wanted = model(**given()).sample.numpy()
    joined = "lora_unet_" + name.replace(".", "_")
    tensors = {"lora_up.weight": up[..., None, None], "lora_mid.weight": mid, "dora_scale": norm}
    tensors |= {"lora_down.weight": down[..., None, None], "alpha": np.float32([0.5])}
    save_file({f"{joined}.{k}": v for k, v in tensors.items()}, tmp_path / "x.safetensors")
    tree = load_lora(tmp_path / "x.safetensors", {"unet": params})["unet"]
    assert distance(output(module, merge(params, tree)), wanted) < TOLERANCE


TEXT_NAMES = {
    "lora_te_": None,
    "lora_te1_": None,
    "lora_te2_": None,
    "text_encoder.{}.lora_linear_layer.{}.weight": None,
    "text_encoder_2.{}.lora_linear_layer.{}.weight": None,
    "text_encoder.{}.lora_{}.weight": None,
    "text_encoder.{}_lora.{}.weight": ("_proj", ""),
}


@pytest.mark.parametrize("form", TEXT_NAMES)
def test_names_of_text_encoders(tmp_path, form):
    torch.manual_seed(1)
    model = CLIPTextModel(CLIPTextConfig(**TEXT))
    model.save_pretrained(tmp_path / "text")
    module, params = load_text_encoder(tmp_path / "text")
    found = updates(model)
    if "{}_lora" in form:  # Diffusers before 0.22 updated attention alone
        found = {k: v for k, v in found.items() if "self_attn" in k}
    if "{}" in form:
        found = {k: (a, b, np.float32(len(a))) for k, (a, b, _) in found.items()}
    prefixed = {"text_model." + k.removeprefix("text_model."): v for k, v in found.items()}
    if form.startswith("lora"):
        tensors = kohya(prefixed, form)
    else:
        ways = ("A", "B") if "lora_{}" in form else ("down", "up")
        tensors = {}
        for name, values in prefixed.items():
            if "{}_lora" in form:
                head, layer = name.rsplit(".", 1)
                name = f"{head}.to_{layer.removesuffix('_proj')}"
            tensors |= {form.format(name, way): v for way, v in zip(ways, values)}
    save_file(tensors, tmp_path / "x.safetensors")
    network = "text_encoder_2" if "2" in form else "text_encoder"
    tree = load_lora(tmp_path / "x.safetensors", {network: params})[network]
    tokens = torch.arange(14).reshape(2, 7)
    with torch.no_grad():
        wanted = by_hand(model, found)(tokens).last_hidden_state.numpy()
    ours = module.apply({"params": merge(params, tree)}, jnp.asarray(tokens.numpy()))
    assert distance(np.asarray(ours), wanted) < TOLERANCE
    assert (
        distance(np.asarray(module.apply({"params": params}, jnp.asarray(tokens.numpy()))), wanted)
        > 0.01
    )


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", (4, 4), "LoHa"),
        ("lora_unet_mid_block_attentions_0_proj_in.lokr_w1", (4, 4), "LoKr"),
        ("lora_unet_mid_block_attentions_0_proj_in.oft_blocks", (4, 4, 4), "OFT"),
        ("lora_unet_conv_in.diff_b", (16,), "biases"),
        ("unet.conv_in.lora_B.bias", (16,), "biases"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", (2, 24), "second text"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", (2, 24), "no place"),
        ("lora_unet_conv_in.dora_scale", (1, 4, 1, 1), "wd_on_output"),
        ("lora_unet_conv_in.lora_down.weight", (2, 4, 1, 1), "window"),
        ("lora_unet_conv_in.lora_mid.weight", (2, 3, 3, 3), "lora_mid"),
    ],
)
def test_what_is_not_read_is_named(made, tmp_path, name, shape, words):
    root, _, found = made
    _, params = load_unet(root / "unet")
    tensors = kohya({"conv_in": found["conv_in"]}, "lora_unet_") | {name: np.ones(shape, "f4")}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=words) as caught:
        load_lora(tmp_path / "x.safetensors", {"unet": params})
    assert "x.safetensors" in str(caught.value)


ONE = {"unet": {"mid_attn": {"proj_in": {"kernel": np.zeros((8, 8), "f4")}}}}
PLACE = "mid_block.attentions.0.proj_in"
HALVES = DRAW(size=(2, 8)).astype("f4"), DRAW(size=(8, 2)).astype("f4")
ENDS = ("lora_A.weight", "lora_B.weight")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("name", ["x.safetensors", "pytorch_lora_weights.bin"])
def test_a_layer_as_it_is_stored(tmp_path, dtype, name):
    """By the values that torch reads of it; a folder's .bin is Diffusers' from before 0.18."""
    halves = [torch.from_numpy(half).to(getattr(torch, dtype)) for half in HALVES]
    tensors = {f"unet.{PLACE}.{end}": half for end, half in zip(ENDS, halves)}
    if name.endswith(".bin"):
        torch.save(tensors, tmp_path / name)
    else:
        torch_save_file(tensors, tmp_path / name)
    found = load_lora(tmp_path if name.endswith(".bin") else tmp_path / name, ONE)
    pair = found["unet"]["mid_attn"]["proj_in"]
    for ours, theirs in zip((pair["down"], pair["up"]), halves):
        np.testing.assert_array_equal(ours, theirs.float().numpy().T)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"unet.{PLACE}.lora_A.weight"), "without the lora_A"),
        (lambda t: t.update({f"unet.{PLACE}.alpha": np.float32([np.nan])}), "not finite"),
        (lambda t: t.update({f"unet.{PLACE}.alpha": np.ones(3, "f4")}), "3 values, not one"),
        (lambda t: t.update({f"unet.{PLACE}.lora_B.weight": HALVES[1] * np.nan}), "not finite"),
        (lambda t: t.update({f"{PLACE}.{e}": h for e, h in zip(ENDS, HALVES)}), "leave one"),
        (lambda t: t.update({"base_model.model.x.lora_A.weight": HALVES[0]}), "adapter_config"),
        (lambda t: t.update({"bundle_emb.cat.emb": HALVES[0]}), "--embedding"),
        (lambda t: t.update({"lora_te2_text_projection.alpha": HALVES[0]}), "text projection"),
        (lambda t: t.update({f"unet.{PLACE}.on_input": HALVES[0]}), "IA3"),
    ],
)
def test_a_file_that_says_it_twice_or_by_half_is_named(tmp_path, change, words):
    tensors = {f"unet.{PLACE}.{end}": half for end, half in zip(ENDS, HALVES)}
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=words) as caught:
        load_lora(tmp_path / "x.safetensors", ONE)
    assert "x.safetensors" in str(caught.value)


def test_a_broken_pattern_of_alphas_is_named(tmp_path):
    tensors = {f"unet.{PLACE}.{end}": half for end, half in zip(ENDS, HALVES)}
    said = json.dumps({"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 3}})
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": said})
    with pytest.raises(ValueError, match=r"x\.safetensors: .*broken alpha_pattern"):
        load_lora(tmp_path / "x.safetensors", ONE)
