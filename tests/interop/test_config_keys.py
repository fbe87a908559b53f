"""Every key of every network's config is read, of no effect, or refused by its name."""

import inspect
import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffusion.interop import (
    autoencoder,
    controlnet,
    load_autoencoder,
    load_text_encoder,
    load_unet,
    save_text_encoder,
    unet_config,
)
from experiments.convert import reading, single

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel, UNet2DModel, VQModel
    from transformers import CLIPTextConfig, CLIPTextModel

UNET_KEYS = unet_config.SUPPORTED.keys() | unet_config.CONDITIONAL_DEFAULTS.keys()
UNET_KEYS |= unet_config.OTHERS
CONTROL_KEYS = UNET_KEYS | controlnet.SUPPORTED.keys() | {"conditioning_embedding_out_channels"}
FIRST_KEYS = autoencoder.SUPPORTED.keys() | autoencoder.OTHERS
SMALL = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
UNET = SMALL | {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
UNET |= {"attention_head_dim": 4}
KINDS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
FIRST = SMALL | KINDS


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        (UNet2DModel, UNET_KEYS),
        (UNet2DConditionModel, UNET_KEYS),
        (ControlNetModel, CONTROL_KEYS),
        (AutoencoderKL, FIRST_KEYS),
        (VQModel, FIRST_KEYS),
    ],
)
def test_every_key_that_diffusers_has_is_in_a_table(model, keys):
    theirs = inspect.signature(model.__init__).parameters.keys() - {"self"}
    assert theirs - keys == set()


CHANGES = [
    (UNet2DModel, {"num_class_embeds": 7, "class_embed_type": "timestep"}, "class_embed_type"),
    (UNet2DModel, {"sample_size": (8, 16)}, None),
    (UNet2DModel, {"time_embedding_type": "fourier"}, "time_embedding_type"),
    (UNet2DModel, {"a_new_key": 3}, "a_new_key"),
    (AutoencoderKL, {"latents_mean": [0.0] * 4}, "latents_mean"),
    (AutoencoderKL, {"latents_std": [1.0] * 4}, "latents_std"),
    (AutoencoderKL, {"sample_size": (8, 16), "force_upcast": False, "shift_factor": 0.1}, None),
    (AutoencoderKL, {"use_quant_conv": False}, "use_post_quant_conv"),
    (AutoencoderKL, {"a_new_key": 3}, "a_new_key"),
    (VQModel, {"lookup_from_codebook": True}, "lookup_from_codebook"),
]


@pytest.mark.parametrize(("model", "change", "named"), CHANGES)
def test_a_key_is_honoured_or_named(tmp_path, model, change, named):
    model(**(UNET if model is UNet2DModel else FIRST)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    load = load_unet if model is UNet2DModel else load_autoencoder
    if named is None:
        load(tmp_path)
    else:
        with pytest.raises(ValueError, match=named):
            load(tmp_path)


@pytest.mark.parametrize("inner", [37, 50, 96])
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_text_encoders_of_any_inner_width(tmp_path, inner, act):
    torch.manual_seed(0)
    size = {"vocab_size": 99, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"intermediate_size": inner, "hidden_act": act, "layer_norm_eps": 1e-3}
    model = CLIPTextModel(CLIPTextConfig(**size, **more, projection_dim=5)).eval()
    model.save_pretrained(tmp_path / "theirs")
    module, params = load_text_encoder(tmp_path / "theirs")
    tokens = np.arange(14).reshape(2, 7)
    with torch.no_grad():
        wanted = model(torch.from_numpy(tokens)).last_hidden_state.numpy()
    found = np.asarray(module.apply({"params": params}, jnp.asarray(tokens)))
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)
    save_text_encoder(tmp_path / "ours", module, params)
    back = CLIPTextModel.from_pretrained(tmp_path / "ours").config
    assert (back.intermediate_size, back.hidden_act, back.layer_norm_eps) == (inner, act, 1e-3)


def test_an_inner_width_is_met_for_every_pair():
    from diffusion.interop.text_encoder import multiple

    for width in range(1, 200):
        assert all(int(width * multiple(n, width)) == n for n in range(1, 800, 7))


@pytest.mark.parametrize(
    ("size", "wanted"), [(64, 64), ([64, 64], 64), ([64, 96], (64, 96)), ([1, 2, 3], None)]
)
def test_sample_sizes_of_two_numbers(tmp_path, size, wanted):
    if wanted is not None:
        assert reading._side(size, tmp_path) == wanted
    else:
        with pytest.raises(ValueError, match=r"sample_size=\[1, 2, 3\]"):
            reading._side(size, tmp_path)


V2, V1 = 1024, 768
SPEC = "modelspec."


@pytest.mark.parametrize(
    ("width", "header", "mark", "wanted"),
    [
        (V2, {"prediction_type": "epsilon", "resolution": "512x512"}, None, ("eps", 512)),
        (V2, {"prediction_type": "epsilon"}, None, ("eps", 512)),
        (V2, {"prediction_type": "v", "resolution": "768x768"}, None, ("v", 768)),
        (V2, {}, "v_pred", ("v", 768)),
        (V2, {"resolution": "512x512"}, None, "2-base"),
        (V2, {}, None, "2-base"),
        (V1, {}, None, ("eps", 512)),
        (V1, {"prediction_type": "v"}, None, ("v", 512)),
        (V1, {"resolution": "640x640"}, None, ("eps", 640)),
        (V1, {}, "ztsnr", "ztsnr"),
        (V1, {"prediction_type": "flow"}, None, "flow"),
    ],
)
def test_what_a_single_file_says_of_itself(tmp_path, width, header, mark, wanted):
    prefix = "model.diffusion_model."
    tensors = {prefix + "input_blocks.0.0.weight": np.zeros((320, 4, 3, 3), "f4")}
    tensors[prefix + "x.attn2.to_k.weight"] = np.zeros((320, width), "f4")
    tensors |= {mark: np.zeros(0, "f4")} if mark else {}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, {SPEC + k: v for k, v in header.items()} or None)
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted) as caught:
            single._guess(tensors, path)
        assert "--config=" in str(caught.value)
    else:
        config = single._guess(tensors, path)
        assert (config.process.prediction, config.data.image_size) == wanted
