"""LoRA and ControlNet on the default job: what trains, what stays, what is written and refused."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from diffusion.checkpoint import restore_params
from diffusion.data import loader, transforms
from diffusion.data.builders.captioned_digits import compose
from experiments import sample, train
from experiments.convert import __main__ as convert
from experiments.evaluate import __main__ as evaluate
from experiments.evaluate import adapters
from experiments.host import cli
from experiments.run import data, generate, networks, workdir

WIDTHS = "--config.model.controlnet.hint_widths"


def run(command, *argv) -> int:
    return cli.run(command.define, command.main, [str(a) for a in argv])


def trained(job, target, name, *argv) -> int:
    given = (f"--config.init_from={job}/ldm", f"--config.data.dir={job}/data", *argv)
    return run(train, f"--config=configs/{name}.py:smoke", f"--workdir={target}", *given)


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)))


def square(text):
    """A large square of the colour that a text names, on black."""
    colours = compose.COLOURS | compose.NEW_COLOURS
    (colour,) = (colours[w] for w in text.replace(",", " ").split() if w in colours)
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[6:26, 6:26] = colour
    return picture


def near(found, wanted):
    """Precision, recall and F of edges within one pixel: every pair of pixels compared."""
    e, w = np.argwhere(found), np.argwhere(wanted)
    close = np.abs(e[:, None] - w[None]).max(-1) <= 1
    precision, recall = close.any(1).mean(), close.any(0).mean()
    return precision, recall, 2 * precision * recall / (precision + recall)


def test_lora_trains_updates_alone_and_writes_diffusers_file(job, tmp_path, monkeypatch):
    target = tmp_path / "lora"
    assert trained(job, target, "digits_lora") == 0
    saved = restore_params(target / "checkpoints").items["params"]
    assert set(saved) == {"lora"}
    base, found = networks.load(job / "ldm"), networks.load(target)
    assert same(base.params["text_encoder"], found.params["text_encoder"])
    assert same(base.params["autoencoder"], found.params["autoencoder"])
    assert not same(base.params["denoiser"], found.params["denoiser"])  # the updates are merged
    changed = [
        (a != b).any()
        for a, b in zip(
            *(jax.tree.leaves(n.params["denoiser"]) for n in (base, found)), strict=True
        )
    ]
    # q, k, v and out of the two attentions in the middle; the projections of the pooled caption.
    assert sum(changed) == 17
    np.testing.assert_array_equal(base.extra["latent_scale"], found.extra["latent_scale"])
    argv = ("--to=diffusers", f"--workdir={target}", f"--out={tmp_path}/out")
    assert run(convert, *argv) == 0
    tensors = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert len(tensors) == 2 * 17  # down and up
    # The file on the base is the run.
    given = (f"--lora={tmp_path}/out/pytorch_lora_weights.safetensors", "--weights=ema")
    for name, source, more in (("a", target, ()), ("b", job / "ldm", given)):
        argv = (f"--workdir={source}", "--num=2", "--prompt=a red one", "--npz", *more)
        assert run(sample, *argv, f"--out={tmp_path}/{name}", "--steps=4") == 0
    a, b = (np.load(tmp_path / name / "samples.npz")["images"].astype(int) for name in "ab")
    assert np.abs(a - b).max() <= 1
    judged = (f"--workdir={target}", f"--classifier={job}/classifier", "--metrics=colour")
    judged += ("--num=30", "--steps=2", "--weights=ema")
    assert run(evaluate, *judged) == 0
    results = json.loads((target / "evaluation.json").read_text())
    assert results["adapter"] == "lora" and results["sample"]["steps"] == 2
    assert results["yellow"].keys() == results["palette"].keys() == {"before", "after"}
    with Image.open(target / "evaluation_colour.png") as picture:
        assert min(picture.size) > 100
    # What is said of pictures that are known: red ones before, those asked for after.
    asked = []

    def painted(samples, texts, extra):
        after = samples.run.directory == target
        asked.append((after, texts))
        return np.stack([square(text if after else "red") for text in texts])

    monkeypatch.setattr(adapters, "_made", painted)
    assert run(evaluate, *judged, f"--out={tmp_path}/known.json") == 0
    known = json.loads((tmp_path / "known.json").read_text())
    red = np.mean([" red " in text.replace(",", " ") for text in asked[1][1]])
    assert known["yellow"]["before"]["colour"] == 0 < red < 1
    assert known["yellow"]["after"]["colour"] == 1 == known["palette"]["after"]["colour"]
    assert known["palette"]["before"]["colour"] == pytest.approx(red)
    assert all("yellow" in text for _, texts in asked[::2] for text in texts)
    # The same command again has nothing to do.
    assert trained(job, target, "digits_lora") == 0


def test_a_controlnet_starts_from_the_unet_and_steers(job, tmp_path):
    target = tmp_path / "control"
    assert trained(job, target, "digits_controlnet") == 0
    saved = restore_params(target / "checkpoints").items["params"]
    assert set(saved) == {"controlnet"}
    base = networks.load(job / "ldm").params["denoiser"]
    steps = np.abs(saved["controlnet"]["conv_in"]["kernel"] - base["conv_in"]["kernel"])
    assert steps.max() < 0.05  # a few steps away from the U-Net's
    assert np.abs(saved["controlnet"]["zero_mid"]["kernel"]).max() > 0
    argv = (f"--workdir={target}", f"--classifier={job}/classifier", "--metrics=outline")
    assert run(evaluate, *argv, "--num=8", "--weights=ema", f"--out={tmp_path}/out") == 0
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    with Image.open(tmp_path / "out" / "evaluation_outline.png") as picture:
        assert min(picture.size) > 100
    # What it says of both models, from samples made here.
    config = workdir.read_config(target)
    source, steps = data.open_images(config, "test")
    index = np.arange(8)
    batch = loader.fetch(source, index, np.zeros_like(index), index, steps)
    hint = transforms.edges(batch["image"])
    given = {"hint_0": hint, "hint_scale_0": np.ones(1, np.float32)}
    for when, where, more in (("before", job / "ldm", {}), ("after", target, given)):
        pipeline = generate.load(where).pipeline
        columns = pipeline.columns(batch["caption"]) | more
        pixels = np.concatenate(list(pipeline.images(columns, 8)))
        found, asked = (edges[..., 0] > 0 for edges in (transforms.edges(pixels), hint))
        scores = np.mean([near(e, w) for e, w in zip(found, asked)], axis=0)
        wanted = dict(zip(("precision", "recall", "f"), scores))
        assert results[when]["outline"] == pytest.approx(wanted, abs=2e-3)
        assert min(scores) < 0.99  # not edges compared with themselves
    # The run's ControlNet beside the base's U-Net is the run.
    pipeline = generate.load(target).pipeline
    assert len(pipeline.task.controlnets) == 1


@pytest.mark.parametrize(
    ("name", "argv", "words"),
    [
        ("digits_lora", ("--config.init_from=nowhere",), ("--config.init_from=nowhere", "no run")),
        ("digits_lora", ("--config.data.colour=pink",), ("pink", "yellow")),
        (
            "digits_lora",
            ("--config.model.denoiser.channels=64",),
            ("model.denoiser.channels", "64", "32"),
        ),
        ("digits_lora", ("--config.model.lora.rank=0",), ("rank=0",)),
        ("digits_controlnet", ("--config.conditioning.control=depth",), ("depth", "edges")),
        ("digits_controlnet", ("--config.data.flip=True",), ("data.flip=True", "set it to False")),
        (
            "digits_controlnet",
            ("--config.model.controlnet.hint_widths=(8,8)",),
            ("hint_widths=(8, 8)", "3 widths"),
        ),
    ],
)
def test_what_does_not_fit_is_refused(job, tmp_path, capsys, name, argv, words):
    assert trained(job, tmp_path / "run", name, *argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert not (tmp_path / "run").exists()


def test_a_run_without_an_adapter_is_refused(job, capsys):
    argv = (f"--workdir={job}/ldm", f"--classifier={job}/classifier")
    for name, kind in (("colour", "lora"), ("outline", "controlnet")):
        assert run(evaluate, *argv, f"--metrics={name}") == 2
        error = capsys.readouterr().err
        assert "without an adapter" in error and f"configs/digits_{kind}.py" in error


def test_a_config_from_before_a_key_was_there_still_opens(job, tmp_path):
    config = json.loads((job / "ldm" / "config.json").read_text())
    del config["ema"]["networks"], config["conditioning"]["concat"], config["init_from"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = workdir.read_config(tmp_path)
    assert found.init_from == "" and found.conditioning.concat == ""
    assert found.process.schedule.to_dict() == config["process"]["schedule"]


def test_a_run_of_another_task_is_refused_with_those_that_are_taken(job, tmp_path, capsys):
    given = f"--config.init_from={job}/classifier"
    assert trained(job, tmp_path / "run", "digits_lora", given) == 2
    assert "task='classifier': name one of 'denoiser' or 'autoencoder'" in capsys.readouterr().err
    argv = (f"--workdir={job}/autoencoder", f"--out={tmp_path}/out", "--num=1")
    assert run(sample, *argv) == 2
    error = capsys.readouterr().err
    assert "task='autoencoder': name one of 'denoiser'" in error and "or 'auto" not in error
