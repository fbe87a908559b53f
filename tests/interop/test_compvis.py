"""CompVis's first-stage files against Diffusers' layout of the same random weights."""

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusion.interop.autoencoder import save_autoencoder
from diffusion.interop.compvis import load_compvis_autoencoder, to_compvis_tensors
from diffusion.models.autoencoder import AutoencoderKL, VQModel

SMALL = {"channels": 32, "multipliers": (1, 2, 2), "blocks": 1, "attention": (False, False, True)}
MODULES = {
    "kl": AutoencoderKL(z_channels=4, **SMALL),
    "kl_two_sizes": AutoencoderKL(z_channels=4, embed_channels=3, **SMALL),
    "vq": VQModel(num_codes=12, z_channels=3, **SMALL),
    "vq_noattn": VQModel(
        num_codes=12, channels=32, multipliers=(1, 2), blocks=2, mid_attention=False
    ),
}
LAYERS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}


def drawn(module):
    """Random parameters without running anything: no value of one layer is another's."""
    size = module.downsampling
    image = np.zeros((1, size, size, 3), np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.numpy.asarray(image))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)


def compvis_name(name, levels):
    """Diffusers' name of a tensor to CompVis's: the published conversion, written the other way
    (huggingface/diffusers: scripts/convert_vae_pt_to_diffusers.py)."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    parts = name.split(".")
    if parts[1] == "mid_block":
        kind, index = parts[2], int(parts[3])
        which = f"block_{index + 1}" if kind == "resnets" else "attn_1"
        parts[1:4] = ["mid", which]
    elif parts[1] in ("down_blocks", "up_blocks"):
        way, level = parts[1].split("_")[0], int(parts[2])
        level = level if way == "down" else levels - 1 - level
        kinds = {"resnets": "block", "attentions": "attn"}
        if parts[3] in kinds:
            parts[1:4] = [way, str(level), kinds[parts[3]]]
        else:  # downsamplers.0.conv
            parts[1:5] = [way, str(level), f"{way}sample"]
    name = ".".join(parts)
    for theirs, ours in LAYERS.items():
        name = name.replace(f".{theirs}.", f".{ours}.")
    return name


def compvis_file(module, params, tmp_path):
    """The same weights as Diffusers has them, renamed, attention as 1x1 convolutions."""
    from safetensors.torch import load_file

    save_autoencoder(tmp_path / "diffusers", module, params)
    tensors = load_file(tmp_path / "diffusers" / "diffusion_pytorch_model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        new = compvis_name(name, len(module.multipliers))
        layer = new.split(".")[-2]
        attention = layer in ("q", "k", "v", "proj_out") and new.endswith("weight")
        renamed[new] = tensor[..., None, None].clone() if attention else tensor
    return renamed


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("case", ["kl", "vq", "vq_noattn"])
def test_a_file_of_latent_diffusion_is_read(case, tmp_path):
    module = MODULES[case]
    params = drawn(module)
    tensors = compvis_file(module, params, tmp_path)
    whole = {
        "epoch": 3,
        "state_dict": {f"first_stage_model.{name}": t for name, t in tensors.items()}
        | {
            "first_stage_model.loss.logvar": torch.zeros(()),
            "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(2, 2),
            "model.diffusion_model.time_embed.0.weight": torch.zeros(2, 2),
            "model_ema.decay": torch.zeros(()),
        },
    }
    torch.save(whole, tmp_path / "model.ckpt")
    found, loaded = load_compvis_autoencoder(tmp_path / "model.ckpt")
    equal(loaded, params)
    fields = ("channels", "multipliers", "blocks", "mid_attention", "z_channels", "downsampling")
    assert all(getattr(found, f) == getattr(module, f) for f in fields)
    attention = module.attention or (False,) * len(module.multipliers)
    assert type(found) is type(module) and found.attention == attention


def test_a_file_of_a_first_stage_alone_is_read_and_round_trips(tmp_path):
    """No prefix, as first-stage training saves it; safetensors as well."""
    module = MODULES["kl_two_sizes"]
    params = drawn(module)
    tensors = {k: torch.from_numpy(v) for k, v in to_compvis_tensors(module, params).items()}
    torch.save({"state_dict": tensors}, tmp_path / "model.ckpt")
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "model.safetensors")
    for name in ("model.ckpt", "model.safetensors"):
        found, loaded = load_compvis_autoencoder(tmp_path / name)
        equal(loaded, params)
        assert (found.z_channels, found.latent_channels) == (4, 3)
    again = to_compvis_tensors(found, loaded)
    assert again.keys() == tensors.keys()
    assert again["decoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)


def test_names_are_those_of_the_published_conversion(tmp_path):
    module = MODULES["kl"]
    params = drawn(module)
    wanted, found = compvis_file(module, params, tmp_path), to_compvis_tensors(module, params)
    assert found.keys() == wanted.keys()
    assert {"encoder.down.0.block.0.norm1.weight", "decoder.up.2.upsample.conv.bias"} <= set(found)
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)


def test_what_is_no_first_stage_is_refused(tmp_path):
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"model\.ckpt holds no first stage"):
        load_compvis_autoencoder(tmp_path / "model.ckpt")
    module = MODULES["kl"]
    arrays = to_compvis_tensors(module, drawn(module))
    tensors = {k: torch.from_numpy(v) for k, v in arrays.items()}
    del tensors["decoder.up.0.block.0.conv1.weight"]
    torch.save(tensors, tmp_path / "short.ckpt")
    with pytest.raises(ValueError, match=r"no tensor decoder\.up\.0\.block\.0\.conv1\.weight"):
        load_compvis_autoencoder(tmp_path / "short.ckpt")
    tensors["post_quant_conv.weight"] = torch.zeros(())
    torch.save(tensors, tmp_path / "odd.ckpt")
    with pytest.raises(ValueError, match=r"odd\.ckpt holds a first stage that is not LDM's"):
        load_compvis_autoencoder(tmp_path / "odd.ckpt")
