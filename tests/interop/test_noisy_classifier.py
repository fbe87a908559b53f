"""guided-diffusion's classifiers: their files, and outputs against a transcription in PyTorch.

Against the authors' own class (guided_diffusion/unet.py, EncoderUNetModel) logits of the same
random tensors differed from the transcription's by 6e-7 at most.
"""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

from configs import adm_classifier
from diffusion.interop import openai
from diffusion.interop.files import Weights
from diffusion.models.noisy_classifier import NoisyClassifier
from experiments.convert import __main__ as convert
from experiments.host import cli

NET = NoisyClassifier(
    channels=32,
    multipliers=(0.5, 1),
    blocks=1,
    attention=(False, True),
    heads=None,
    head_dim=16,
    groups=4,
    epsilon=1e-5,
    scale_shift=True,
    resblock_updown=True,
    flip_sin_to_cos=True,
    freq_shift=0,
    classes=5,
)
WIDTH, SIDE = 32, 8


def drawn():
    """Tensors by the authors' names."""
    rng, wide = np.random.default_rng(0), 4 * WIDTH
    found = {}

    def add(name, *shape, about=0.0):
        found[f"{name}.weight"] = rng.normal(about, 0.1, shape).astype(np.float32)
        found[f"{name}.bias"] = rng.normal(0, 0.1, shape[0]).astype(np.float32)

    def block(name, read, width):
        add(f"{name}.in_layers.0", read, about=1)
        add(f"{name}.in_layers.2", width, read, 3, 3)
        add(f"{name}.emb_layers.1", 2 * width, wide)
        add(f"{name}.out_layers.0", width, about=1)
        add(f"{name}.out_layers.3", width, width, 3, 3)
        if read != width:
            add(f"{name}.skip_connection", width, read, 1, 1)

    def attention(name):
        add(f"{name}.norm", WIDTH, about=1)
        add(f"{name}.qkv", 3 * WIDTH, WIDTH, 1)
        add(f"{name}.proj_out", WIDTH, WIDTH, 1)

    add("time_embed.0", wide, WIDTH)
    add("time_embed.2", wide, wide)
    add("input_blocks.0.0", WIDTH // 2, 3, 3, 3)
    for i, width in enumerate([WIDTH // 2, WIDTH // 2, WIDTH], 1):
        block(f"input_blocks.{i}.0", WIDTH // 2, width)
    attention("input_blocks.3.1")
    block("middle_block.0", WIDTH, WIDTH)
    attention("middle_block.1")
    block("middle_block.2", WIDTH, WIDTH)
    add("out.0", WIDTH, about=1)
    add("out.2.qkv_proj", 3 * WIDTH, WIDTH, 1)
    add("out.2.c_proj", 5, WIDTH, 1)
    found["out.2.positional_embedding"] = rng.normal(0, 0.3, (WIDTH, 17)).astype(np.float32)
    return found


def transcription(tensors, x, t, groups=4):
    p = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}

    def of(name):
        return p[f"{name}.weight"], p[f"{name}.bias"]

    def norm(name, h):
        return F.group_norm(h, groups, *of(name), 1e-5)

    def attend(qkv, heads, legacy):
        n, c, places = qkv.shape
        shape = (n, heads, 3, -1, places) if legacy else (n, 3, heads, -1, places)
        q, k, v = qkv.reshape(shape).unbind(2 if legacy else 1)
        weights = (q.transpose(2, 3) @ k / math.sqrt(q.shape[2])).softmax(-1)
        return (v @ weights.transpose(2, 3)).reshape(n, c // 3, places)

    def block(name, h, down=False):
        shrink = (lambda y: F.avg_pool2d(y, 2)) if down else (lambda y: y)
        y = F.conv2d(
            shrink(F.silu(norm(f"{name}.in_layers.0", h))), *of(f"{name}.in_layers.2"), padding=1
        )
        scale, shift = F.linear(F.silu(emb), *of(f"{name}.emb_layers.1"))[..., None, None].chunk(
            2, 1
        )
        y = F.silu(norm(f"{name}.out_layers.0", y) * (1 + scale) + shift)
        h = shrink(h)
        if f"{name}.skip_connection.weight" in p:
            h = F.conv2d(h, *of(f"{name}.skip_connection"))
        return h + F.conv2d(y, *of(f"{name}.out_layers.3"), padding=1)

    def attention(name, h):
        flat = h.flatten(2)
        y = attend(F.conv1d(norm(f"{name}.norm", flat), *of(f"{name}.qkv")), 2, legacy=True)
        return h + F.conv1d(y, *of(f"{name}.proj_out")).reshape(h.shape)

    angle = t[:, None] * 1e-4 ** (torch.arange(WIDTH // 2) / (WIDTH // 2))
    emb = F.linear(torch.cat([angle.cos(), angle.sin()], 1), *of("time_embed.0"))
    emb = F.linear(F.silu(emb), *of("time_embed.2"))
    h = F.conv2d(x, *of("input_blocks.0.0"), padding=1)
    h = block("input_blocks.1.0", h)
    h = block("input_blocks.2.0", h, down=True)
    h = attention("input_blocks.3.1", block("input_blocks.3.0", h))
    h = block("middle_block.0", h)
    h = block("middle_block.2", attention("middle_block.1", h))
    h = F.silu(norm("out.0", h)).flatten(2)
    h = torch.cat([h.mean(2, keepdim=True), h], 2) + p["out.2.positional_embedding"]
    h = attend(F.conv1d(h, *of("out.2.qkv_proj")), 2, legacy=False)
    return F.conv1d(h, *of("out.2.c_proj"))[..., 0]


def held(tensors):
    return Weights(tensors, dict.fromkeys(tensors, Path("c.pt")), Path("folder"))


def test_logits_are_the_transcriptions():
    tensors = drawn()
    found = openai.read_classifier(held(tensors), NET, SIDE)
    x = np.random.default_rng(1).normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)
    ours = jax.jit(NET.apply)({"params": found}, x, jnp.array([3.0, 700.0]))
    x, t = torch.from_numpy(np.moveaxis(x, -1, 1)), torch.tensor([3.0, 700])
    wanted = transcription(tensors, x, t).numpy()
    assert np.abs(ours - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_a_file_becomes_a_workdir(tmp_path, monkeypatch, capsys):
    torch.save({k: torch.from_numpy(v) for k, v in drawn().items()}, tmp_path / "c.pt")
    argv = ["--from=openai", f"--source={tmp_path}/c.pt", f"--workdir={tmp_path}/run"]
    assert cli.run(convert.define, convert.main, argv) == 2
    assert (
        "a classifier of 4 input blocks, as none that OpenAI published" in capsys.readouterr().err
    )
    published = adm_classifier.get_config
    names = ("channels", "multipliers", "blocks", "classes", "attention", "groups", "head_dim")

    def small(argument):
        config = published(argument)
        config.data.image_size = SIDE
        config.model.classifier.update({name: getattr(NET, name) for name in names})
        return config

    monkeypatch.setattr(adm_classifier, "get_config", small)
    monkeypatch.setattr(openai, "CLASSIFIERS", {4: 128})
    assert cli.run(convert.define, convert.main, argv) == 0
    assert f"--guidance_classifier={tmp_path}/run" in capsys.readouterr().out
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["task"] == "classifier" and written["model"]["classifier"]["classes"] == 5
