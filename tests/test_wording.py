"""Numbers, durations, tables and progress as people read them."""

import io
import itertools
import time

import numpy as np
import pytest

from diffusion import wording


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Hands out the times it holds, then the last one again."""
    times = []
    monkeypatch.setattr(time, "monotonic", lambda: times.pop(0) if len(times) > 1 else times[0])
    return times


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234567, "1,234,567"),
        (1234567.0, "1.235e+06"),
        (0.251349, "0.2513"),
        (3.0, "3"),
        (1234.56, "1,235"),
        (12345.6, "12,346"),
        (-0.000012345, "-1.234e-05"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (np.float32(0.5), "0.5"),
    ],
)
def test_numbers(value, text):
    assert wording.number(value) == text


@pytest.mark.parametrize(
    ("secs", "text"),
    [
        (12.4, "12 s"),
        (59.6, "1 min 00 s"),
        (200.0, "3 min 20 s"),
        (3720.0, "1 h 02 min"),
        (3.6e6 + 59, "1,000 h 00 min"),
    ],
)
def test_durations(secs, text):
    assert wording.duration(secs) == text


def test_sizes_have_one_unit():
    assert [wording.size(n) for n in (0, 300_000, 5 * 2**30)] == [
        "0.0 MiB",
        "0.3 MiB",
        "5,120.0 MiB",
    ]


def test_columns_of_a_table_are_as_wide_as_their_widest_cell():
    rows = [("name", "value"), ("a", "1"), ("longer", "0.25")]
    assert wording.table(rows, "<") == "name    value\na           1\nlonger   0.25"
    assert wording.table(rows) == "  name  value\n     a      1\nlonger   0.25"


def test_plain_lines_now_and_then_with_the_time_left(clock):
    clock[:] = [0, 5, 14, 20, 30, 40, 50]
    stream = io.StringIO()
    progress = wording.Progress("samples", 2000, every_secs=15, stream=stream)
    for done in (100, 200, 300, 400, 1000, 2000):
        progress.at(done, "said")
    progress.close()
    assert stream.getvalue().splitlines() == [
        "samples 300/2,000  said  2 min 08 s left",  # 200 in 15 s since the first call
        "samples 1,000/2,000  said  39 s left",
    ]


def test_a_terminal_line_is_rewritten_and_ends(clock):
    clock[:] = [0, 1, 3]
    stream = Terminal()
    progress = wording.Progress("step", 3, stream=stream)
    progress.at(1)
    progress.at(2)
    progress.message("saved")
    progress.at(3)
    progress.close()
    progress.close()
    shown = "step 1/3\x1b[K\rstep 2/3  2 s left\x1b[K\rsaved\x1b[K\nstep 3/3\x1b[K\n"
    assert stream.getvalue() == shown


def test_nothing_is_said_where_it_is_silent(clock):
    clock[:] = itertools.chain(range(0, 1000, 100))
    stream = Terminal()
    progress = wording.Progress("samples", 9, silent=True, stream=stream)
    assert list(progress.over(np.zeros((3, 2, 1)))) and stream.getvalue() == ""


def test_batches_pass_unchanged_and_their_rows_are_counted(clock):
    clock[:] = [0, 20, 40, 60]
    stream = io.StringIO()
    batches = [np.ones(4), np.ones(2)]
    passed = wording.Progress("rows", 10, stream=stream).over(batches, done=1)
    assert all(a is b for a, b in zip(passed, batches, strict=True))
    assert stream.getvalue().splitlines() == ["rows 5/10", "rows 7/10  30 s left"]


def test_the_line_ends_when_the_reader_stops(clock):
    clock[:] = [0, 1]
    stream = Terminal()
    passed = wording.Progress("rows", 10, stream=stream).over([[1], [2], [3]])
    next(passed), next(passed)
    passed.close()
    assert stream.getvalue() == "rows 1/10\x1b[K\n"


def test_progress_of_an_unknown_total_counts_alone():
    stream = io.StringIO()
    progress = wording.Progress("train examples", None, every_secs=0, stream=stream)
    for done in (1, 2000):
        progress.at(done)
    progress.close()
    assert stream.getvalue() == "train examples 1\ntrain examples 2,000\n"
