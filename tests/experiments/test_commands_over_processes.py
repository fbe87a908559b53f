"""Sampling, evaluation and latent encoding by two processes give what one gives."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from experiments import sample, train
from experiments.evaluate import __main__ as evaluate
from experiments.host.cli import run as run_here

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def two():
    """Runs a command by two processes."""

    def run(command, *argv):
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
        base = [sys.executable, "-m", f"experiments.{command}", *argv]
        base += [f"--coordinator={address}", "--num_processes=2"]
        processes = [
            subprocess.Popen(
                [*base, f"--process_id={i}"],
                env=environment,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i in range(2)
        ]
        said = [process.communicate(timeout=900)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
        return said

    return run


def test_samples(job, tmp_path, two):
    argv = [f"--workdir={job}/ldm", "--num=5", "--prompt=a red seven", "--batch_size=4"]
    first, second = two("sample", *argv, f"--out={tmp_path}/two")
    assert "5 images" in first and "images" not in second  # one of them speaks
    assert run_here(sample.define, sample.main, [*argv, f"--out={tmp_path}/one"]) == 0
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        a, b = (np.asarray(Image.open(tmp_path / w / name), np.int16) for w in ("one", "two"))
        assert np.abs(a - b).max() <= 1 and a.std() > 0  # rounding to 8 bits


def test_latents(job, tmp_path, two):
    out = tmp_path / "latents"
    config = ["--config=configs/digits_ldm.py:smoke", f"--config.data.dir={out}"]
    config += [f"--config.latents.data_dir={job}/data"]
    config += [f"--config.latents.first_stage={job}/autoencoder"]
    two("encode_latents", *config)
    made, wanted = (
        json.loads((folder / "provenance.json").read_text()) for folder in (out, job / "latents")
    )
    assert made["files"].keys() == wanted["files"].keys() and made["count"] == wanted["count"]
    for key in ("mean", "std"):
        np.testing.assert_allclose(
            made["statistics"][key], wanted["statistics"][key], rtol=1e-4, atol=1e-5
        )


def test_evaluation(job, tmp_path, two):
    argv = [f"--workdir={job}/ldm", "--metrics=frechet_distance,psnr", "--steps=2", "--num=80"]
    argv += [f"--classifier={job}/classifier", "--weights=ema", "--replicates=0"]
    two("evaluate", *argv, f"--out={tmp_path}/two.json")
    assert run_here(evaluate.define, evaluate.main, [*argv, f"--out={tmp_path}/one.json"]) == 0
    one, both = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    np.testing.assert_allclose(one["autoencoder"]["psnr"], both["autoencoder"]["psnr"], rtol=1e-5)
    # Two processes see half of the images each; samples may differ by rounding to 8 bits.
    np.testing.assert_allclose(one["frechet_distance"], both["frechet_distance"], rtol=1e-3)
    for key in ("count", "data_sha256", "features"):
        assert one["reference"][key] == both["reference"][key]
    assert one["samples"] == both["samples"] == 80


@pytest.mark.slow  # two more runs to compile
def test_a_run_looks_at_samples_as_one_process_does(job, tmp_path, two):
    """Pictures and numbers of a run in progress, by one process and by two."""
    config = ["--config=configs/digits_ldm.py:smoke", f"--config.data.dir={job}/latents"]
    config += ["--config.train.steps=2", "--config.evaluation.every_steps=2"]
    config += ["--config.evaluation.samples=8", "--config.evaluation.preview=4"]
    config += [f"--config.evaluation.classifier={job}/classifier", "--config.parallel.data=-1"]
    config += [f"--config.latents.data_dir={job}/data"]
    two("train", *config, f"--workdir={tmp_path}/two")
    assert run_here(train.define, train.main, [*config, f"--workdir={tmp_path}/one"]) == 0
    one, both = (
        json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[-1])
        for n in ("one", "two")
    )
    judged = [name for name in one if name.endswith(("_ema", "_raw"))]
    assert len(judged) > 8 and both.keys() >= one.keys()
    for name in judged:
        np.testing.assert_allclose(both[name], one[name], rtol=1e-2, err_msg=name)
    (name,) = [path.name for path in (tmp_path / "one/previews").iterdir()]
    a, b = (np.asarray(Image.open(tmp_path / n / "previews" / name), int) for n in ("one", "two"))
    assert np.abs(a - b).max() <= 2 and a.std() > 0


@pytest.mark.slow  # two more runs to compile
def test_the_best_of_what_the_first_process_measures_is_kept_by_two(job, tmp_path, two):
    """A first stage's Frechet distance decides on every process which checkpoint is kept."""
    config = ["--config=configs/digits_autoencoder.py:smoke", f"--config.data.dir={job}/data"]
    config += ["--config.evaluation.every_steps=1", "--config.train.save_every_steps=1"]
    config += ["--config.evaluation.preview=0", "--config.evaluation.examples=64"]
    config += [f"--config.evaluation.classifier={job}/classifier", "--config.parallel.data=-1"]
    config += ["--config.train.keep_best=eval_frechet_distance", "--config.train.steps=3"]
    config += ["--config.train.keep_checkpoints=1"]
    two("train", *config, f"--workdir={tmp_path}/two")
    assert run_here(train.define, train.main, [*config, f"--workdir={tmp_path}/one"]) == 0
    one, both = (
        {
            row["step"]: row["eval_frechet_distance"]
            for row in map(json.loads, lines)
            if "eval_frechet_distance" in row
        }
        for lines in (
            (tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("one", "two")
        )
    )
    assert one.keys() == both.keys() == {1, 2, 3}
    np.testing.assert_allclose(list(both.values()), list(one.values()), rtol=1e-2)
    kept = {
        int(path.name) for path in (tmp_path / "two/checkpoints").iterdir() if path.name.isdigit()
    }
    assert kept == {min(both, key=both.get), 3}
