"""The benchmark's own honesty: its gate, its clock, and what it says of a wrong command."""

import json
import pathlib
import runpy
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from configs import ddpm_cifar10, digits_autoencoder, digits_ldm
from diffusion.data import loader
from experiments.benchmark import __main__ as command
from experiments.benchmark import alone, growth, show, workload
from experiments.host import cli

CONFIG = "configs/ddpm_cifar10.py:smoke"


def run(*argv):
    return cli.run(command.define, command.main, argv)


TUNABLES = "glibc.malloc.hugetlb=1"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two rounds of both sides on a tiny network, through the command."""
    out = tmp_path_factory.mktemp("benchmark")
    quick = ("--rounds=2", "--warmup=1", "--repeats=3", "--batch=2")
    files = (f"--out={out / 'train.json'}", f"--plot={out / 'train.png'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIBC_TUNABLES", TUNABLES)
        assert run(f"--config={CONFIG}", "--peer=diffusers", *quick, *files) == 0
    assert (out / "train.png").stat().st_size > 1000
    return json.loads((out / "train.json").read_text())


def test_both_sides_compute_the_same_before_they_are_timed(compared):
    gate = compared["gate"]
    assert gate["passed"] and gate["parameters"] == compared["parameters"]
    assert 0 < gate["output"] < 1e-5 and 0 < gate["gradient"] < 1e-5


def test_rates_are_those_of_the_times(compared):
    for side in compared["sides"].values():
        secs, rate = side["step_secs"], side["examples_per_sec"]
        assert 0 < secs["p10"] <= secs["median"] <= secs["p90"]
        np.testing.assert_allclose(rate["median"] * secs["median"], compared["batch"])
        assert len(side["round_medians"]) == 2 and set(side["first_step_secs"]) == {"cold", "warm"}
        speed = compared["flops"] / secs["median"]
        np.testing.assert_allclose(side["mfu"], speed / compared["ceiling"]["matmul_flops_per_sec"])
    rates = [compared["sides"][k]["examples_per_sec"]["median"] for k in ("ours", "diffusers")]
    np.testing.assert_allclose(compared["ratio"], rates[0] / rates[1])
    assert compared["environment"]["GLIBC_TUNABLES"] == TUNABLES
    assert "ratio" in show.table(compared) and "passed" in show.table(compared)


def test_sides_that_differ_get_no_ratio(tmp_path, monkeypatch, capsys):
    """The peer is handed other weights than those that our outputs were made with."""
    real = command.run

    def wrong(module, what, work, directory, cache=None):
        if what == "gate":
            from safetensors.numpy import load_file, save_file

            (path,) = (directory / workload.WEIGHTS).glob("*.safetensors")
            tensors = load_file(path)
            tensors["conv_in.bias"] = tensors["conv_in.bias"] + 0.01
            save_file(tensors, path)
        if what == "ceiling":
            return {"matmul_flops_per_sec": 1.0}
        if what == "measure":
            sides = {"first_secs": 1.0, "secs": [1.0], "peak_bytes": 1, "resident_bytes": 1}
            return sides | {"device": "cpu", "versions": {}}
        return real(module, what, work, directory, cache)

    monkeypatch.setattr(command, "run", wrong)
    out = tmp_path / "x.json"
    assert run(f"--config={CONFIG}", "--peer=diffusers", "--rounds=1", f"--out={out}") == 2
    assert "do not compute the same" in capsys.readouterr().err
    found = json.loads(out.read_text())
    assert not found["gate"]["passed"] and "ratio" not in found


def test_what_the_peer_lacks_is_changed_and_said():
    ldm, said = command.fitted(digits_ldm.get_config())
    assert said == {"model.denoiser.pool_context": False} and not ldm.model.denoiser.pool_context
    first, said = command.fitted(digits_autoencoder.get_config())
    assert said["data.channels"] == first.data.channels == 48
    assert command.fitted(ddpm_cifar10.get_config())[1] == {}


def test_timed_counts_calls_and_leaves_the_first_apart():
    """Calls of 10 ms, the first of 60; work that is waited for belongs to the time."""
    calls, waits = [], []

    def call():
        time.sleep(0.01 if calls else 0.06)
        calls.append(1)

    def wait():
        time.sleep(0.02 if waits else 0)
        waits.append(len(calls))

    found = workload.timed(call, wait, {"warmup": 2, "repeats": 3, "sync_every": 4})
    assert len(calls) == 1 + 2 + 3 * 4 and waits == [1, 3, 7, 11, 15]
    assert len(found["secs"]) == 3
    assert found["first_secs"] >= 0.06 > 0.015 + min(found["secs"])
    assert min(found["secs"]) >= 0.01 + 0.02 / 4  # of one call, with its share of the wait


def test_what_a_slow_pipeline_adds_to_a_step_is_told(monkeypatch):
    """Steps of 10 ms, and batches that take 3 ms more, by a clock that only they move."""
    clock = [0.0]

    class Run:
        task, init, start, frozen = types.SimpleNamespace(train_step=None), None, None, {}

        def train_batches(self):
            while True:
                clock[0] += 3e-3
                yield {}

    def step(state, batch, frozen):
        clock[0] += 10e-3
        return state, {"loss": jnp.zeros(())}

    Run.parallel = types.SimpleNamespace(
        step=lambda _: step,
        init=lambda *_: jnp.zeros(()),
        replicate=lambda tree: tree,
        batch=lambda batch: batch,
    )
    monkeypatch.setattr(alone.assemble, "build_run", lambda _: Run())
    monkeypatch.setattr(alone, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    config = digits_ldm.get_config("smoke")
    (row,) = alone.data(config, None, 12)["rows"]
    batch = config.train.batch_size
    found = [row[key] for key in ("slower", "slower_low", "slower_high", "times")]
    np.testing.assert_allclose(found, [0.3, 0.3, 0.3, 10 / 3])
    rates = [row[f"{key}_per_sec"] for key in ("still", "fed", "pipeline")]
    np.testing.assert_allclose(rates, [batch / 10e-3, batch / 13e-3, batch / 3e-3])


def test_the_data_suite_measures_the_real_pipeline(monkeypatch):
    """A run's own loader, each batch of which takes one of its two threads 50 ms."""
    read = loader.Batches.__getitem__

    def slow(self, step):
        time.sleep(0.05)
        return read(self, step)

    monkeypatch.setattr(loader.Batches, "__getitem__", slow)
    monkeypatch.setattr(alone, "BLOCK_SECS", 0.1)
    tiny = pathlib.Path(__file__).parents[1] / "faults" / "tiny.py"
    config = runpy.run_path(str(tiny))["get_config"]("denoiser")
    (row,) = alone.data(config.lock(), 16, 3)["rows"]
    assert row["batch"] == 16
    assert row["pipeline_per_sec"] < 1.2 * 2 * 16 / 0.05  # not the median wait, which is none
    np.testing.assert_allclose(row["times"], row["pipeline_per_sec"] / row["still_per_sec"])
    assert row["slower_low"] <= row["slower"] <= row["slower_high"]


def test_the_interval_of_a_median_covers_it_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = rng.standard_cauchy((2000, 40))  # as heavy tails as any clock's
    bounds = np.array([alone.median_interval(x) for x in draws])
    assert 0.94 < ((bounds[:, 0] <= 0) & (0 <= bounds[:, 2])).mean() < 0.98
    np.testing.assert_allclose(bounds[:, 1], np.median(draws, axis=1))


def test_growth_fits_the_batch_and_counts_what_devices_exchange():
    """Against a machine whose times bend with the batch, and of which each first round is slow."""
    asked = []

    def secs_of(batch, size):
        return (0.1 + 0.02 * batch + 0.003 * batch**2) * (size / 32) ** 2

    def machine(module, what, work, directory, cache=None):
        if what == "prepare":
            return {"parameters": 1, "flops": 10**9 * work["batch"]}
        size, devices = work["config"]["data"]["image_size"], work["devices"]
        asked.append((work["batch"], size, devices))
        moved = {"all-reduce": {"count": 3, "bytes": 2**20}, "all-gather": {"count": 2, "bytes": 4}}
        slow = 9 if asked.count(asked[-1]) == 1 else 1
        return {
            "secs": [slow * secs_of(work["batch"], size)],
            "buffer_bytes": 2**20 * work["batch"],
            "collectives": moved if devices > 1 else {},
        }

    config = ddpm_cifar10.get_config("smoke")
    options = {"warmup": 1, "repeats": 1, "sync_every": 1, "seed": 0}
    found = growth.growth(config, 2, 3, options, machine)
    side = config.data.image_size
    sides = [(2, side // 2, 1), (2, side * 2, 1)]
    batches = [(2 * k, side, 1) for k in (1, 2, 4, 8)]
    cases = [*batches, *sides, *((2 * n, side, n) for n in (2, 4, 8))]
    assert asked == [case for case in cases for _ in range(3)]
    # Equation 1 by the normal equations, of the medians.
    x = np.array([[1.0, size] for size, _, _ in batches])
    y = np.array([secs_of(size, side) for size, _, _ in batches])
    np.testing.assert_allclose([*found["fit"].values()], np.linalg.solve(x.T @ x, x.T @ y))
    assert f"secs = {found['fit']['a_secs']:.3g}"[:10] in show.table(found)
    for row, (batch, size, devices) in zip(found["rows"], cases, strict=True):
        secs = secs_of(batch, size)
        np.testing.assert_allclose(row["step_secs"], secs)
        np.testing.assert_allclose(row["examples_per_sec"], batch / secs)
        np.testing.assert_allclose(row["gflop_per_sec"], batch / secs)
        assert row["buffer_mib"] == batch and row["shape"] == f"{size}x{size}x3"
        wanted = (5, 1 + 2**-18) if devices > 1 else (0, 0)
        assert (row["collectives"], row["collective_mib"]) == wanted


@pytest.mark.slow  # half a minute of compiling Inception
def test_inception_is_pytorch_fids_before_it_is_timed(tmp_path):
    out = tmp_path / "features.json"
    quick = ("--rounds=1", "--warmup=1", "--repeats=2", "--batch=2", "--side=64")
    assert run("--suite=features", "--peer=pytorch-fid", *quick, f"--out={out}") == 0
    found = json.loads(out.read_text())
    assert 0 < found["gate"]["output"] < 1e-5
    assert found["parameters"] > 2e7 and found["ratio"] > 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((f"--config={CONFIG}", "--peer=keras"), "--peer=keras is unknown"),
        ((f"--config={CONFIG}", "--rounds=0"), "--rounds=0 must be at least 1"),
        ((f"--config={CONFIG}", "--suite=autoencoder"), "task='autoencoder', not 'denoiser'"),
        (("--suite=train",), "--config is missing"),
        (("--suite=features", "--peer=diffusers"), "does not measure --suite=features"),
        ((f"--config={CONFIG}", "--devices=3", "--batch=4"), "3 devices"),
        ((f"--config={CONFIG}", "--suite=everything"), "--suite=everything"),
    ],
)
def test_wrong_commands_are_refused_in_a_sentence(argv, message, capsys):
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
