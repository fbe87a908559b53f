"""U-Nets against Diffusers, live: outputs, input gradients, and directories both ways."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.interop import load_unet, save_unet
from diffusion.models.unet import UNet

with warnings.catch_warnings():
    # On import torch and diffusers warn of their own deprecations.
    warnings.simplefilter("ignore")
    import diffusers
    import torch
    from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel, UNet2DModel
    from safetensors.torch import load_file, save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"
D, A, U, B = "DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"
CD, CU = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
DDPM = {"norm_eps": 1e-6, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1}

# google/ddpm-cifar10-32's config.json.
CIFAR10 = DDPM | {
    "attention_head_dim": None,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": (D, A, D, D),
    "up_block_types": (U, U, B, U),
    "sample_size": 32,
}
# Name: (config, input shape). Each differs in widths, levels, places of attention, groups, padding,
# embedding or size.
PLAIN = {
    "ddpm_cifar10": (CIFAR10, (1, 3, 32, 32)),
    "ddpm_narrow": (
        CIFAR10
        | {
            "block_out_channels": (32, 64, 64, 64),
            "norm_num_groups": 16,
            "layers_per_block": 1,
        },
        (2, 3, 16, 24),
    ),
    "ldm_celebahq": (
        {
            "block_out_channels": (32, 64, 96),
            "down_block_types": (D, A, A),
            "up_block_types": (B, B, U),
            "attention_head_dim": 16,
            "layers_per_block": 1,
        },
        (2, 3, 8, 16),
    ),
    "adm": (
        {
            "block_out_channels": (16, 32, 48),
            "down_block_types": ("ResnetDownsampleBlock2D", A, A),
            "up_block_types": (B, B, "ResnetUpsampleBlock2D"),
            "layers_per_block": 1,
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "resnet_time_scale_shift": "scale_shift",
            "attn_norm_num_groups": 8,
            "norm_num_groups": 8,
            "num_class_embeds": 7,
            "out_channels": 6,
        },
        (2, 3, 16, 8),
    ),
    "two_levels_odd_widths": (
        DDPM
        | {
            "block_out_channels": (20, 35),
            "down_block_types": (A, D),
            "up_block_types": (U, B),
            "norm_num_groups": 5,
            "layers_per_block": 1,
            "attention_head_dim": 5,
            "in_channels": 5,
            "out_channels": 2,
            "norm_eps": 0.1,
        },
        (2, 5, 6, 10),
    ),
    "one_level": (
        {
            "block_out_channels": (24,),
            "down_block_types": (A,),
            "up_block_types": (B,),
            "norm_num_groups": 4,
            "layers_per_block": 2,
            "in_channels": 1,
            "out_channels": 1,
            "freq_shift": 1,
        },
        (3, 1, 5, 7),
    ),
    "no_attention": (
        {
            "block_out_channels": (16, 32, 48),
            "down_block_types": (D, D, D),
            "up_block_types": (U, U, U),
            "norm_num_groups": 16,
            "downsample_padding": 0,
            "add_attention": False,
            "layers_per_block": 1,
        },
        (1, 3, 12, 4),
    ),
}
SD = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": (CD, CD, D),
    "up_block_types": (U, CU, CU),
    "norm_num_groups": 16,
    "layers_per_block": 1,
}
CONDITIONAL = {
    "sd1": (SD | {"attention_head_dim": 4, "cross_attention_dim": 24}, (2, 4, 16, 8)),
    "sd2": (
        SD
        | {
            "attention_head_dim": (2, 4, 4),
            "cross_attention_dim": 40,
            "use_linear_projection": True,
            "time_cond_proj_dim": 16,  # as latent consistency models have
        },
        (2, 4, 8, 8),
    ),
    "sd_inpainting": (
        SD | {"attention_head_dim": 8, "cross_attention_dim": 16, "in_channels": 9},
        (1, 9, 8, 12),
    ),
    "deep_transformers": (
        SD
        | {
            "attention_head_dim": (2, 4, 8),
            "cross_attention_dim": 24,
            "transformer_layers_per_block": (1, 2, 2),
            "layers_per_block": (1, 2, 1),
            "resnet_time_scale_shift": "scale_shift",
            "num_class_embeds": 5,
            "downsample_padding": 0,
        },
        (2, 4, 8, 8),
    ),
}
CASES = {**PLAIN, **CONDITIONAL}
GUIDANCE = (1.0, 0.5)  # weights, told to those with time_cond_proj_dim; 1000 of them, as times


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """Diffusers talks through its logger; parity needs full precision of our products."""
    diffusers.utils.logging.set_verbosity_error()
    with jax.default_matmul_precision("highest"):
        yield


def reference(name: str):
    """Diffusers' model of a case with every parameter random: norms and zero layers too."""
    config, _ = CASES[name]
    torch.manual_seed(0)
    kind = UNet2DConditionModel if name in CONDITIONAL else UNet2DModel
    model = kind(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model


def inputs(name: str) -> dict:
    """Random torch inputs, by the names of Diffusers' forward."""
    config, shape = CASES[name]
    generator = torch.Generator().manual_seed(1)
    found = {
        "sample": torch.randn(shape, generator=generator, requires_grad=True),
        "timestep": torch.tensor([999, 3, 500][: shape[0]]),
    }
    if "num_class_embeds" in config:
        found["class_labels"] = torch.tensor([4, 0][: shape[0]])
    if width := config.get("time_cond_proj_dim"):
        embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
        found["timestep_cond"] = embed(None, torch.tensor(GUIDANCE), width)
    if name in CONDITIONAL:
        size = (shape[0], 7, config["cross_attention_dim"])
        found["encoder_hidden_states"] = torch.randn(size, generator=generator)
        mask = torch.arange(7)[None] < torch.tensor([[5], [7]][: shape[0]])
        found["encoder_attention_mask"] = mask
    return found


def ours(module: UNet, params, given: dict):
    """(output, input gradient of the sum of output * cosine), both channels first."""
    arrays = {k: jnp.asarray(v.detach().numpy()) for k, v in given.items()}
    x = jnp.moveaxis(arrays["sample"], 1, -1)

    def apply(x):
        return module.apply(
            {"params": params},
            x,
            arrays["timestep"],
            context=arrays.get("encoder_hidden_states"),
            context_mask=arrays.get("encoder_attention_mask"),
            labels=arrays.get("class_labels"),
            guidance=jnp.asarray(GUIDANCE) if "timestep_cond" in arrays else None,
        )

    @jax.jit
    def both(x):
        y, pullback = jax.vjp(apply, x)
        return y, pullback(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))[0]

    y, gradient = both(x)
    return np.moveaxis(np.asarray(y), -1, 1), np.moveaxis(np.asarray(gradient), -1, 1)


def theirs(model, given: dict):
    y = model(**given).sample
    last = torch.arange(y.numel(), dtype=y.dtype).reshape(y.permute(0, 2, 3, 1).shape)
    (y * torch.cos(last).permute(0, 3, 1, 2)).sum().backward()
    return y.detach().numpy(), given["sample"].grad.numpy()


def distance(a, b) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(name, Diffusers' model, the directory it saved, our module and parameters from there)."""
    model, directory = reference(request.param), tmp_path_factory.mktemp("theirs")
    model.save_pretrained(directory)
    return request.param, model, directory, *load_unet(directory)


def test_output_and_input_gradient_equal_diffusers(case):
    name, model, _, module, params = case
    given = inputs(name)
    expected, expected_gradient = theirs(model, given)
    output, gradient = ours(module, params, given)
    print(name, distance(output, expected), distance(gradient, expected_gradient))
    assert distance(output, expected) < 1e-5
    assert distance(gradient, expected_gradient) < 1e-4


def test_diffusers_loads_what_we_save(case, tmp_path):
    name, model, directory, module, params = case
    given = inputs(name)
    save_unet(tmp_path, module, params)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        output, expected = again(**given).sample, model(**given).sample
    # The same weights, tensor for tensor; but torch's threads may add in another order.
    assert distance(output.numpy(), expected.numpy()) < 1e-6
    first, second = (load_file(side / WEIGHTS) for side in (directory, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_old_attention_names_shards_and_half_precision_load_the_same(tmp_path):
    """As published before Diffusers 0.11 (query, key, value, proj_attn), in bfloat16 shards."""
    model = reference("ldm_celebahq").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "new")
    module, params = load_unet(tmp_path / "new")
    old = {}
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for key, tensor in model.state_dict().items():
        for now, before in names.items():
            key = key.replace(f".{now}.", f".{before}.")
        old[key] = tensor.contiguous()
    assert any("proj_attn" in key for key in old)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_bytes((tmp_path / "new/config.json").read_bytes())
    shards = {key: f"part-{i % 2}.safetensors" for i, key in enumerate(old)}
    for shard in set(shards.values()):
        save_file({k: v for k, v in old.items() if shards[k] == shard}, tmp_path / "old" / shard)
    index = tmp_path / "old" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    same, old_params = load_unet(tmp_path / "old")
    assert same == module
    jax.tree.map(np.testing.assert_array_equal, params, old_params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(old_params))
    (tmp_path / "old" / "part-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"part-1\.safetensors is missing"):
        load_unet(tmp_path / "old")


@pytest.fixture
def saved(tmp_path):
    """A directory of Diffusers' to be spoilt."""
    reference("no_attention").save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


def spoil_weights(directory, change):
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def spoil_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


SPOILT = {
    "truncated": (
        lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-100]),
        r"diffusion_pytorch_model\.safetensors is truncated",
    ),
    "missing": (lambda d: (d / WEIGHTS).unlink(), r"model\.safetensors is missing"),
    "pickle": (
        lambda d: (d / WEIGHTS).rename(d / "diffusion_pytorch_model.bin"),
        r"diffusion_pytorch_model\.bin is truncated, corrupt or no weights of PyTorch",
    ),
    "no_tensor": (
        lambda d: spoil_weights(d, lambda t: t.pop("conv_in.bias")),
        r"unet has no tensor conv_in\.bias",
    ),
    "extra_tensor": (
        lambda d: spoil_weights(d, lambda t: t.update(extra=torch.zeros(1))),
        r"model\.safetensors holds extra",
    ),
    "shape": (
        lambda d: spoil_weights(d, lambda t: t.update({"conv_in.bias": torch.zeros(3)})),
        r"model\.safetensors: conv_in\.bias has shape \(3,\), but the config needs \(16,\)",
    ),
    "no_config": (lambda d: (d / "config.json").unlink(), r"config\.json is missing"),
    "half_config": (lambda d: (d / "config.json").write_text('{"a'), r"config\.json is not valid"),
    "class": (lambda d: spoil_config(d, _class_name="VQModel"), "describes a VQModel"),
    "activation": (lambda d: spoil_config(d, act_fn="mish"), r"config\.json: act_fn='mish'"),
    "block": (lambda d: spoil_config(d, down_block_types=[D, D, "Odd"]), "block type Odd"),
    "not_mirrored": (lambda d: spoil_config(d, down_block_types=[A, D, D]), "mirrored"),
    "cross": (
        lambda d: spoil_config(d, down_block_types=[CD, D, D], up_block_types=[U, U, CU]),
        "only self-attention",
    ),
    "middle": (lambda d: spoil_config(d, mid_block_type=None), "mid_block_type=None"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_directory_is_a_sentence_naming_the_file(fault, saved):
    spoil, message = SPOILT[fault]
    spoil(saved)
    with pytest.raises(ValueError, match=message) as error:
        load_unet(saved)
    assert "\n" not in str(error.value)


INEXPRESSIBLE = {
    "pool_context": UNet(
        channels=8, multipliers=(1,), attention=(True,), groups=2, pool_context=True
    ),
    "multipliers": UNet(channels=8, multipliers=(2,), attention=(False,), groups=2),
    "heads": UNet(channels=8, multipliers=(1, 2), attention=(True, True), groups=2, heads=2),
    "spatial axes": UNet(channels=8, multipliers=(1,), attention=(False,), groups=2),
}


@pytest.mark.parametrize("key", INEXPRESSIBLE)
def test_what_diffusers_cannot_express_is_refused_and_not_written(key, tmp_path):
    module, rank = INEXPRESSIBLE[key], 1 if key == "spatial axes" else 2
    x, context = jnp.zeros((1, *(8,) * rank, 3)), jnp.zeros((1, 2, 4))
    params = jax.eval_shape(module.init, jax.random.key(0), x, jnp.zeros(1), context)["params"]
    with pytest.raises(ValueError, match=f"{key}=.*cannot be written for Diffusers"):
        save_unet(tmp_path / "unet", module, params)
    assert not list(tmp_path.iterdir())


def test_saving_replaces_our_own_directory_and_no_other(tmp_path):
    module = UNet(channels=8, multipliers=(1,), attention=(False,), groups=2)
    init = jax.jit(module.init)
    params = init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1))["params"]
    save_unet(tmp_path / "unet", module, params, sample_size=8)
    save_unet(tmp_path / "unet", module, jax.tree.map(jnp.zeros_like, params), sample_size=8)
    _, zeros = load_unet(tmp_path / "unet")
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(zeros))
    assert json.loads((tmp_path / "unet/config.json").read_text())["sample_size"] == 8
    (tmp_path / "unet/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        save_unet(tmp_path / "unet", module, params)
    assert [p.name for p in tmp_path.iterdir()] == ["unet"]
