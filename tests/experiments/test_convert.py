"""Diffusers' directories and CompVis's files in and out; what is broken leaves nothing."""

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import stable_diffusion
from diffusion.interop import compvis, compvis_ldm, text_encoder
from diffusion.interop.files import to_tensors
from experiments import encode_latents, sample
from experiments.convert import __main__ as convert
from experiments.convert import reading, single
from experiments.host import cli
from experiments.run import build, generate, networks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from safetensors.numpy import load_file, save_file


def command(*argv) -> int:
    return cli.run(convert.define, convert.main, [str(a) for a in argv])


def refused(capsys, *words) -> None:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]


def equal_files(first, second):
    wanted, found = load_file(first), load_file(second)
    found = {key.removeprefix("text_model."): value for key, value in found.items()}
    wanted = {key.removeprefix("text_model."): value for key, value in wanted.items()}
    assert found.keys() == wanted.keys()
    for key in wanted:
        np.testing.assert_array_equal(found[key], wanted[key], err_msg=key)


def test_directories_go_round(sd, reference, converted, tmp_path):
    out = tmp_path / "out"
    argv = ("--to=diffusers", f"--workdir={converted}", f"--out={out}")
    assert command(*argv) == 0
    source = reference[1]
    for name in ("unet", "vae", "text_encoder"):
        (first,) = (source / name).glob("*.safetensors")
        (second,) = (out / name).glob("*.safetensors")
        equal_files(first, second)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = StableDiffusionPipeline.from_pretrained(out)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.scheduler, DDIMScheduler)
    assert {key: again.scheduler.config[key] for key in sd.SCHEDULER} == sd.SCHEDULER
    model = generate.load(converted).pipeline
    given = sd.noise(model, 2, 5)
    few = {"latents": given, "num_inference_steps": 2}
    found, wanted = (sd.theirs(pipe, model, **few) for pipe in (again, reference[0]))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


# -- one network alone ---------------------------------------------------------------------------


def test_a_first_stage_alone_goes_round_and_serves_latents(sd, reference, tmp_path):
    argv = (f"--source={reference[1]}/vae", f"--workdir={tmp_path}/run")
    assert command("--from=diffusers", *argv) == 0
    config = stable_diffusion.get_config("v1,smoke")
    config.latents = {"first_stage": str(tmp_path / "run")}
    config.model.autoencoder.update({"channels": 8, "multipliers": (1, 2), "groups": 4})
    stage = encode_latents.find_first_stage(config)
    x = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    found = stage.network.apply({"params": stage.params}, jnp.asarray(x), method="encode").mean
    with torch.no_grad():
        given = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
        wanted = reference[0].vae.encode(given).latent_dist.mean
    np.testing.assert_allclose(np.moveaxis(found, -1, 1), wanted, atol=1e-5)
    config.model.autoencoder.multipliers = (1, 2, 2)
    with pytest.raises(ValueError, match=r"autoencoder\.multipliers=\(1, 2\).*\(1, 2, 2\)"):
        encode_latents.find_first_stage(config)
    assert command("--to=diffusers", f"--workdir={tmp_path}/run", f"--out={tmp_path}/out") == 0
    name = "diffusion_pytorch_model.safetensors"
    equal_files(reference[1] / "vae" / name, tmp_path / "out" / name)
    kept = json.loads((tmp_path / "out" / "config.json").read_text())
    assert kept["scaling_factor"] == pytest.approx(0.18215) and kept["sample_size"] == 16


def test_the_first_stage_of_a_pipeline_serves_latents(converted):
    config = stable_diffusion.get_config("v1,smoke")
    config.latents = {"first_stage": str(converted)}
    config.model.autoencoder.update({"channels": 8, "multipliers": (1, 2), "groups": 4})
    assert encode_latents.find_first_stage(config).network.downsampling == 2


def test_a_text_encoder_alone_goes_round_and_begins_a_run(sd, reference, tmp_path, capsys):
    source = reference[1]
    argv = (f"--source={source}/text_encoder", f"--workdir={tmp_path}/run")
    assert command("--from=diffusers", *argv) == 2
    refused(capsys, "text_encoder", "vocab.json")
    assert command("--from=diffusers", *argv, f"--tokenizer={source}/tokenizer") == 0
    config = stable_diffusion.get_config("v1,smoke")
    fields = {"vocab_size": 514, "max_length": 16, "width": 24, "layers": 2, "heads": 3}
    config.model.text_encoder.update(fields)
    config.data.name = "latents"  # whose first stage comes with them
    config.init_from = str(tmp_path / "run")
    begun = networks.begin(config)
    assert set(begun.frozen) == {"text_encoder"} and not begun.start
    assert begun.tokenizer is not None
    assert command("--to=diffusers", f"--workdir={tmp_path}/run", f"--out={tmp_path}/out") == 0
    equal_files(source / "text_encoder" / "model.safetensors", tmp_path / "out/model.safetensors")
    assert cli.run(sample.define, sample.main, (f"--workdir={tmp_path}/run",)) == 2
    refused(capsys, "text encoder alone")


def test_another_network_alone_is_refused(reference, tmp_path, capsys):
    argv = (f"--source={reference[1]}/unet", f"--workdir={tmp_path}/run")
    assert command("--from=diffusers", *argv) == 2
    refused(capsys, "UNet2DConditionModel alone", "model_index.json")
    assert not list(tmp_path.iterdir())


# -- CompVis's files -----------------------------------------------------------------------------


def whole_file(converted):
    """Every network of the workdir as CompVis has them in one file, and what else is there."""
    found = networks.load(converted)
    params, prefix = found.params, "cond_stage_model.transformer.text_model."
    tensors = compvis_ldm.unet_tensors(build.denoiser_network(found.config), params["denoiser"])
    first = compvis.to_compvis_tensors(found.first_stage, params["autoencoder"])
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in first.items()}
    text = to_tensors(params["text_encoder"], text_encoder.RULES)
    tensors |= {prefix + name: tensor for name, tensor in text.items()}
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    state |= {"betas": torch.zeros(1000), "model_ema.decay": torch.zeros(())}
    return {"epoch": 3, "state_dict": state, "callbacks": {}}


def test_a_whole_checkpoint_of_compvis(sd, reference, converted, tmp_path):
    """U-Net, first stage and text encoder in one .ckpt: the workdir is that of the pipeline."""
    torch.save(whole_file(converted), tmp_path / "model.ckpt")
    argv = ("--config=configs/stable_diffusion.py:v1,smoke", *sd.FLAGS)
    argv += (f"--source={tmp_path}/model.ckpt", f"--workdir={tmp_path}/run")
    argv += (f"--tokenizer={reference[1]}/tokenizer",)
    assert command("--from=compvis", *argv) == 0
    wanted, found = (networks.load(run) for run in (converted, tmp_path / "run"))
    assert found.params.keys() == wanted.params.keys()
    for name in wanted.params:
        jax.tree.map(np.testing.assert_array_equal, found.params[name], wanted.params[name])
    for name in ("latent_scale", "latent_shift"):
        np.testing.assert_array_equal(found.extra[name], wanted.extra[name])
    models = (generate.load(run).pipeline for run in (converted, tmp_path / "run"))
    pictures = [sd.ours(model, steps=2) for model in models]
    np.testing.assert_allclose(*pictures, atol=1e-6)


def test_a_whole_checkpoint_needs_its_tokenizer_and_runs_no_code(sd, converted, tmp_path, capsys):
    config = ("--config=configs/stable_diffusion.py:v1,smoke", *sd.FLAGS)
    argv = (*config, f"--source={tmp_path}/model.ckpt", f"--workdir={tmp_path}/run")
    torch.save(whole_file(converted), tmp_path / "model.ckpt")
    assert command("--from=compvis", *argv) == 2
    refused(capsys, "model.ckpt", "--tokenizer")
    torch.save({**whole_file(converted), "callbacks": hostile(tmp_path)}, tmp_path / "model.ckpt")
    assert command("--from=compvis", *argv) == 2
    refused(capsys, "model.ckpt", "open")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.ckpt"]


def test_a_first_stage_of_compvis_alone(converted, tmp_path):
    """As first-stage training saves it: no prefix, and its loss beside it."""
    found = networks.load(converted)
    first = compvis.to_compvis_tensors(found.first_stage, found.params["autoencoder"])
    state = {name: torch.from_numpy(tensor) for name, tensor in first.items()}
    state["loss.logvar"] = torch.zeros(())
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    argv = (f"--source={tmp_path}/model.ckpt", f"--workdir={tmp_path}/run")
    argv += ("--config=configs/autoencoder_kl.py:f8,smoke",)  # 4 groups a norm, which is not LDM's
    assert command("--from=compvis", *argv) == 0
    stage = networks.load_stage(tmp_path / "run")
    assert stage.network.groups == 4 and stage.network.multipliers == (1, 2)
    jax.tree.map(np.testing.assert_array_equal, stage.params, found.params["autoencoder"])


# -- what is broken ------------------------------------------------------------------------------


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def reshape(path):
    tensors = load_file(path)
    name = "conv_in.bias"
    save_file({**tensors, name: tensors[name][:-1].copy()}, path, metadata={"format": "pt"})


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: (p / "model_index.json").unlink(), ("model_index.json", "missing")),
        (lambda p: (p / "model_index.json").write_text("{"), ("model_index.json", "JSON")),
        (lambda p: edit(p / "model_index.json", _class_name="FluxPipeline"), ("FluxPipeline",)),
        (lambda p: edit(p / "unet" / "config.json", _class_name="Transformer"), ("config.json",)),
        (lambda p: shutil.rmtree(p / "vae"), ("vae", "missing")),
        (lambda p: (p / WEIGHTS).unlink(), ("unet", "missing")),
        (lambda p: truncate(p / WEIGHTS), ("diffusion_pytorch_model", "truncated")),
        (lambda p: reshape(p / WEIGHTS), ("conv_in.bias", "shape")),
        (
            lambda p: edit(
                p / "scheduler" / "scheduler_config.json", _class_name="SASolverScheduler"
            ),
            ("scheduler_config.json", "SASolverScheduler"),
        ),
        (
            lambda p: edit(p / "scheduler" / "scheduler_config.json", trained_betas=[0.1]),
            ("trained_betas",),
        ),
        (lambda p: shutil.rmtree(p / "tokenizer"), ("tokenizer", "missing")),
    ],
)
def test_a_broken_pipeline_leaves_nothing(reference, tmp_path, capsys, spoil, words):
    shutil.copytree(reference[1], tmp_path / "pipeline")
    spoil(tmp_path / "pipeline")
    target = tmp_path / "run"
    source = tmp_path / "pipeline"
    assert command("--from=diffusers", f"--source={source}", f"--workdir={target}") == 2
    refused(capsys, *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipeline"]


def test_commands_refuse_what_does_not_go_together(reference, converted, tmp_path, capsys):
    source = reference[1]
    for argv, words in (
        (("--workdir=x",), ("--from", "--to")),
        (("--from=diffusers", "--workdir=x"), ("--source",)),
        (("--from=diffusers", "--source=nowhere", "--workdir=x"), ("nowhere",)),
        (("--to=diffusers", f"--workdir={converted}"), ("--out",)),
        (("--to=diffusers", f"--workdir={tmp_path}/no", "--out=y"), ("no run",)),
        (
            ("--from=diffusers", f"--source={source}", f"--workdir={converted}"),
            (str(converted), "name a new folder"),
        ),
        (
            ("--from=compvis", f"--source={source}/model_index.json", "--workdir=x"),
            ("model_index",),
        ),
    ):
        assert command(*argv) == 2
        refused(capsys, *words)


def hostile(folder):
    class Hostile:
        def __reduce__(self):
            return (open, (str(folder / "touched"), "w"))

    return Hostile()


def test_a_hostile_pickle_is_refused(tmp_path, capsys):
    torch.save({"state_dict": {"x": hostile(tmp_path)}}, tmp_path / "model.ckpt")
    argv = (f"--source={tmp_path}/model.ckpt", f"--workdir={tmp_path}/run")
    assert command("--from=compvis", *argv) == 2
    refused(capsys, "model.ckpt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.ckpt"]


@pytest.mark.parametrize(("given", "null"), [(None, False), (False, False), (True, True)])
def test_classes_of_a_unet_are_the_datas_unless_said(capsys, given, null):
    config = ConfigDict({"model": {"denoiser": {"num_classes": 7}}, "conditioning": {}})
    reading._classes(config, "unet", given)
    assert config.conditioning.null_label is null
    assert ("all 7 classes are taken for the data's" in capsys.readouterr().out) == (given is None)
    of_dit = ConfigDict({"model": {"denoiser": {"num_classes": 7}}, "conditioning": {}})
    with pytest.raises(ValueError, match="null_label=True is of a U-Net of classes"):
        reading._classes(of_dit, "transformer", True)


@pytest.mark.parametrize(
    ("kind", "flag", "name"),
    [
        ("edm", "--null_label", "null_label"),
        ("diffusers", "--attention_order=new", "attention_order"),
        ("openai", "--tokenizer=somewhere", "tokenizer"),
        ("diffusers", "--config=configs/ldm_celebahq256.py", "config"),
    ],
)
def test_a_flag_that_is_not_read_is_refused(tmp_path, capsys, kind, flag, name):
    argv = (f"--from={kind}", f"--source={tmp_path}", f"--workdir={tmp_path}/run", flag)
    assert command(*argv) == 2
    refused(capsys, f"--{name} is not read with --from={kind}")


@pytest.mark.parametrize("mark", ["edm_mean", "edm_vpred.sigma_max"])
def test_files_of_edms_noise_are_refused(tmp_path, mark):
    path = tmp_path / "one.safetensors"
    with pytest.raises(ValueError, match=f"one.safetensors is marked {mark}"):
        single._header(ConfigDict(), {mark: np.zeros(1)}, path, "stable_diffusion.py:xl")
