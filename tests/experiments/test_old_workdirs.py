"""Workdirs made when the denoiser was called by the kind of its network, "unet", are read."""

import importlib
import json
import shutil

import jax
import numpy as np
import pytest

from diffusion import manifest, weights
from diffusion.checkpoint import Checkpoints, restore_params
from diffusion.models.text_encoder import TextTransformer
from experiments import train
from experiments.run import generate, networks, workdir

STATE = ("step", "rng", "params", "opt_state", "ema", "extra")


def aged(source, target):
    """A copy of a run with its config and its newest checkpoint as they were once written."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    model = config["model"]
    model["unet"] = model.pop("denoiser")
    del model["unet"]["kind"]
    config["ema"]["networks"] = ["unet"]
    (target / "config.json").write_text(json.dumps(config))
    shutil.rmtree(target / "checkpoints")
    found = restore_params(source / "checkpoints", STATE)
    state = dict(found.items)
    for item in ("params", "opt_state", "ema"):
        tree = state[item]
        state[item] = {"unet" if name == "denoiser" else name: tree[name] for name in tree}
    del state["ema"]["text_encoder"]
    body = manifest.read_manifest(source / "checkpoints" / str(found.step))
    with Checkpoints(target / "checkpoints", async_save=False) as checkpoints:
        checkpoints.save(found.step, state, body["data_state"], found.metadata)
    return target


@pytest.fixture
def old(job, tmp_path):
    return aged(job / "ldm", tmp_path / "old")


def test_an_old_run_samples_the_same_pixels(job, old):
    config = workdir.read_config(old)
    assert config.model.denoiser.kind == "unet" and "unet" not in config.model
    assert list(config.ema.networks) == ["denoiser"]
    assert old.joinpath("config.json").read_text().count('"unet"') == 2
    pipes = [generate.load(d, "raw").pipeline.changed(steps=2) for d in (job / "ldm", old)]
    ours, theirs = (next(pipe.images(pipe.columns(["a red seven"]), 2)) for pipe in pipes)
    np.testing.assert_array_equal(ours, theirs)
    averages = [networks.load(d).params["denoiser"] for d in (job / "ldm", old)]
    jax.tree.map(np.testing.assert_array_equal, *averages)


def test_an_old_run_goes_on_to_the_same_bits(job, old, tmp_path):
    new = shutil.copytree(job / "ldm", tmp_path / "new")
    for directory in (new, old):
        config = workdir.read_config(directory)
        config.train.steps += 1
        train.train(config, directory)
    ours, theirs = (restore_params(d / "checkpoints", STATE).items for d in (new, old))
    for item in ("params", "opt_state", "extra"):
        jax.tree.map(np.testing.assert_array_equal, ours[item], theirs[item])
    jax.tree.map(np.testing.assert_array_equal, ours["ema"]["denoiser"], theirs["ema"]["denoiser"])
    assert json.loads((old / "config.json").read_text())["model"]["denoiser"]["kind"] == "unet"


def test_where_parameters_begin_is_no_difference_between_networks():
    sizes = {"vocab_size": 8, "width": 8, "layers": 1, "heads": 1, "max_length": 4}
    old, new = (TextTransformer(**sizes, embedding_std=std) for std in (0.02, 1.0))
    assert networks.difference(old, new) is None
    wider = TextTransformer(**sizes | {"width": 16})
    assert networks.difference(old, wider) == ("width", 8, 16)


def test_weights_are_the_same_but_for_rounding(tmp_path):
    params = {"a": {"kernel": np.linspace(-1, 1, 8, dtype=np.float32)}, "b": np.arange(3)}
    weights.check_same(tmp_path / "none", params, "x")
    weights.save_weights(tmp_path / "kept", params, {})
    weights.check_same(tmp_path / "kept", params, "x")
    rounded = {**params, "a": {"kernel": np.nextafter(params["a"]["kernel"], np.float32(2))}}
    weights.check_same(tmp_path / "kept", rounded, "x")
    trained = {**params, "a": {"kernel": params["a"]["kernel"] + np.float32(1e-3)}}
    for other in (trained, {**params, "b": np.arange(4)}, {"a": params["a"]}):
        with pytest.raises(ValueError, match="x has other weights now"):
            weights.check_same(tmp_path / "kept", other, "x")


def test_a_folder_of_runs_names_them_and_somebody_elses_config_is_none(tmp_path):
    for name, held in (("ldm", {"task": "denoiser"}), ("vae", {"_class_name": "AutoencoderKL"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(held))
    with pytest.raises(ValueError, match=r"name one of those in it \(ldm\)"):
        workdir.read_config(tmp_path)
    with pytest.raises(ValueError, match="vae holds no run"):
        workdir.read_config(tmp_path / "vae")


def test_the_folder_of_an_old_frozen_denoiser_is_read(tmp_path):
    assert networks.folder(tmp_path, "denoiser") == tmp_path / "denoiser"
    (tmp_path / "unet").mkdir()
    assert networks.folder(tmp_path, "denoiser") == tmp_path / "unet"
    assert networks.folder(tmp_path, "text_encoder") == tmp_path / "text_encoder"


@pytest.mark.parametrize(
    ("ema", "networks"),
    [({"decay": 0.9}, []), ({"decay": 0.9, "networks": ["unet", "text_encoder"]}, None)],
    ids=["made_before_the_key", "both"],
)
def test_an_old_config_is_completed_and_renamed(tmp_path, ema, networks):
    model = {"unet": {"out_channels": 3}}
    body = {"task": "denoiser", "model": model, "ema": ema, "init_networks": ["unet"]}
    (tmp_path / "config.json").write_text(json.dumps(body))
    config = workdir.read_config(tmp_path)
    assert config.model.to_dict() == {"denoiser": {"kind": "unet", "out_channels": 3}}
    wanted = ["denoiser", "text_encoder"] if networks is None else networks
    assert list(config.ema.networks) == wanted and list(config.init_networks) == ["denoiser"]


@pytest.mark.parametrize("broken", [{"model": 3}, {"model": {"unet": 3}}, {"ema": 3}])
def test_a_damaged_old_config_is_left_as_it_is(tmp_path, broken):
    body = {"task": "denoiser", "model": {"unet": {}}, "ema": {}, **broken}
    (tmp_path / "config.json").write_text(json.dumps(body))
    found = workdir.read_config(tmp_path).to_dict()
    assert {key: found[key] for key in broken} == broken


@pytest.mark.parametrize(
    ("name", "arg", "gained"),
    [
        ("digits_autoencoder", None, ("initialisation", "loss.perceptual_dropout")),
        ("stable_diffusion", "lora", ("model.lora.initialisation", "conditioning.layout")),
        ("ldm_imagenet256", "f4", ("conditioning.downscale", "conditioning.masks")),
    ],
)
def test_a_run_from_before_a_key_was_there_is_this_configs(name, arg, gained, tmp_path):
    config = importlib.import_module(f"configs.{name}").get_config(arg).lock()
    workdir.claim(tmp_path, config, "")
    old = json.loads((tmp_path / "config.json").read_text())
    for key in gained:
        *sections, last = key.split(".")
        inner = old
        for section in sections:
            inner = inner[section]
        del inner[last]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert workdir.check(tmp_path, config)
