"""EDM's networks against a transcription, and its files, whose source code is never run."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from diffusion.interop import edm
from diffusion.models.song import SongUNet
from diffusion.models.unet import UNet
from experiments import sample
from experiments.convert import __main__ as convert
from experiments.host import cli
from tests.interop import edm_reference as reference

SONG = SongUNet(
    channels=128,
    multipliers=(1, 1),
    blocks=1,
    attention=(False, True),
    num_classes=3,
    augment_dim=9,
)
MODULES = {
    "ddpmpp": SONG,
    "ncsnpp": SONG.clone(ncsnpp=True, num_classes=None),
    "adm": UNet(
        channels=128,
        multipliers=(1, 1),
        blocks=1,
        attention=(True, False),
        heads=None,
        head_dim=64,
        num_classes=3,
        epsilon=1e-5,
        scale_shift=True,
        resblock_updown=True,
        flip_sin_to_cos=True,
        freq_shift=0,
    ),
}
SIDE = 8


@functools.cache
def drawn(kind):
    module = MODULES[kind]
    draw = np.random.default_rng(0).normal
    shapes = edm.shapes(module, 3)
    params = jax.tree.map_with_path(
        lambda path, s: jnp.asarray(draw(path[-1].key == "scale", 0.05, s.shape), jnp.float32),
        shapes,
    )
    return module, params, edm.unet_tensors(module, params, SIDE)


@pytest.mark.parametrize("kind", MODULES)
def test_outputs_are_the_transcriptions(kind):
    module, params, tensors = drawn(kind)
    draw = np.random.default_rng(1)
    x = draw.normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)
    noise, augment = np.float32([-1.5, 1.0]), draw.normal(size=(2, 9)).astype(np.float32)
    told = {} if module.num_classes is None else {"labels": jnp.array([2, 0])}
    theirs = {} if not told else {"labels": torch.eye(3)[[2, 0]]}
    if kind != "adm":
        told, theirs = told | {"augment": augment}, theirs | {"augment": torch.from_numpy(augment)}
    ours = jax.jit(module.apply)({"params": params}, x, noise, **told)
    net = reference.Reference(tensors, kind != "adm")
    wanted = net(torch.from_numpy(np.moveaxis(x, -1, 1)), torch.from_numpy(noise), **theirs)
    wanted = np.moveaxis(wanted.numpy(), 1, -1)
    assert np.abs(ours - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert wanted.std() > 0.1


# -- files ----------------------------------------------------------------------------------------

SAID = {"img_resolution": SIDE, "label_dim": 3, "model_channels": 128, "channel_mult": [1, 1]}
SAID |= {"num_blocks": 1, "augment_dim": 9, "dropout": 0.13, "attn_resolutions": [4]}
NCSNPP = {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual"}
NCSNPP |= {"resample_filter": [1, 3, 3, 1]}


def settings(kind, **more):
    said = {"ddpmpp": {}, "ncsnpp": NCSNPP | {"label_dim": 0}}.get(kind, {"augment_dim": 0})
    said = SAID | said | ({"attn_resolutions": [8]} if kind == "adm" else {}) | more
    inner = {key: value for key, value in said.items() if not key.startswith("sigma")}
    return said, inner | {"in_channels": 3, "out_channels": 3}


def write(path, kind="ddpmpp", name="EDMPrecond", hostile=None, cut=None, **more):
    """A snapshot as training_loop.py writes it, of random parameters."""
    tensors = dict(drawn(kind)[2])
    outer, inner = settings(kind, **more)
    outer |= {"img_channels": 3, "use_fp16": True, "model_type": "SongUNet"}
    tensors["enc.4x4_down.conv0.resample_filter"] = np.full((1, 1, 2, 2), 0.25, np.float32)
    tensors.pop(cut, None)
    of = "DhariwalUNet" if kind == "adm" else "SongUNet"
    net = reference.module(of, tensors, inner)
    root = {"ema": reference.module(name, {}, outer, model=net), "loss_fn": hostile}
    root["augment_pipe"] = reference.Persistent("AugmentPipe", p=np.float64(0.12))
    return reference.persist(path, root | {"dataset_kwargs": reference.EasyDict(xflip=False)})


@pytest.mark.parametrize("kind", MODULES)
def test_arrays_are_read_and_no_source_is_run(tmp_path, kind):
    """The source would end the process; see `test_the_source_would_run`."""
    module, params, _ = drawn(kind)
    found, read, network = edm.load_edm(write(tmp_path / "net.pkl", kind))
    assert found == module.clone(dropout=0.13)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert network.name == "EDMPrecond"


def test_the_source_would_run():
    with pytest.raises(SystemExit, match="the source was run"):
        reference._reconstruct_persistent_obj({"module_src": reference.Persistent.source})


def test_convert_writes_a_workdir_that_samples(tmp_path):
    write(tmp_path / "net.pkl", sigma_min=0.01)
    folder = f"--workdir={tmp_path}/run"
    argv = ["--from=edm", f"--source={tmp_path}/net.pkl", folder]
    assert cli.run(convert.define, convert.main, argv) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["process"]["schedule"] == {
        "name": "edm",
        "sigma_min": 0.01,
        "sigma_max": 80.0,
        "sigma_data": 0.5,
    }
    assert (config["sample"]["sampler"], config["sample"]["steps"]) == ("heun", 18)
    argv = [folder, "--num=1", "--steps=1", f"--out={tmp_path}/out", "--label=2"]
    assert cli.run(sample.define, sample.main, argv) == 0
    assert list((tmp_path / "out").glob("*.png"))


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "VPPrecond"}, "holds a VPPrecond of SongUNet"),
        ({"name": "Precond"}, "EDM2's magnitude-preserving networks"),
        ({"encoder_type": "skip"}, "encoder_type='skip' is not supported"),
        ({"channel_mult_noise": 2}, "neither DDPM"),
        ({"model_channels": 64}, "every level needs 128 channels"),
        ({"label_dropout": 0.1}, "label_dropout=0.1 is not supported"),
        ({"unheard_of": 1}, "unheard_of=1 is not a key"),
        ({"num_blocks": 2}, "no tensor|for which the config has no place"),
        ({"cut": "enc.8x8_conv.bias"}, "no tensor enc.8x8_conv.bias"),
    ],
)
def test_what_is_not_read_is_named(tmp_path, change, words):
    with pytest.raises(ValueError, match=words) as refused:
        edm.load_edm(write(tmp_path / "net.pkl", **change))
    assert "net.pkl" in str(refused.value) or str(tmp_path) in str(refused.value)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    path = write(tmp_path / "net.pkl", hostile=Hostile(tmp_path / "canary"))
    with pytest.raises(ValueError, match=r"asks for .*open, which no tensor is made of"):
        edm.load_edm(path)
    assert not (tmp_path / "canary").exists()
    data = path.read_bytes()
    for length in (0, 100, len(data) // 2):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"net\.pkl is truncated"):
            edm.load_edm(path)
    with pytest.raises(ValueError, match=r"none\.pkl is missing"):
        edm.load_edm(tmp_path / "none.pkl")
