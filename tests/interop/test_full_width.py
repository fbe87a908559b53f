"""Stable Diffusion 1's U-Net at its full width against Diffusers, in float32 on the CPU.

    pytest -m slow tests/interop/test_full_width.py        needs about 10 GB of memory

The two copies of 860 million parameters stand in memory one after the other, with the safetensors
on disk between them.
"""

import gc
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.interop import load_unet, save_unet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors import safe_open

PUBLISHED = {  # runwayml/stable-diffusion-v1-5: unet/config.json
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def inputs():
    rng = np.random.default_rng(1)
    x, context = rng.normal(size=(2, 4, 16, 8)), rng.normal(size=(2, 77, 768))
    return x.astype(np.float32), np.array([981, 7]), context.astype(np.float32)


def reference(directory):
    """What Diffusers makes of `inputs`, all its weights random and saved to `directory`."""
    model = UNet2DConditionModel(**PUBLISHED).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        model.save_pretrained(directory, max_shard_size="100GB")
        x, t, context = (torch.from_numpy(a) for a in inputs())
        return model(x, t, encoder_hidden_states=context).sample.numpy()


@pytest.mark.slow
def test_unet_of_stable_diffusion_1(tmp_path):
    wanted = reference(tmp_path / "theirs")
    gc.collect()
    module, params = load_unet(tmp_path / "theirs")
    assert sum(p.size for p in jax.tree.leaves(params)) == 859_520_964
    x, t, context = inputs()
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(lambda p, *a: module.apply({"params": p}, *a))
        found = np.moveaxis(np.asarray(apply(params, jnp.moveaxis(x, 1, -1), t, context)), -1, 1)
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    print(f"relative error {error:.2e}")
    assert error < 1e-5
    save_unet(tmp_path / "ours", module, params, 64)
    first, second = (
        safe_open(tmp_path / side / WEIGHTS, framework="np") for side in ("theirs", "ours")
    )
    assert set(first.keys()) == set(second.keys())
    for name in first.keys():
        np.testing.assert_array_equal(first.get_tensor(name), second.get_tensor(name), err_msg=name)
