"""Writers: whole lines, no step twice, and a run that needs neither TensorFlow nor wandb."""

import io
import json
import logging
import os
import pathlib
import subprocess
import sys
import textwrap
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import writers
from diffusion.redact import redact
from diffusion.writers import (
    Console,
    Jsonl,
    Multi,
    TensorBoard,
    WandB,
    Writer,
    make_wandb,
    make_writer,
)

ROOT = pathlib.Path(__file__).parents[1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Recorder(Writer):
    """What was called, in order."""

    def __init__(self, calls, fail=False):
        self.calls, self.fail = calls, fail

    def scalars(self, step, values):
        self.calls.append(("scalars", step, values))

    def images(self, step, images):
        self.calls.append(("images", step, images))

    def hparams(self, values):
        self.calls.append(("hparams", values))

    def message(self, text):
        self.calls.append(("message", text))

    def close(self):
        self.calls.append(("close",))
        if self.fail:
            raise OSError("full")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# -------------------------------------------------------------------------------- jsonl


def test_jsonl_one_object_a_step_with_step_first(tmp_path):
    writer = Jsonl(tmp_path / "run" / "metrics.jsonl")
    writer.scalars(10, {"loss": jnp.float32(0.5), "count": np.int32(3), "rate": 1e-4})
    writer.scalars(20, {"loss": float("nan"), "grad_norm": np.float32(np.inf)})
    text = writer.path.read_text()
    assert text.splitlines()[0] == '{"step": 10, "loss": 0.5, "count": 3, "rate": 0.0001}'
    assert lines(writer.path)[1] == {"step": 20, "loss": None, "grad_norm": None}
    assert "NaN" not in text
    writer.close()
    writer.close()


def test_jsonl_is_whole_after_every_call_without_close(tmp_path):
    writer = Jsonl(tmp_path / "m.jsonl")
    for step in range(3):
        writer.scalars(step, {"loss": step})
        assert [line["step"] for line in lines(writer.path)] == list(range(step + 1))
    writer.close()


@pytest.mark.parametrize("cut", range(1, 27))
def test_jsonl_torn_at_any_byte_is_repaired(tmp_path, cut):
    path = tmp_path / "m.jsonl"
    whole = '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n'
    path.write_text(whole[: 25 + cut - 1])
    writer = Jsonl(path)
    writer.scalars(3, {"loss": 3.0})
    writer.close()
    steps = [line["step"] for line in lines(path)]
    assert steps == ([1, 2, 3] if cut == 26 else [1, 3])
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_jsonl_drops_zeroed_and_foreign_lines(tmp_path, caplog):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bytes(40) + b'\n"text"\n{"loss": 1}\n[]\n{"step": 4}\n')
    Jsonl(path).close()
    assert [line["step"] for line in lines(path)] == [1, 4]
    assert "dropped 4 torn lines" in caplog.text


def test_jsonl_resume_logs_no_step_twice(tmp_path):
    path = tmp_path / "m.jsonl"
    writer = Jsonl(path, resume_step=0)
    for step in range(10, 60, 10):
        writer.scalars(step, {"loss": step})
    writer.close()
    writer = Jsonl(path, resume_step=30)
    assert [line["step"] for line in lines(path)] == [10, 20, 30]
    for step in range(40, 70, 10):
        writer.scalars(step, {"loss": step})
    writer.close()
    assert [line["step"] for line in lines(path)] == [10, 20, 30, 40, 50, 60]
    before = path.stat().st_ino
    Jsonl(path, resume_step=60).close()
    assert path.stat().st_ino == before  # nothing to drop: not rewritten
    Jsonl(path, resume_step=0).close()
    assert path.read_text() == ""


def test_jsonl_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    writer = Jsonl(tmp_path / "m.jsonl")
    writer.scalars(1, {"loss": 1})
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    with pytest.raises(OSError, match="no space for the metrics of step 2"):
        writer.scalars(2, {"loss": 2})
    monkeypatch.undo()
    writer.scalars(3, {"loss": 3})
    writer.close()
    assert [line["step"] for line in lines(writer.path)] == [1, 3]


# ------------------------------------------------------------------------------ console


def test_console_plain_lines(monkeypatch):
    clock = iter([99.0, 100.0, 110.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    console = Console(1000, stream=stream)
    console.message("2 processes, 4 devices")
    console.scalars(100, {"loss": 0.51234, "examples_per_sec": 12345.6})
    console.scalars(200, {"loss": 0.25})
    console.scalars(200, {"eval/psnr": 25.31})
    console.close()
    assert stream.getvalue().splitlines() == [
        "2 processes, 4 devices",
        "step 100/1,000  loss 0.5123  12,346 examples/s",
        "step 200/1,000  loss 0.25  1 min 20 s left",
        "step 200: eval/psnr 25.31",
    ]


def test_console_rewrites_in_place_on_a_terminal():
    stream = Terminal()
    console = Console(10, stream=stream)
    console.scalars(1, {"loss": 1.0})
    console.scalars(2, {"loss": float("nan")})
    assert "\n" not in stream.getvalue()
    assert stream.getvalue().count("\r") == 1
    console.message("saved")
    console.scalars(3, {"loss": 1.0})
    console.close()
    text = stream.getvalue()
    assert "loss nan" in text
    assert "\rsaved\x1b[K\nstep 3/10" in text
    assert text.endswith("\n")


# ------------------------------------------------------------------- multi, make_writer


def test_multi_forwards_everything_to_all_and_closes_all():
    calls = []
    image = np.zeros((1, 2, 2, 3), np.uint8)
    multi = Multi([Recorder(calls, fail=True), Recorder(calls)])
    multi.scalars(1, {"loss": 1})
    multi.images(2, {"samples": image})
    multi.hparams({"a": 1})
    multi.message("text")
    with pytest.raises(OSError, match="full"):
        multi.close()
    expected = [("scalars", 1, {"loss": 1}), ("images", 2, {"samples": image}),
                ("hparams", {"a": 1}), ("message", "text"), ("close",)]  # fmt: skip
    assert calls == [call for call in expected for _ in range(2)]


@pytest.fixture
def no_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)


def test_make_writer(tmp_path, no_tensorflow, capsys):
    silent = make_writer(tmp_path / "other", "disabled", "p", 10, {}, is_main=False)
    silent.scalars(1, {"loss": 1})
    assert not (tmp_path / "other").exists()
    writer = make_writer(tmp_path, "disabled", "p", 10, {"seed": 0}, 0)
    writer.scalars(5, {"loss": 1.0})
    writer.images(5, {"samples": np.zeros((1, 4, 4, 3), np.uint8)})
    writer.close()
    assert [type(w).__name__ for w in writer.writers] == ["Jsonl", "Console", "Writer", "Writer"]
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 5, "loss": 1.0}]
    assert "step 5/10  loss 1" in capsys.readouterr().err


def test_unknown_wandb_mode_is_refused_before_anything_is_touched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n')
    with pytest.raises(ValueError, match=r"wandb.mode is 'on'; choose one of auto, online"):
        make_writer(tmp_path, "on", "p", 10, {}, resume_step=0)
    assert path.read_text() == '{"step": 5}\n'


# -------------------------------------------------------------------------- tensorboard


def run_python(code, *arguments, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=120
    )


def test_without_tensorflow_tensorboard_is_off_and_says_so_once(tmp_path):
    run = run_python(
        """
        import sys
        sys.modules["tensorflow"] = None
        from diffusion.writers import make_writer
        writer = make_writer(sys.argv[1], "disabled", "p", 10, {"seed": 1})
        for step in range(1, 11):
            writer.scalars(step, {"loss": 1.0})
        writer.close()
        """,
        tmp_path,
    )
    assert run.stderr.count("TensorBoard is off") == 1
    assert len(lines(tmp_path / "metrics.jsonl")) == 10


def test_importing_writers_imports_nothing_heavy():
    run = run_python(
        """
        import sys, diffusion.writers, diffusion.checkpoint
        print(sorted({"tensorflow", "torch", "wandb", "clu"} & set(sys.modules)))
        """
    )
    assert run.stdout.strip() == "[]"


def test_tensorboard_through_clu(tmp_path, monkeypatch):
    """With stand-ins for TensorFlow and clu: what is handed to `SummaryWriter`."""
    calls = []

    class SummaryWriter:
        def __init__(self, directory):
            calls.append(directory)

        def __getattr__(self, name):
            return lambda *arguments: calls.append((name, *arguments))

    tensorflow = types.ModuleType("tensorflow")
    hide = lambda *arguments: calls.append(arguments)  # noqa: E731
    tensorflow.config = types.SimpleNamespace(set_visible_devices=hide)
    metric_writers = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    clu = types.ModuleType("clu")
    clu.metric_writers = metric_writers
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    monkeypatch.setitem(sys.modules, "clu", clu)
    writer = TensorBoard(tmp_path)
    writer.scalars(3, {"loss": jnp.float32(2)})
    writer.hparams({"optim": {"lr": 0.1, "betas": (0.9, 0.99)}, "api_key": "x"})
    writer.close()
    assert calls == [
        ([], "GPU"),
        str(tmp_path),
        ("write_scalars", 3, {"loss": 2.0}),
        ("write_hparams", {"optim.lr": 0.1, "optim.betas": "(0.9, 0.99)"}),
        ("close",),
    ]


# -------------------------------------------------------------------------------- wandb


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return monkeypatch


def test_wandb_mode_follows_key_login_and_variable(no_key, tmp_path):
    assert writers.resolve_wandb_mode("auto") == "offline"
    (tmp_path / "netrc").write_text("machine other.example login user password abc\n")
    assert writers.resolve_wandb_mode("auto") == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password abc\n")
    assert writers.resolve_wandb_mode("auto") == "online"
    (tmp_path / "netrc").write_text("not a netrc file\n")
    assert writers.resolve_wandb_mode("auto") == "offline"
    no_key.setenv("WANDB_API_KEY", "k" * 40)
    assert writers.resolve_wandb_mode("auto") == "online"
    assert writers.resolve_wandb_mode("offline") == "offline"
    no_key.setenv("WANDB_MODE", "disabled")
    assert writers.resolve_wandb_mode("auto") == "disabled"
    assert writers.resolve_wandb_mode("online") == "online"


@pytest.fixture
def stub(monkeypatch):
    """A wandb that records; `stub.unreachable` makes online runs fail."""
    module = types.ModuleType("wandb")
    module.calls, module.unreachable = [], False

    class Error(Exception):
        pass

    def init(**arguments):
        module.calls.append(("init", arguments))
        if module.unreachable and arguments["mode"] == "online":
            raise Error("no network")
        run = types.SimpleNamespace()
        for name in ("define_metric", "log", "finish"):
            setattr(run, name, lambda *a, _n=name, **k: module.calls.append((_n, *a)))
        run.config = types.SimpleNamespace(update=lambda v, **k: module.calls.append(("config", v)))
        return run

    module.Error, module.init, module.teardown = Error, init, lambda: None
    module.Settings = lambda **settings: settings
    module.Image = lambda array: array.shape
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_hands_over_scalars_images_and_config_and_resumes_its_run(stub, tmp_path):
    for _ in range(2):
        writer = WandB(tmp_path, "offline", "project")
        writer.hparams({"seed": 1, "wandb": {"api_key": "k" * 40, "project": "p"}})
        writer.scalars(7, {"loss": jnp.float32(0.5)})
        writer.images(7, {"samples": np.zeros((2, 4, 4, 1), np.uint8)})
        writer.close()
    first, second = (c[1] for c in stub.calls if c[0] == "init")
    assert first["id"] == second["id"] == (tmp_path / "wandb_id").read_text()
    assert (first["mode"], first["project"], first["resume"]) == ("offline", "project", "allow")
    assert stub.calls[1:6] == [
        ("define_metric", "*"),
        ("config", {"seed": 1, "wandb": {"project": "p"}}),
        ("log", {"step": 7, "loss": 0.5}),
        ("log", {"step": 7, "samples": [(4, 4), (4, 4)]}),
        ("finish",),
    ]


def test_wandb_unreachable_goes_offline(stub, tmp_path, caplog):
    stub.unreachable = True
    make_wandb(tmp_path, "online", "p").close()
    assert [c[1]["mode"] for c in stub.calls if c[0] == "init"] == ["online", "offline"]
    assert "logging offline" in caplog.text


def test_wandb_missing(monkeypatch, no_key, tmp_path, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert type(make_wandb(tmp_path, "auto", "p")) is Writer
    assert "Weights & Biases is off" in caplog.text
    with pytest.raises(ValueError, match="needs the package wandb"):
        make_wandb(tmp_path, "offline", "p")
    assert type(make_wandb(tmp_path, "disabled", "p")) is Writer
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n')
    with pytest.raises(ValueError, match="needs the package wandb"):
        make_writer(tmp_path, "offline", "p", 10, {}, resume_step=0)
    assert path.read_text() == '{"step": 5}\n'


def test_wandb_offline_writes_scalars_without_an_account(tmp_path):
    pytest.importorskip("wandb")
    key = "0123456789abcdef" * 2 + "01234567"
    run_python(
        """
        import sys, numpy as np
        from diffusion.writers import WandB
        writer = WandB(sys.argv[1], "offline", "test")
        writer.hparams({"a_parameter": 3, "api_key": "0123456789"})
        writer.scalars(5, {"a_scalar": 0.5})
        writer.images(5, {"samples": np.zeros((1, 4, 4, 3), np.uint8)})
        writer.close()
        """,
        tmp_path,
        WANDB_MODE="offline",
        WANDB_API_KEY=key,
        HOME=str(tmp_path),
    )
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert run.name.endswith((tmp_path / "wandb_id").read_text())
    (log,) = run.glob("*.wandb")
    content = log.read_bytes()
    assert b"a_scalar" in content
    assert b"a_parameter" in content
    assert list(run.rglob("samples*.png"))
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert key.encode() not in path.read_bytes(), path
            assert b"0123456789" not in path.read_bytes(), path


# ------------------------------------------------------------------------------ secrets


def test_redact(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    config = {
        "api_key": "x", "wandb": {"mode": "auto", "API-KEY": "x", "note": "f" * 40},
        "model": {"tokenizer": "bpe", "max_tokens": 77, "key_dim": 64, "heads": (1, 2)},
        "hub_token": "x", "password": "x", "empty_password": "", "author": "me",
        "urls": ["https://me:pw@host/x", "https://host/x"], "other": "hf_" + "a" * 30,
    }  # fmt: skip
    assert redact(config) == {
        "wandb": {"mode": "auto"},
        "model": {"tokenizer": "bpe", "max_tokens": 77, "key_dim": 64, "heads": (1, 2)},
        "empty_password": "", "author": "me", "urls": ["https://host/x"],
    }  # fmt: skip
    assert config["api_key"] == "x"


def test_the_silent_writer_does_nothing(caplog):
    caplog.set_level(logging.DEBUG)
    writer = writers.Writer()
    writer.scalars(1, {"loss": 1})
    writer.images(1, {})
    writer.hparams({})
    writer.message("x")
    writer.close()
    assert not caplog.records
