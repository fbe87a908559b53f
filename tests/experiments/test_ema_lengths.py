"""Averages of any length, made of a run's checkpoints; through the commands."""

import json

import jax
import numpy as np
import pytest

from diffusion.checkpoint import restore_params
from experiments import sample, train
from experiments.evaluate import __main__ as evaluate
from experiments.host import cli
from experiments.run import generate, networks
from tests.faults import tiny

STEPS = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory, config = tmp_path_factory.mktemp("profiles") / "run", tiny.get_config()
    config.ema.profiles = (0.05, 0.1, 0.2)
    config.train.update({"steps": STEPS, "save_every_steps": 1, "keep_every_steps": 1})
    config.sample.batch_size = 4
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: devices)
        assert train.train(config.lock(), directory)
    return directory


def distance(a, b):
    a, b = (np.concatenate([x.ravel() for x in jax.tree.leaves(tree)]) for tree in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def profiles(directory, step=None):
    return restore_params(directory / "checkpoints", ("profiles",), step).items["profiles"]


def test_a_tracked_length_is_the_one_that_was_kept(run):
    kept = profiles(run, 6)["0.2"]["denoiser"]
    assert distance(networks.load(run, "ema_0.2", 6).params["denoiser"], kept) < 1e-6
    assert distance(networks.load(run, "ema_0.2").params["denoiser"], kept) > 1e-5


def test_a_length_between_is_near_the_one_that_is_tracked(run):
    """Made of the two others, as if it had not been kept."""
    kept = profiles(run)["0.1"]["denoiser"]
    made = networks._profile(run / "checkpoints", (0.05, 0.2), 0.1, STEPS)[0]["denoiser"]
    assert distance(made, kept) < 1e-6
    assert distance(profiles(run)["0.05"]["denoiser"], kept) > 100 * distance(made, kept)


def test_an_earlier_checkpoint_guides(run, tmp_path):
    """Away from itself is nowhere; away from the first step somewhere; another shape is refused."""

    def sampled(name, worse, scale):
        flags = (f"--workdir={run}", "--num=2", "--npz", f"--guidance_scale={scale}")
        given = [*flags, f"--autoguidance={worse}", f"--out={tmp_path / name}"]
        assert cli.run(sample.define, sample.main, given) == 0
        return np.load(tmp_path / name / "samples.npz")["images"].astype(float)

    alone = sampled("alone", "", 1)
    assert np.abs(sampled("itself", run, 3) - alone).max() < 1e-4
    assert np.abs(sampled("first", run / "checkpoints" / "1", 3) - alone).max() > 1e-3
    with pytest.raises(ValueError, match=r"sample.autoguidance=.*holds no run"):
        generate.load(run, sample={"autoguidance": str(tmp_path / "nothing")})


def evaluated(*flags):
    return cli.run(evaluate.define, evaluate.main, ["--metrics=spectrum", "--num=4", *flags])


def test_lengths_are_evaluated_and_sampled(run, tmp_path):
    out = tmp_path / "found.json"
    assert evaluated(f"--workdir={run}", "--ema_length=0.05,0.15", f"--out={out}") == 0
    found = json.loads(out.read_text())["weights"]
    assert list(found) == ["ema_0.05", "ema_0.15"]
    assert found["ema_0.05"]["spectrum"] != found["ema_0.15"]["spectrum"]
    argv = [f"--workdir={run}", "--num=2", "--ema_length=0.1", f"--out={tmp_path}/made", "--npz"]
    assert cli.run(sample.define, sample.main, argv) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--ema_length=0.3",), "--ema_length=0.3 is outside the tracked 0.05 .. 0.2"),
        (("--ema_length=0.1", "--weights=raw"), "--weights=raw with --ema_length"),
        (("--ema_length=0.1,x",), "--ema_length=0.1,x must be numbers"),
    ],
)
def test_what_cannot_be_made_is_refused(run, flags, said, tmp_path, capsys):
    out = tmp_path / "found.json"
    assert evaluated(f"--workdir={run}", f"--out={out}", *flags) == 2
    assert said in capsys.readouterr().err and not out.exists()


def test_a_run_that_kept_none_is_told_what_to_train_with(job, capsys, tmp_path):
    argv = [f"--workdir={job}/ldm", "--num=2", "--ema_length=0.1", f"--out={tmp_path}/made"]
    assert cli.run(sample.define, sample.main, argv) == 2
    assert "ema.profiles=() kept none: train with two" in capsys.readouterr().err
