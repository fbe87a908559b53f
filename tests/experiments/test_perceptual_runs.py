"""LPIPS through the commands: measured, in the loss, and of files that are none."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffusion.interop import perceptual
from experiments import train
from experiments.evaluate import __main__ as evaluate
from experiments.host import cli

CONFIG = "--config=configs/digits_autoencoder.py:smoke"
FILES = {"vgg": "vgg16.pth", "heads": "heads.pth"}


def run(module, *argv) -> int:
    return cli.run(module.define, module.main, argv)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def random_lpips(tmp_path_factory):
    """Flags that name files of random weights, as torchvision and `lpips` name theirs."""
    folder, rng, files = tmp_path_factory.mktemp("lpips"), np.random.default_rng(0), ({}, {})
    for path, leaf in jax.tree_util.tree_leaves_with_path(perceptual.shapes()):
        layer, kind = (key.key for key in path[-2:])
        number = int(layer.rsplit("_", 1)[1])
        x = rng.normal(size=leaf.shape).astype(np.float32) * 0.1
        x = np.ascontiguousarray(x.transpose(3, 2, 0, 1) if x.ndim == 4 else x)
        if layer.startswith("head"):
            files[1][f"lin{number}.model.1.weight"] = np.abs(x)
        else:
            name = {"kernel": "weight", "bias": "bias"}[kind]
            files[0][f"features.{perceptual.PLACES[number]}.{name}"] = x
    for name, tensors in zip(FILES, files):
        save_file(tensors, folder / f"{name}.safetensors")
    return [f"--config.perceptual.{name}={folder}/{name}.safetensors" for name in FILES]


def test_lpips_that_the_loss_does_not_use_is_measured(job, random_lpips, tmp_path):
    argv = [f"--config.data.dir={job}/data", f"--workdir={tmp_path}/run", *random_lpips]
    argv += ["--config.train.steps=2", "--config.evaluation.every_steps=2"]
    argv += ["--config.evaluation.preview=0", "--config.evaluation.examples=16"]
    assert run(train, CONFIG, *argv) == 0
    found = rows(tmp_path / "run")
    (logged,) = [row["eval_lpips"] for row in found if "eval_lpips" in row]
    argv = ["--metrics=reconstruction", "--num=16", f"--classifier={job}/classifier"]
    argv += [f"--workdir={tmp_path}/run", f"--out={tmp_path}/numbers.json"]
    assert run(evaluate, *argv) == 0
    wanted = json.loads((tmp_path / "numbers.json").read_text())["reconstruction"]["lpips"]
    assert logged > 0
    np.testing.assert_allclose(logged, wanted, rtol=1e-5)


@pytest.mark.slow  # VGG-16 forward and back
def test_lpips_in_the_loss_is_logged_and_weighed(job, random_lpips, tmp_path):
    argv = [f"--config.data.dir={job}/data", *random_lpips, "--config.evaluation.every_steps=4"]
    argv += ["--config.evaluation.preview=0", "--config.evaluation.examples=16"]
    for weight in ("0.5", "2.0"):
        more = (f"--workdir={tmp_path}/{weight}", f"--config.loss.perceptual_weight={weight}")
        assert run(train, CONFIG, *argv, *more) == 0
    first, second = (rows(tmp_path / weight)[0] for weight in ("0.5", "2.0"))
    assert first["lpips"] == second["lpips"] > 0
    values = 32 * 32 * 3 if first["reconstruction"] > 1 else 1
    np.testing.assert_allclose(
        second["loss"] - first["loss"], 1.5 * values * first["lpips"], rtol=1e-4
    )
    assert rows(tmp_path / "0.5")[-1]["eval_lpips"] > 0


def test_a_corrupt_weights_file_is_refused(job, tmp_path, capsys):
    (tmp_path / "vgg16.pth").write_bytes(b"PK\x03\x04" + bytes(200))
    (tmp_path / "heads.pth").write_bytes(b"")
    argv = [f"--config.perceptual.{n}={tmp_path}/{f}" for n, f in FILES.items()]
    argv += ["--config.loss.perceptual_weight=1.0", f"--config.data.dir={job}/data"]
    assert run(train, CONFIG, f"--workdir={tmp_path}/run", *argv) == 2
    (error,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert all(word in error for word in ("vgg16.pth", "corrupt", "fetch it again"))
    assert not (tmp_path / "run").exists()
