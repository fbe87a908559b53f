"""The default job ran: its files, its numbers, and what sampling promises."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import threading
import time

import numpy as np
import pytest
from PIL import Image

from experiments import sample, train
from experiments.host import cli
from experiments.host.guards import StopOnSignal
from experiments.plan import cost
from experiments.quickstart import stages
from experiments.run import generate


def test_the_job_leaves_what_it_promises(job):
    for name in ("samples.png", "denoising.png", "loss.png"):
        with Image.open(job / name) as picture:
            assert min(picture.size) > 60
    results = json.loads((job / "results.json").read_text())
    for key in ("adherence", "adherence_held_out"):
        assert {"digit", "colour", "background", "size", "place", "all"} <= results[key].keys()
        assert 0 <= results[key]["all"] <= min(results[key]["digit"], results[key]["colour"])
    assert results["autoencoder"]["psnr"] > 0
    assert results["frechet_distance"] > 0
    names = {"prepare_data", "autoencoder, classifier", "encode_latents", "ldm", "evaluate"}
    assert names <= results["seconds"].keys() & results["processor_secs"].keys()
    assert results["seed"] == 0 and "jax" in results["versions"]
    for name in ("autoencoder", "classifier", "ldm"):
        rows = [
            json.loads(line) for line in (job / name / "metrics.jsonl").read_text().splitlines()
        ]
        steps = [row["step"] for row in rows if "loss" in row]
        assert steps == [1, 2, 3, 4]
        keys = {"examples_per_sec", "learning_rate", "grad_norm", "param_norm", "data_wait_secs"}
        assert keys <= rows[0].keys()
        card = (job / name / "README.md").read_text()
        assert "MNIST" in card and "Intended use" in card and "Limits" in card
        config = json.loads((job / name / "config.json").read_text())
        assert config["train"]["steps"] == 4


def test_pngs_carry_how_they_were_made(job, tmp_path):
    argv = [f"--workdir={job}/ldm", "--num=3", "--prompt=a small red seven", f"--out={tmp_path}"]
    assert cli.run(sample.define, sample.main, [*argv, "--seed=5", "--steps=2"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *[f"0000{i}.png" for i in range(3)],
        "grid.png",
    ]
    with Image.open(tmp_path / "00001.png") as picture:
        text = picture.info
        assert picture.size == (32, 32)
    assert text["prompt"] == "a small red seven" and text["seed"] == "5" and text["generated"]
    assert text["sampler"] == "dpmpp_2m" and len(text["checkpoint"]) == 16


def test_samples_do_not_depend_on_the_batch_size(job):
    pipeline = generate.load(job / "ldm").pipeline.changed(steps=2)
    prompts = ["a small red seven at the top left on black", "a large blue one"]
    columns = pipeline.columns(prompts)

    def made(size, *seeds):
        batches = dataclasses.replace(pipeline, batch_size=size).images(columns, 5, seeds)
        return np.concatenate(list(batches))

    whole, ragged = (made(size, 3) for size in (5, 2))
    assert whole.shape == (5, 32, 32, 3) and whole.dtype == np.uint8
    assert np.abs(whole.astype(int) - ragged).max() <= 1
    both = made(4, 3, 4)  # a batch holds pictures of both seeds
    assert np.abs(whole.astype(int) - both[:5]).max() <= 1
    assert np.abs(whole.astype(int) - both[5:]).max() > 1


def test_guidance_and_prompt_change_the_picture(job):
    pipeline = generate.load(job / "ldm", which="raw").pipeline

    def picture(prompt, scale):
        made = pipeline.changed(steps=2, guidance_scale=scale)
        return next(made.images(made.columns([prompt]), 1)).astype(int)

    seven = picture("a red seven", 4.0)
    assert np.abs(seven - picture("a large blue zero at the top", 4.0)).max() > 0
    assert np.abs(seven - picture("a red seven", 1.0)).max() > 0
    # Towards no words there is nothing to guide.
    assert np.abs(picture("", 4.0) - picture("", 1.0)).max() <= 1


def test_the_same_command_again_has_nothing_to_do_and_more_steps_extend(job, tmp_path):
    directory = shutil.copytree(job / "classifier", tmp_path / "classifier")
    config = json.loads((directory / "config.json").read_text())
    argv = ["--config=configs/digits_classifier.py:smoke", f"--workdir={directory}"]
    argv.append(f"--config.data.dir={config['data']['dir']}")
    before = (directory / "metrics.jsonl").read_text()
    assert cli.run(train.define, train.main, argv) == 0
    assert (directory / "metrics.jsonl").read_text() == before
    assert cli.run(train.define, train.main, [*argv, "--config.train.steps=5"]) == 0
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5]


def test_plan_counts_what_training_makes(job):
    from diffusion.checkpoint import restore_params
    from experiments.run import workdir

    config = workdir.read_config(job / "ldm")
    saved = restore_params(job / "ldm" / "checkpoints").items["params"]
    networks = cost.plan(config)["networks"]
    for name in ("denoiser", "text_encoder"):
        assert networks[name]["parameters"] == cost.count(saved[name])
    assert networks["autoencoder"]["parameters"] > 0


# -- stages side by side -------------------------------------------------------------------------


def trains(secs=20.0):
    """As a stage that trains: until a signal, which it answers by saving."""
    with StopOnSignal() as stop:
        until = time.monotonic() + secs
        while not stop.requested and time.monotonic() < until:
            time.sleep(0.02)
    raise stages.Stopped("autoencoder")


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_a_stage_beside_another_is_waited_for_and_its_lines_are_named(capsys):
    before = handlers()
    with stages.beside("judge", "prints", ["this"]):
        pass
    assert "judge: Namespaces are one honking great idea" in capsys.readouterr().out
    assert handlers() == before


def test_a_stage_that_fails_stops_the_other_and_is_named():
    begun, before = time.monotonic(), handlers()
    with pytest.raises(ValueError, match=r"judge, which ran beside .* status 2 \(.*no-such-file"):
        with stages.beside("judge", "fails", ["json.tool", "no-such-file"]):
            trains()
    assert time.monotonic() - begun < 15 and handlers() == before


@pytest.mark.parametrize("how", ["error", "signal"])
def test_a_stage_that_ends_early_stops_the_one_beside_it(how, monkeypatch):
    begun, popen = [], subprocess.Popen
    monkeypatch.setattr(
        stages.subprocess, "Popen", lambda *a, **k: begun.append(popen(*a, **k)) or begun[-1]
    )
    expected = ValueError if how == "error" else stages.Stopped
    with pytest.raises(expected, match="autoencoder"):
        with stages.beside("judge", "for ever", ["http.server", "--bind=127.0.0.1", "0"]):
            if how == "error":
                raise ValueError("autoencoder")
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
            trains()
    assert len(begun) == 1 and begun[0].poll() is not None
