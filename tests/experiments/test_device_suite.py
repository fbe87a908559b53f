"""What is owed by hardware that is seldom at hand: the benchmark's rows and the plan's cells."""

import json

import pytest

from diffusion.models import target
from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import device
from experiments.host import cli
from experiments.plan import table
from experiments.plan import target as plan_target


def test_rows_are_measured_in_order_and_what_failed_is_tried_again(tmp_path, monkeypatch, capsys):
    asked = []

    def measured(name, out, left, smoke):
        asked.append(name)
        return {"failed": "no memory"} if asked == list(device.ROWS)[:2] else {"row": name}

    monkeypatch.setattr(device, "_in_a_process", measured)
    assert set(device.device(tmp_path, 0, smoke=True).values()) == {"no time left"}
    assert not asked and not list(tmp_path.iterdir())
    argv = ("--suite=device", f"--out={tmp_path}", "--budget_secs=100", "--smoke")
    assert cli.run(benchmark.define, benchmark.main, argv) == 0
    assert asked == list(device.ROWS) and asked[0] == "card"
    assert "no memory" in capsys.readouterr().out
    asked.clear()
    became = device.device(tmp_path, 100, smoke=True)
    assert asked == list(device.ROWS)[1:2] and set(became.values()) == {"there", "measured"}


def test_a_row_ends_with_its_time_or_says_why(tmp_path):
    assert device._in_a_process("card", tmp_path, 0.01, smoke=True) == {"failed": "not done in 0 s"}
    device_rows = {**device.ROWS, "wrong": ("step", {"config": "no_config", "batch": 1})}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "ROWS", device_rows)
        found = device._in_a_process("wrong", tmp_path, 100, smoke=True)
    assert "no_config" in found["failed"]


def test_the_card_and_its_numbers(monkeypatch):
    found = device.card({}, smoke=True)
    assert found["matmul_flops_per_sec"] > 1e8 and found["copy_bytes_per_sec"] > 1e7
    assert found["versions"].keys() == {"jax", "flax", "optax", "python"}
    monkeypatch.setattr(target, "of", lambda devices: target.Target("gpu"))  # its norm, here
    found = device.numbers({}, smoke=True)
    assert 0 < found["group_norm"]["difference"] < 2e-2
    assert found["attention_64_40"] == {"kernel": "xla", "difference": 0.0}


def test_the_suite_needs_a_folder(capsys):
    assert cli.run(benchmark.define, benchmark.main, ("--suite=device",)) == 2
    assert "--suite=device needs --out=DIR" in capsys.readouterr().err


def test_cells_are_compiled_once_and_the_others_say_so(tmp_path, monkeypatch, capsys):
    found = {
        "fits": True,
        "peak_bytes": 2**30,
        "batch_size": 512,
        "kernels": 1200,
        "copies": 3,
        "bytes_moved": 72e9,
        "bound_secs": 0.03,
        "launched_secs": 0.04,
        "peak_share": 0.5,
        "collectives": {
            "gradients": {"count": 2, "bytes": 2**20},
            "other": {"count": 0, "bytes": 0},
        },
    }
    asked = []

    def planned(config, aim, sample=False):
        asked.append((config.train.batch_size, aim))
        if aim == "v6e:2x4":
            raise ValueError("no compiler")
        return found if len(asked) > 1 else {"fits": False, "peak_bytes": None, "batch_size": 512}

    monkeypatch.setattr(plan_target, "planned", planned)
    assert cli.run(table.define, table.main, (f"--out={tmp_path}",)) == 0
    assert not asked and capsys.readouterr().out.count("not compiled") == len(table.CELLS)
    table.compile_cells(tmp_path, 100)
    assert asked[:2] == [(512, "h100:1"), (128, "h100:1")] and len(asked) == len(table.CELLS)
    table.compile_cells(tmp_path, 100)
    assert {aim for _, aim in asked[len(table.CELLS) :]} == {"v6e:2x4"}  # the others are there
    rows = table.table(tmp_path).splitlines()[2:]
    assert all(row.count("|") == 12 for row in rows)
    assert "no, more" in rows[0] and "30.0 (40.0) | 17,067 | 50% | gradients 2 of" in rows[1]
    assert sum("not compiled" in row for row in rows) == sum("v6e" in row for row in rows) > 0
    assert "no compiler" in capsys.readouterr().err
    assert len(list(tmp_path.glob("*.json"))) == sum("v6e" not in cell[1] for cell in table.CELLS)
    assert json.loads((tmp_path / "ddpm_cifar10_h100-1_512.json").read_text())["fits"] is False
