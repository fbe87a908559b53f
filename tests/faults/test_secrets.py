"""Keys and passwords that a run is given reach none of its files, and none of its output."""

import runpy

import jax
import pytest

from experiments import train
from experiments.host import cli
from experiments.run import workdir

KEY = "0123456789abcdef0123456789abcdef01234567"  # as long as one of wandb's
SECRETS = (KEY, "hf_" + "a1B2c3D4" * 4, "AKIA" + "Q" * 16, "hunter2")


@pytest.fixture
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def test_no_file_of_a_run_holds_a_secret(trials, tmp_path, one_device, capsys):
    config = runpy.run_path(f"{trials.here}/tiny.py")["get_config"]("denoiser")
    config.train.steps = 2
    config.wandb.project = KEY
    config.hub = {"api_key": "hunter2", "list": (SECRETS[1], "kept"), "url": f"s3://{SECRETS[2]}/x"}
    train.train(config.lock(), tmp_path / "run")
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert len(files) > 8
    for path in files:
        data = path.read_bytes()
        assert not [s for s in SECRETS if s.encode() in data], path
    shown = capsys.readouterr()
    assert not [s for s in SECRETS if s in shown.out + shown.err]
    assert list(workdir.read_config(tmp_path / "run").hub.list) == ["kept"]
    assert cli.flat(config)["hub.api_key"] == "hunter2"  # the run itself had them
