"""A whole DiT pipeline of Diffusers: read, sampled, and written back."""

import json
import warnings

import numpy as np
import pytest

from experiments import sample
from experiments.convert import __main__ as convert
from experiments.run import generate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

NET = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,  # Diffusers' pipeline takes 1000 for the null class
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
VAE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "layers_per_block": 1,
}


@pytest.fixture(scope="module")
def dit(sd, tmp_path_factory):
    """Diffusers' pipeline, tiny and random, and the workdir made of it."""
    folder = tmp_path_factory.mktemp("dit")
    sd.quiet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = sd.randomise(DiTTransformer2DModel(**NET), 1)
        first, other = (block.norm1.emb for block in net.transformer_blocks)
        other.load_state_dict(first.state_dict())  # Diffusers keeps a copy in every block
        parts = (
            net,
            sd.randomise(AutoencoderKL(**VAE), 2),
            DDIMScheduler(**sd.SCHEDULER),
        )
        pipe = DiTPipeline(*parts)
        pipe.save_pretrained(folder / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    argv = ("--from=diffusers", f"--source={folder}/pipeline", f"--workdir={folder}/run")
    assert sd.command(convert, *argv) == 0
    return pipe, folder / "run"


def theirs(pipe, drawn, labels, **options):
    """Diffusers' pictures from our noise."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = "diffusers.pipelines.dit.pipeline_dit"
        patch.setattr(f"{module}.randn_tensor", lambda *_, **__: drawn)
        return pipe(class_labels=labels, num_inference_steps=10, output_type="np", **options).images


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_class_is_drawn_as_diffusers_draws_it(sd, dit, tmp_path, scale):
    pipe, run = dit
    argv = ("--label=3", "--label=7", "--steps=10", f"--guidance_scale={scale}")
    found = sd.sampled(run, tmp_path, *argv)
    drawn = sd.noise(generate.load(run).pipeline, 2, 5)
    wanted = theirs(pipe, drawn, [3, 7], guidance_scale=scale)
    assert found.shape == wanted.shape == (2, 16, 16, 3) and wanted.std() > 0.05
    assert np.abs(found - wanted).max() < 0.5 / 255 + 1e-3


def test_it_is_written_as_it_was_read(sd, dit, tmp_path):
    pipe, run = dit
    argv = ("--to=diffusers", f"--workdir={run}", f"--out={tmp_path}/out")
    assert sd.command(convert, *argv) == 0
    again = DiTPipeline.from_pretrained(tmp_path / "out")
    for name, part in (("transformer", again.transformer), ("vae", again.vae)):
        wanted = getattr(pipe, name).state_dict()
        for key, value in part.state_dict().items():
            torch.testing.assert_close(value, wanted[key], rtol=0, atol=0)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "DiTPipeline"


def test_it_takes_no_picture_of_another_size(sd, dit, tmp_path, capsys):
    argv = (f"--workdir={dit[1]}", f"--out={tmp_path}/out", "--num=1", "--size=24,24")
    assert sd.command(sample, *argv) == 2
    assert "size=8" in capsys.readouterr().err
