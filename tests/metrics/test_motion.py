"""Centres and straightness against paths that are known."""

import numpy as np

from diffusion.metrics import motion


def video(path, side=24):
    """A bright 2x2 block with its corner at each place of a path (frames, 2)."""
    frames = np.zeros((len(path), side, side, 1), np.uint8)
    for frame, (row, column) in zip(frames, path):
        frame[row : row + 2, column : column + 2] = 200
    return frames


def test_centres_are_where_the_block_is():
    path = np.array([[0, 3], [2, 3], [4, 9]])
    np.testing.assert_allclose(motion.centres(video(path)[None])[0], path + 0.5)


def test_straightness_of_steady_random_and_still_motion():
    frames = np.arange(8)
    steady = np.stack([2 * frames, frames], 1)
    rng = np.random.default_rng(0)
    shuffled = np.stack([steady[rng.permutation(8)] for _ in range(2000)]).astype(float)
    still = np.full((8, 2), 5)
    found = motion.straightness(motion.centres(np.stack([video(steady), video(still)])))
    assert found[0] == 1.0
    assert np.isnan(found[1])
    # The correlation of a random permutation with time: E[R^2] = 1 / (frames - 1).
    np.testing.assert_allclose(motion.straightness(shuffled).mean(), 1 / 7, rtol=0.1)


def test_speed_and_black_frames():
    steady = np.stack([3 * np.arange(5), 4 * np.arange(5)], 1)
    np.testing.assert_allclose(motion.speed(motion.centres(video(steady)[None])), [5.0])
    black = video(steady)
    black[2] = 0
    assert np.isnan(motion.straightness(motion.centres(black[None]))).all()
