"""First stages against Diffusers, live, every parameter random; and round trips both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TorchKL
from diffusers import VQModel as TorchVQ
from safetensors.numpy import load_file, save_file

from diffusion.interop.autoencoder import load_autoencoder, load_scaling, save_autoencoder
from diffusion.models.autoencoder import AutoencoderKL, VQModel

TOLERANCE = 1e-5
WEIGHTS = "diffusion_pytorch_model.safetensors"

PLAIN = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
}
ATTENTIVE = PLAIN | {
    "block_out_channels": (8, 8, 16),
    "down_block_types": (
        "DownEncoderBlock2D",
        "AttnDownEncoderBlock2D",
        "AttnDownEncoderBlock2D",
    ),
    "up_block_types": ("AttnUpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "layers_per_block": 2,
}

CASES = {
    "kl": (TorchKL, PLAIN | {"latent_channels": 3, "scaling_factor": 0.5}),
    "kl_attention": (TorchKL, ATTENTIVE | {"latent_channels": 4}),
    "kl_bare": (
        TorchKL,
        PLAIN
        | {
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": False,
            "in_channels": 1,
            "out_channels": 1,
        },
    ),
    "vq": (TorchVQ, PLAIN | {"num_vq_embeddings": 32, "latent_channels": 3}),
    "vq_attention": (
        TorchVQ,
        ATTENTIVE | {"num_vq_embeddings": 16, "vq_embed_dim": 2, "latent_channels": 5},
    ),
}


def build(case):
    """Diffusers' model with every parameter redrawn, so that none is 0 or 1."""
    return redraw(*CASES[case])


def redraw(cls, config):
    model = cls(**config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
        if cls is TorchVQ:
            model.quantize.embedding.weight.mul_(3)
    return model


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(Diffusers' model, our module, our parameters, the directory)."""
    model, directory = build(request.param), tmp_path_factory.mktemp("theirs")
    model.save_pretrained(directory)
    return model, *load_autoencoder(directory), directory


def error(ours, theirs):
    theirs = theirs.detach().numpy()
    theirs = np.moveaxis(theirs, 1, -1) if theirs.ndim == 4 else theirs
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def image(module, seed=0):
    shape = (2, 3 * module.downsampling, 4 * module.downsampling, module.image_channels)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def to_torch(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def encode(module, params, x):
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode"))(params, x)


def decode(module, params, z):
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda p, z: module.apply({"params": p}, z, method="decode"))(params, z)


def test_encoder_and_decoder_match_diffusers(pair):
    model, module, params, _ = pair
    x = image(module)
    ours = encode(module, params, x)
    with torch.no_grad():
        theirs = model.encode(to_torch(x))
        z = np.random.default_rng(2).standard_normal(ours.mean.shape).astype(np.float32)
        decoded = model.decode(to_torch(z)).sample
    if isinstance(module, AutoencoderKL):
        assert error(ours.mean, theirs.latent_dist.mean) < TOLERANCE
        assert error(ours.std, theirs.latent_dist.std) < TOLERANCE
        assert error(ours.kl(), theirs.latent_dist.kl()) < TOLERANCE
    else:
        assert error(ours.mean, theirs.latents) < TOLERANCE
    assert error(decode(module, params, z), decoded) < TOLERANCE


def test_quantiser_matches_diffusers(tmp_path):
    model = build("vq")
    model.save_pretrained(tmp_path)
    module, params = load_autoencoder(tmp_path)
    z = jnp.asarray(np.random.default_rng(3).standard_normal((2, 5, 6, 3)), jnp.float32)
    ours = module.apply({"params": params}, z, method="quantize")
    codes, loss, (_, _, indices) = model.quantize(to_torch(z))
    assert len(np.unique(ours.indices)) > 10
    np.testing.assert_array_equal(np.ravel(ours.indices), indices)
    assert error(ours.codes, codes) < TOLERANCE
    np.testing.assert_allclose(ours.loss.mean(), loss.item(), rtol=TOLERANCE)


def test_quantiser_gradients_match_diffusers(tmp_path):
    """The two weights of the loss are on the terms that `legacy` puts them on."""
    model = build("vq")
    model.save_pretrained(tmp_path)
    module, params = load_autoencoder(tmp_path)
    z = jnp.asarray(np.random.default_rng(3).standard_normal((2, 5, 6, 3)), jnp.float32)

    def loss(params, z):
        return module.apply({"params": params}, z, method="quantize").loss.mean()

    grad_params, grad_z = jax.grad(loss, argnums=(0, 1))(params, z)
    theirs = to_torch(z).requires_grad_()
    model.quantize(theirs)[1].backward()
    codebook = model.quantize.embedding.weight.grad
    assert error(grad_z, theirs.grad) < TOLERANCE
    assert error(grad_params["codebook"]["embedding"], codebook) < TOLERANCE


def test_what_is_saved_again_is_equal_tensor_for_tensor(pair, tmp_path):
    _, module, params, directory = pair
    save_autoencoder(tmp_path / "ours", module, params, load_scaling(directory), 16)
    theirs, ours = load_file(directory / WEIGHTS), load_file(tmp_path / "ours" / WEIGHTS)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


def test_diffusers_loads_what_is_saved(pair, tmp_path):
    model, module, params, directory = pair
    save_autoencoder(tmp_path / "ours", module, params, load_scaling(directory), 16)
    loaded = type(model).from_pretrained(tmp_path / "ours")
    for key in CASES["kl"][1].keys() - {"down_block_types", "up_block_types"}:
        written, value = (getattr(m.config, key) for m in (loaded, model))
        assert (tuple(written) if isinstance(written, list) else written) == value, key
    x = to_torch(image(module))
    with torch.no_grad():
        ours, theirs = loaded(x).sample, model(x).sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_fresh_parameters_load_in_diffusers(tmp_path):
    """A module that was built here, not loaded, and its parameters."""
    module = VQModel(
        channels=8, multipliers=(1, 2), blocks=1, attention=(False, True), groups=4, num_codes=8
    )
    params = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 4, 4, 3), np.float32))["params"]
    save_autoencoder(tmp_path / "ours", module, params)
    x = image(module)
    with torch.no_grad():
        theirs = TorchVQ.from_pretrained(tmp_path / "ours").encode(to_torch(x)).latents
    assert error(encode(module, params, x).mean, theirs) < TOLERANCE
    again, _ = load_autoencoder(tmp_path / "ours")
    assert again == module


def test_old_attention_names_load(tmp_path):
    """Files from before Diffusers 0.11 say query, key, value and proj_attn."""
    model = build("kl")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name in [n for n in tensors if "attentions" in n and ".to_" in n]:
        old = name
        for now, before in new.items():
            old = old.replace(f".{now}.", f".{before}.")
        tensors[old] = tensors.pop(name)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    module, params = load_autoencoder(tmp_path)
    x = image(module)
    with torch.no_grad():
        theirs = model.encode(to_torch(x)).latent_dist.mean
    assert error(encode(module, params, x).mean, theirs) < TOLERANCE


def test_scaling_is_read(tmp_path):
    build("kl").save_pretrained(tmp_path)
    assert load_scaling(tmp_path) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderDC"}, "AutoencoderDC"),
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"out_channels": 1}, "out_channels=1"),
        ({"use_post_quant_conv": False}, "use_post_quant_conv=False"),
        ({"block_out_channels": [8, 12]}, "block_out_channels"),
        ({"down_block_types": ["DownBlock2D"] * 2}, "down_block_types"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "different"),
        ({"latent_channels": 7}, "latent_channels|quant_conv|shape"),
        ({"layers_per_block": 2}, "resnets"),
    ],
)
def test_another_architecture_is_refused(tmp_path, change, message):
    build("kl").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (AutoencoderKL(channels=8, multipliers=(1,), blocks=1, groups=4, patch=2), "patch=2"),
        (
            AutoencoderKL(channels=8, multipliers=(1,), blocks=1, groups=4, embed_channels=2),
            "embed_channels=2",
        ),
        (
            VQModel(
                channels=8, multipliers=(1,), blocks=1, groups=4, num_codes=4, use_quant_conv=False
            ),
            "use_quant_conv=False",
        ),
    ],
)
def test_what_diffusers_cannot_hold_is_not_written(tmp_path, module, message):
    params = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 4, 4, 3), np.float32))["params"]
    with pytest.raises(ValueError, match=message):
        save_autoencoder(tmp_path / "ours", module, params)
    assert not (tmp_path / "ours").exists()


def test_a_first_stage_of_audio_is_not_written(tmp_path):
    module = AutoencoderKL(channels=8, multipliers=(1,), blocks=1, groups=4)
    params = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 4, 3), np.float32))["params"]
    with pytest.raises(ValueError, match="spatial axes=1"):
        save_autoencoder(tmp_path / "ours", module, params)


@pytest.mark.slow
def test_first_stage_of_stable_diffusion_1_at_full_width(tmp_path):
    published = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    }
    model = redraw(TorchKL, published)
    model.save_pretrained(tmp_path)
    module, params = load_autoencoder(tmp_path)
    assert sum(p.size for p in jax.tree.leaves(params)) == 83_653_863
    x = image(module)
    with torch.no_grad():
        theirs = model.encode(to_torch(x)).latent_dist
        decoded = model.decode(theirs.mean).sample
    ours = encode(module, params, x)
    assert error(ours.mean, theirs.mean) < TOLERANCE
    assert error(ours.std, theirs.std) < TOLERANCE
    z = np.ascontiguousarray(np.moveaxis(theirs.mean.numpy(), 1, -1))
    assert error(decode(module, params, z), decoded) < TOLERANCE
