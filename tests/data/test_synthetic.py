"""Series and moving digits: functions of their keys, with the motion they promise."""

import numpy as np
import pytest

from diffusion.data import loader, synthetic
from diffusion.data.sources import MemorySource
from diffusion.metrics import motion


@pytest.fixture(scope="module")
def digits():
    rng = np.random.default_rng(0)
    image = np.zeros((6, 28, 28, 1), np.uint8)
    image[:, 6:22, 6:22] = rng.integers(120, 256, (6, 16, 16, 1))
    return MemorySource({"image": image, "label": np.arange(6, dtype=np.int32)})


def test_series_are_functions_of_their_index():
    whole = synthetic.series(np.arange(8), 256, seed=1)
    assert whole.shape == (8, 256, 1) and whole.dtype == np.float32
    assert np.abs(whole).max() <= 1
    np.testing.assert_array_equal(synthetic.series(np.array([5, 2]), 256, seed=1), whole[[5, 2]])
    assert not np.array_equal(synthetic.series(np.arange(8), 256, seed=2), whole)


def test_series_beat_at_the_periods_they_are_drawn_from():
    """R is the highest wave: the places above 0.7 of the maximum are a period apart."""
    x = synthetic.series(np.arange(64), 512, seed=0)[..., 0]
    periods = []
    for one in x:
        high = np.flatnonzero(one > 0.7 * one.max())
        beats = high[np.flatnonzero(np.diff(high, prepend=-10) > 5)]
        periods.append(np.diff(beats).mean())
    low, high = synthetic.PERIODS
    assert min(periods) > low - 2 and max(periods) < high + 2
    assert np.std(periods) > 5


def test_test_split_holds_other_series():
    train, test = (synthetic.signals(4, 64, 0, split) for split in ("train", "test"))
    assert len(train) == len(test) == 4
    a, b = (s.batch(np.arange(4))["image"] for s in (train, test))
    assert not np.array_equal(a, b)


def test_videos_move_along_straight_lines(digits):
    move = synthetic.MoveDigits.of(digits, 8, 16, seed=3)
    batch = loader.fetch(digits, np.arange(6), np.arange(6), np.arange(6), [move])
    video = batch["image"]
    assert video.shape == (6, 8, 16, 16, 1) and video.dtype == np.uint8
    path = motion.centres(video)
    assert np.all(motion.straightness(path) > 0.99)
    assert motion.speed(path).mean() > 0.1
    again = loader.fetch(digits, np.array([4]), np.array([4]), np.array([0]), [move])["image"]
    np.testing.assert_array_equal(again[0], video[4])
    # Another epoch, another line.
    other = loader.fetch(digits, np.array([4]), np.array([5]), np.array([0]), [move])["image"]
    assert not np.array_equal(other[0], video[4])


def test_no_room_to_move_is_refused(digits):
    with pytest.raises(ValueError, match="no room to move"):
        synthetic.MoveDigits.of(digits, 8, 10, seed=0)
