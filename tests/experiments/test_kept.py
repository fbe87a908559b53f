"""Samples kept as they are made: one command's folder is not another's, and goes on when cut."""

import json

import numpy as np
import pytest

from experiments.run import kept

MADE = {"seed": 0, "label": None}


def run(path, made_from=MADE, num=5, seen=None):
    def make(start):
        for first in range(start, num, 2):
            if seen is not None:
                seen.append(first)
            yield np.arange(first, min(first + 2, num))

    return np.concatenate(list(kept.kept(path, make, num, 2, made_from))).tolist()


def test_a_cut_folder_goes_on_where_it_stopped(tmp_path):
    path, seen = tmp_path / "kept", []
    (path).mkdir()
    (path / ".samples.json.12345678.partial").write_text("{")  # killed at its first file
    assert run(path, seen=seen) == [0, 1, 2, 3, 4] and seen == [0, 2, 4]
    (path / "00002.npy").rename(path / ".00002.npy.12345678.partial")  # killed amid its last
    seen.clear()
    assert run(path, seen=seen) == [0, 1, 2, 3, 4] and seen == [4]
    assert sorted(p.name for p in path.iterdir()) == [
        *(f"0000{i}.npy" for i in range(3)),
        "samples.json",
    ]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"seed": 1, "label": None}, "made_from.seed=0, but made_from.seed=1"),
        ({"seed": 0}, "made_from.label=None, but no made_from.label"),
        ({**MADE, "steps": None}, "no made_from.steps, but made_from.steps=None"),
    ],
)
def test_a_folder_of_something_else_is_refused(wanted, said, tmp_path):
    run(tmp_path / "kept")
    with pytest.raises(ValueError, match=f"--keep=.*kept was made with {said} is asked for: name"):
        run(tmp_path / "kept", wanted)
    with pytest.raises(ValueError, match="num=5, but num=6"):
        run(tmp_path / "kept", num=6)
    (tmp_path / "kept" / "samples.json").write_text(json.dumps(MADE)[:-2])
    with pytest.raises(ValueError, match=r"samples\.json is not valid JSON .*: remove .*kept"):
        run(tmp_path / "kept")
    (tmp_path / "kept" / "samples.json").unlink()
    with pytest.raises(ValueError, match="holds other files"):
        run(tmp_path / "kept")
