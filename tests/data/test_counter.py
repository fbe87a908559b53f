"""Counter-based draws: functions of their keys, uniform, and uncorrelated between keys."""

import numpy as np
import pytest

from diffusion.data import counter


def reference(*key: int) -> int:
    """Eq. 1 in Python's integers."""
    h, top = 0, 2**64
    for k in key:
        z = (h + 0x9E3779B97F4A7C15 * (k + 1)) % top
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % top
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % top
        h = z ^ (z >> 31)
    return h


def test_bits_are_splitmix64():
    assert counter.bits(0).tolist() == [0xE220A8397B1DCDAF]  # its published first output, seed 0
    rows = np.arange(-3, 50)
    expected = [reference(7, row, 2) for row in rows.tolist()]
    assert counter.bits(7, rows, 2).tolist() == expected
    assert counter.below(10, 7, rows, 2).tolist() == [(b >> 32) * 10 >> 32 for b in expected]
    order = sorted(range(20), key=lambda row: reference(5, 1, row))
    assert counter.permutation(20, 5, 1).tolist() == order


def test_elements_do_not_depend_on_their_batch():
    rows = np.arange(100)
    whole = counter.below(7, 3, rows, 5)
    assert [int(counter.below(7, 3, np.array([r]), 5)[0]) for r in rows] == whole.tolist()


@pytest.mark.parametrize("high", [2, 5, 6, 10])
def test_below_is_uniform(high):
    counts = np.bincount(counter.below(high, 1, np.arange(60_000)), minlength=high)
    assert len(counts) == high
    chi2 = ((counts - 60_000 / high) ** 2 / (60_000 / high)).sum()
    assert chi2 < high + 5 * np.sqrt(2 * high)


def test_key_words_do_not_commute_and_neighbours_are_uncorrelated():
    a = counter.bits(1, 2, np.arange(4096)) >> np.uint64(11)
    b = counter.bits(2, 1, np.arange(4096)) >> np.uint64(11)
    assert (a != b).all()
    for x, y in ((a, b), (a[:-1], a[1:])):
        assert abs(np.corrcoef(x.astype(float), y.astype(float))[0, 1]) < 5 / np.sqrt(4096)


def test_permutation_is_one_and_changes_with_epoch_and_seed():
    order = counter.permutation(1000, 0, 0)
    assert sorted(order.tolist()) == list(range(1000))
    assert (order != counter.permutation(1000, 0, 1)).mean() > 0.99
    assert (order != counter.permutation(1000, 1, 0)).mean() > 0.99
    with pytest.raises(ValueError, match="read-only"):
        order[0] = 1
