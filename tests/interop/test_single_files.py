"""OpenAI's U-Nets and ControlNets in one file, by Diffusers' converters and the authors' formulas.

The authors' own code is not installed. Against it (openai/improved-diffusion, guided-diffusion) the
outputs of five random U-Nets differed by 2.8e-7 to 7.5e-7; the counts below are of it.
"""

import dataclasses
import functools
import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffusion.interop import compvis_ldm, controlnet, files, load_controlnet, openai
from diffusion.interop.files import Weights, to_tensors
from diffusion.interop.unet import unet_shapes
from diffusion.models.unet import UNet
from experiments import sample
from experiments.convert import __main__ as convert
from experiments.convert.openai import from_openai
from experiments.host import cli
from experiments.run import generate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from diffusers.loaders import single_file_utils

ADM = UNet(
    out_channels=6,
    channels=32,
    multipliers=(1, 2),
    blocks=1,
    attention=(False, True),
    heads=None,
    head_dim=16,
    num_classes=4,
    epsilon=1e-5,
    scale_shift=True,
    resblock_updown=True,
    downsample_padding=1,
    flip_sin_to_cos=True,
    freq_shift=0,
)
PLAIN = dataclasses.replace(
    ADM, heads=4, head_dim=None, num_classes=None, scale_shift=False, resblock_updown=False
)


def drawn(tree, seed=0):
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(lambda s: jnp.asarray(draw(0, 0.1, s.shape), jnp.float32), tree)


@functools.cache
def file_of(module, channels=3, context=None):
    """Random parameters, and the tensors that OpenAI's file of them holds."""
    params = drawn(unet_shapes(module, channels, context))
    tensors = compvis_ldm.unet_tensors(module, params)
    return params, {k.removeprefix(compvis_ldm.UNET): v for k, v in tensors.items()}


def held(tensors):
    return Weights(tensors, dict.fromkeys(tensors, Path("m.pt")), Path("folder"))


def same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("module", [ADM, PLAIN])
def test_the_file_says_what_the_unet_is(module):
    params, tensors = file_of(module)
    found = openai.infer_unet(held(tensors), "m.pt")
    assert found == openai.with_heads(module, 1, None)
    same(openai.read_unet(held(tensors), module), params)


def test_the_new_order_of_q_k_v():
    """QKVAttention of guided_diffusion/unet.py: qkv in three, then each in heads."""
    params, tensors = file_of(ADM)
    legacy = tensors["middle_block.1.qkv.bias"]
    heads, width = ADM.head_shape(1)
    q, k, v = (legacy.reshape(heads, 3, width)[:, i].reshape(-1) for i in range(3))
    new = dict(tensors)
    for name, tensor in tensors.items():
        if ".qkv." in name:
            split = tensor.reshape(heads, 3, width, *tensor.shape[1:]).swapaxes(0, 1)
            new[name] = np.ascontiguousarray(split).reshape(tensor.shape)
    np.testing.assert_array_equal(new["middle_block.1.qkv.bias"], np.concatenate([q, k, v]))
    same(openai.read_unet(held(new), ADM, "new"), params)
    assert not np.array_equal(
        openai.read_unet(held(new), ADM)["mid_attn"]["attention"]["to_q"]["bias"],
        params["mid_attn"]["attention"]["to_q"]["bias"],
    )


COUNTS = {
    "improved-diffusion's cifar10_uncond": 52_546_438,
    "improved-diffusion's imagenet64_uncond": 121_063_942,
    "improved-diffusion's imagenet64_cond": 273_049_350,
    "improved-diffusion's lsun_uncond": 113_676_678,
    "guided-diffusion's 64x64_diffusion": 295_904_454,
    "guided-diffusion's 128x128_diffusion": 421_529_606,
    "guided-diffusion's 256x256_diffusion": 553_838_086,
    "guided-diffusion's 256x256_diffusion_uncond or LSUN": 552_814_086,
    "guided-diffusion's 512x512_diffusion": 558_997_638,
    "guided-diffusion's 64_256_upsampler": 311_795_910,
    "improved-diffusion's upsample_cond": 279_792_390,
    "guided-diffusion's 128_512_upsampler": 308_835_270,
}


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "known"), openai.PUBLISHED.items())
def test_published_architectures_count_as_their_authors(shape, known):
    keys = ("channels", "multipliers", "blocks", "attention", "num_classes", "resblock_updown")
    lsun = "lsun_uncond" in known.name
    module = dataclasses.replace(ADM, **dict(zip(keys, shape)), scale_shift=not lsun)
    module = openai.with_heads(module, known.heads, known.head_dim)
    reads = 6 if known.small else 3
    count = sum(leaf.size for leaf in jax.tree.leaves(unet_shapes(module, reads, None)))
    assert count == COUNTS[known.name]
    assert openai.published(module) == known


def write(path, tensors):
    torch.save({k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}, path)
    return path


def run(command, *argv):
    return cli.run(command.define, command.main, list(map(str, argv)))


def test_a_file_of_openai_becomes_a_workdir(tmp_path, monkeypatch, capsys):
    _, tensors = file_of(ADM)
    source = write(tmp_path / "model.pt", tensors)
    argv = ("--from=openai", f"--source={source}", f"--workdir={tmp_path}/run")
    assert run(convert, *argv) == 2
    assert "no file that OpenAI published" in capsys.readouterr().err
    linear = {"name": "ddpm_linear", "num_steps": 1000}
    known = openai.Published("a tiny one", 8, None, 16, linear)
    shape = (32, (1, 2), 1, (False, True), 4, True)
    monkeypatch.setattr(openai, "PUBLISHED", {shape: known})
    assert run(convert, *argv) == 0
    assert "read as a tiny one" in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["process"]["variance"] == "learned" and config["sample"]["guidance_scale"] == 1
    draw = (f"--workdir={tmp_path}/run", "--num=1", "--steps=1", f"--out={tmp_path}/out")
    found = generate.load(tmp_path / "run").pipeline
    with pytest.raises(ValueError, match=r"label=4 must lie in 0\.\.3"):
        found.columns(labels=[4])
    np.testing.assert_array_equal(found.columns()["label"], range(4))
    assert run(sample, *draw, "--label=3", "--guidance_scale=2") == 2
    assert "needs a null class" in capsys.readouterr().err


def test_an_upsampler_is_told_a_small_picture(tmp_path, monkeypatch):
    """Half as wide at first as its time embedding, like the U-Net of 512 pixels."""
    module = dataclasses.replace(ADM, channels=64, multipliers=(0.5, 1), head_dim=32)
    params, tensors = file_of(module, 6)
    source = write(tmp_path / "up.pt", tensors)
    assert openai.infer_unet(held(tensors), "up.pt") == openai.with_heads(module, 1, None)
    linear = {"name": "ddpm_linear", "num_steps": 1000}
    known = openai.Published("a tiny one", 8, None, 32, linear, small=4)
    monkeypatch.setattr(openai, "PUBLISHED", {(64, (0.5, 1), 1, (False, True), 4, True): known})
    assert run(convert, "--from=openai", f"--source={source}", f"--workdir={tmp_path}/run") == 0
    told = json.loads((tmp_path / "run" / "config.json").read_text())["conditioning"]
    wanted = {
        "concat": "low_resolution",
        "downscale": 2,
        "degradation": "area",
        "enlarge": "linear",
    }
    assert {key: told[key] for key in wanted} == wanted
    same(generate.load(tmp_path / "run").pipeline.params["denoiser"], params)
    config = ConfigDict(json.loads((tmp_path / "run" / "config.json").read_text()))
    config.conditioning.update(degradation="bsr_light", enlarge="cubic")  # as another's would be
    monkeypatch.setattr(openai, "PUBLISHED", {})
    own = from_openai(source, config, None)  # of an architecture that nobody published
    assert {key: own.config.conditioning[key] for key in wanted} == wanted
    same(own.params["denoiser"], params)
    x = np.arange(12).reshape(1, 2, 2, 3)
    concat = generate.load(tmp_path / "run").pipeline.concat
    large = concat.encode({}, {"small": np.uint8(20 * x)})["concat"]
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(np.moveaxis(np.float32(20 * x / 127.5 - 1), -1, 1)),
        (4, 4),
        mode="bilinear",
    )
    np.testing.assert_allclose(large, np.moveaxis(theirs.numpy(), 1, -1), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("out.2.weight"), "half a U-Net"),
        (lambda t: t.clear(), "no U-Net"),
        (
            lambda t: t.update({"input_blocks.0.0.weight": np.zeros((32, 4, 3, 3))}),
            "it reads 4 channels",
        ),
        (
            lambda t: t.update({"time_embed.0.weight": np.zeros((128, 64))}),
            "its first level has 32 channels and its time embedding is of 64",
        ),
    ],
)
def test_other_files_of_openai_are_named(change, words):
    tensors = dict(file_of(ADM)[1])
    change(tensors)
    with pytest.raises(ValueError, match=words):
        openai.infer_unet(held(tensors), "m.pt")


# -- ControlNets -----------------------------------------------------------------------------------


def control(context, **fields):
    """Stable Diffusion's in small: the module, random parameters, and the authors' tensors."""
    heads = {768: {"heads": 8, "head_dim": None}, 1024: {"heads": None, "head_dim": 64}}
    unet = dataclasses.replace(
        PLAIN,
        out_channels=3,
        channels=64,
        attention=(True, False),
        transformer_depth=1,
        **{"heads": 8, "head_dim": None, **heads.get(context, {}), **fields},
    )
    module = controlnet.beside(unet, (16, 32, 96, 256))
    params = drawn(controlnet.controlnet_shapes(module, 4, context))
    tensors = to_tensors(params, controlnet.file_rules(module))
    if not module.linear_projection:
        for name, tensor in tensors.items():
            if name.endswith(("proj_in.weight", "proj_out.weight")):
                tensors[name] = tensor[..., None, None]
    return module, params, tensors


@pytest.mark.parametrize(("context", "linear"), [(768, False), (1024, True)])
@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_a_controlnet_in_one_file(tmp_path, context, linear, prefix):
    module, params, tensors = control(context, linear_projection=linear)
    beside = {"first_stage_model.x": np.ones(1)} if prefix else {}
    path = write(tmp_path / "c.pth", {prefix + k: v for k, v in tensors.items()} | beside)
    found, read = load_controlnet(path)
    assert found == module
    same(read, params)
    config = {"layers_per_block": 1, "class_embed_type": None}
    theirs = single_file_utils.convert_controlnet_checkpoint(dict(tensors), config)
    wanted = to_tensors(params, controlnet.RULES)
    assert theirs.keys() == wanted.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(np.squeeze(tensor), np.squeeze(wanted[name]), err_msg=name)


def test_other_files_of_controlnets_are_named(tmp_path):
    _, params, tensors = control(32)
    with pytest.raises(ValueError, match="context of 32, but only Stable Diffusion"):
        load_controlnet(write(tmp_path / "a.pth", tensors))
    diffusers = files.to_tensors(params, controlnet.RULES)
    with pytest.raises(ValueError, match=r"name the folder with its config\.json"):
        load_controlnet(write(tmp_path / "b.pth", diffusers))
    with pytest.raises(ValueError, match="give a ControlNet's file"):
        load_controlnet(write(tmp_path / "c.pth", {"x": np.ones(1)}))
