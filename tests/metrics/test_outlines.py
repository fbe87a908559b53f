"""Agreement of edges on masks whose scores are known."""

import numpy as np
import pytest

from diffusion.metrics.outlines import agreement

WHOLE = slice(None)


def line(column, rows=WHOLE):
    mask = np.zeros((1, 8, 8), bool)
    mask[0, rows, column] = True
    return mask


@pytest.mark.parametrize(
    ("found", "wanted", "precision", "recall"),
    [
        (line(3), line(3), 1, 1),
        (line(4), line(3), 1, 1),  # one pixel off
        (line(5), line(3), 0, 0),
        (line(3, slice(0, 4)), line(3), 1, 5 / 8),  # the row after the half is near it
        (line(3) | line(6), line(3), 0.5, 1),
        (line(3) & False, line(3), 0, 0),
        (line(3) & False, line(3) & False, 1, 1),
    ],
)
def test_scores_of_known_lines(found, wanted, precision, recall):
    scores = agreement(found, wanted)
    assert scores["precision"][0] == pytest.approx(precision)
    assert scores["recall"][0] == pytest.approx(recall)
    f = 2 * precision * recall / (precision + recall) if precision + recall else 0
    assert scores["f"][0] == pytest.approx(f)


def test_without_tolerance_every_pixel_counts():
    assert agreement(line(4), line(3), tolerance=0)["f"][0] == 0
