"""A run that is told of the past, and its command; statsmodels' part is replaced."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from configs import forecast as config_file
from diffusion.data import series
from diffusion.metrics import forecast as scores
from diffusion.training.conditions import Past
from experiments import sample, train
from experiments.evaluate import __main__ as evaluate
from experiments.evaluate import forecast
from experiments.host import cli
from experiments.run import tasks

VALUES = 10 + 4 * np.sin(np.arange(240) * np.pi / 6) + np.random.default_rng(0).normal(size=240)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setitem(series.SERIES, "sea_surface_temperature", lambda: VALUES)
    config = config_file.get_config("smoke")
    config.data.update({"past": 24, "held_out": 36})
    config.model.denoiser.update({"width": 16, "depth": 1, "heads": 2})
    config.sample.update({"steps": 2, "batch_size": 64})
    assert train.train(config.lock(), tmp_path / "run")
    return tmp_path / "run"


def smoothed(values, starts, leads, season, seed, num):
    """In place of statsmodels': the last value for ever."""
    return np.broadcast_to(values[starts - 1][:, None, None], (len(starts), num, leads)), "none"


def test_the_command_measures_a_run_beside_two_forecasters(run, monkeypatch, capsys):
    monkeypatch.setattr(forecast, "exponential_smoothing", smoothed)
    argv = [f"--workdir={run}", "--samples=4"]
    assert cli.run(forecast.define, forecast.main, argv) == 0
    found = json.loads((run / "forecast.json").read_text())
    assert (run / "forecast.png").stat().st_size > 1000
    assert (
        found["windows"] == 36 - 12 + 1 and "exponential_smoothing: CRPS" in capsys.readouterr().out
    )
    starts = 204 + np.arange(25)
    outcome = VALUES[starts[:, None] + np.arange(12)]
    wanted = np.abs(VALUES[starts - 1][:, None] - outcome).mean()
    assert found["exponential_smoothing"]["crps"] == pytest.approx(wanted, rel=1e-6)
    low, high = found["run"]["intervals"]["crps"]
    assert low < found["run"]["crps"] < high and len(found["run"]["crps_by_lead"]) == 12
    # Untrained, it draws anomalies of about one deviation around the season: the season comes back.
    assert found["run"]["crps"] < 2 < wanted
    again = cli.run(forecast.define, forecast.main, [*argv, f"--out={run}/again"])
    assert again == 0
    assert json.loads((run / "again" / "forecast.json").read_text()) == found
    for command, more in ((sample, ["--num=1"]), (evaluate, ["--metrics=spectrum", "--num=2"])):
        assert cli.run(command.define, command.main, [f"--workdir={run}", *more]) == 2
        assert "python -m experiments.evaluate.forecast" in capsys.readouterr().err


def test_seasonal_naive_is_last_year_and_its_own_errors():
    starts = np.array([204, 216])
    drawn = forecast.seasonal_naive(VALUES, starts, 12, 12, np.random.default_rng(0), 50)
    wrong = drawn - VALUES[starts[:, None] - 12 + np.arange(12)][:, None]
    known = VALUES[:204]
    rows = np.stack([known[i : i + 12] - known[i - 12 : i] for i in range(12, 193)])
    assert all(np.abs(rows - w).max(1).min() < 1e-9 for w in wrong.reshape(-1, 12))
    assert len(np.unique(wrong.reshape(-1, 12), axis=0)) > 50
    # Perfect where the series repeats itself.
    repeats = np.tile(np.arange(12.0), 20)
    drawn = forecast.seasonal_naive(repeats, starts, 24, 12, np.random.default_rng(0), 2)
    np.testing.assert_array_equal(drawn, np.broadcast_to(np.tile(np.arange(12.0), 2), (2, 2, 24)))
    assert scores.crps(drawn, drawn[:, 0]).max() == 0


def test_the_past_lies_beside_its_place_the_oldest_first():
    past = jnp.arange(2 * 9.0).reshape(2, 9, 1)
    told = Past(3, 3).encode({}, {"past": past}, None)["concat"]
    np.testing.assert_array_equal(told[0], [[0, 3, 6], [1, 4, 7], [2, 5, 8]])
    np.testing.assert_array_equal(told[1], told[0] + 9)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"past": 30}, "data.past=30 and data.image_size="), ({"past": 0}, "data.past=0")],
)
def test_a_past_of_no_whole_windows_is_refused(change, said):
    config = config_file.get_config("smoke")
    config.data.update(change)
    with pytest.raises(ValueError, match=said):
        tasks.task(config.lock())


def test_a_run_of_something_else_is_refused(job, capsys):
    assert cli.run(forecast.define, forecast.main, [f"--workdir={job}/ldm"]) == 2
    assert "holds no run that is told of the past" in capsys.readouterr().err
