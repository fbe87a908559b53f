"""Windows of a measured series: what is held out stays out, and what is taken off comes back."""

import builtins

import numpy as np
import pytest

from diffusion.data import series

VALUES = 3 * np.sin(np.arange(97) * np.pi / 2) + np.random.default_rng(0).normal(size=97) + 20


@pytest.fixture(autouse=True)
def made(monkeypatch):
    monkeypatch.setitem(series.SERIES, "made", lambda: VALUES)


def windows(split, **changes):
    sizes = {"past": 8, "future": 4, "held_out": 12, "left_out": 5, "season": 4} | changes
    return series.windows("made", split=split, **sizes)


def restored(source):
    """The values of every window, past and future, in the series' unit."""
    found = source.batch(np.arange(len(source)))
    rows = np.concatenate([found["past"], found["image"]], axis=1)[..., 0]
    place = found["start"][:, None] - 8 + np.arange(12)
    mean = np.array(source.provenance["mean"])
    return rows * source.provenance["std"] + mean[place % 4], place


@pytest.mark.parametrize("split", ["train", "test"])
def test_windows_are_the_series(split):
    rows, place = restored(windows(split))
    np.testing.assert_allclose(rows, VALUES[place], rtol=1e-5)


def test_train_ends_before_what_is_held_out_and_futures_of_test_lie_in_it():
    (_, train), (_, test) = restored(windows("train")), restored(windows("test"))
    assert len(train) == 80 - 12 + 1 and train.max() == 79
    assert len(test) == 12 - 4 + 1 and test[:, 8:].min() == 80 and test.max() == 91


def test_what_is_taken_off_does_not_know_what_is_held_out(monkeypatch):
    before = windows("train").provenance
    changed = VALUES.copy()
    changed[80:] = 1e6
    monkeypatch.setitem(series.SERIES, "made", lambda: changed)
    assert windows("train").provenance == before
    anomalies = windows("train").batch(np.arange(69))["image"]
    assert abs(anomalies.std() - 1) < 0.1  # the season is gone: of the rest, one


@pytest.mark.parametrize("changes", [{"past": 0}, {"held_out": 3}, {"past": 80}, {"left_out": -1}])
def test_windows_that_do_not_fit_are_refused(changes):
    with pytest.raises(ValueError, match=r"data\.past=.*do not fit"):
        windows("train", **changes)


def test_without_statsmodels_its_installation_is_named(monkeypatch):
    plain = builtins.__import__

    def absent(name, *rest):
        if name.startswith("statsmodels"):
            raise ImportError(name)
        return plain(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match=r"pip install -r requirements-forecast\.txt"):
        series.SERIES["sea_surface_temperature"]()
