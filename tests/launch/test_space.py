"""Laws of the algebra of sweeps, and the names of trials."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import space

values = st.one_of(st.integers(-5, 5), st.floats(0, 1), st.text("ab/ .", max_size=3), st.booleans())


def spaces(prefix: str):
    keys = st.sampled_from([f"{prefix}.a", f"{prefix}.b", f"{prefix}.c.a"])
    return st.lists(st.dictionaries(keys, values, max_size=3), max_size=3)


A, B, C = spaces("x"), spaces("y"), spaces("z")


@given(A, B, C)
def test_product_is_associative_and_counts(a, b, c):
    whole = space.product(a, b, c)
    assert whole == space.product(space.product(a, b), c) == space.product(a, space.product(b, c))
    assert len(whole) == len(a) * len(b) * len(c)
    assert space.product(space.product(), a) == space.product(a) == a == space.product(a, [{}])


@given(A, B, C)
def test_chain_is_associative_and_product_distributes_over_it(a, b, c):
    assert space.chain(a, b, c) == space.chain(space.chain(a, b), c) == a + b + c
    assert space.chain(space.chain(), a) == a
    left = space.product(space.chain(a, b), c)
    assert left == space.chain(space.product(a, c), space.product(b, c))


@given(A, B)
def test_zip_pairs_equal_lengths_and_refuses_others(a, b):
    if len(a) != len(b):
        with pytest.raises(ValueError, match=f"{len(a)}, {len(b)}"):
            space.zipped(a, b)
        return
    assert space.zipped(a, b) == [x | y for x, y in zip(a, b)]


@given(A, B)
def test_nothing_that_is_given_is_changed(a, b):
    copies = [dict(t) for t in a], [dict(t) for t in b]
    for trial in space.product(a, b) + space.chain(a, b):
        trial["new"] = 1
    assert (a, b) == copies


@given(A.filter(bool), st.integers())
def test_a_key_that_two_factors_set_is_refused(a, value):
    key = next((k for trial in a for k in trial), None)
    if key is not None:
        with pytest.raises(ValueError, match="twice"):
            space.product(a, [{key: value}])


@given(st.lists(st.dictionaries(st.sampled_from(["a.b", "c.b", "seed"]), values), max_size=6))
def test_names_are_distinct_and_fit_for_folders(trials):
    distinct = {repr(sorted((k, repr(v)) for k, v in t.items())) for t in trials}
    if len(distinct) < len(trials):
        with pytest.raises(ValueError, match="the same"):
            space.names(trials)
        return
    found = space.names(trials)
    assert len(set(found)) == len(trials)
    for name in found:
        assert 0 < len(name) < 255 and name[0] not in "./" and not set(name) & set("/ \n")


def test_names_tell_what_differs():
    add = space.Add()
    rates = add.values("optim.learning_rate", 1e-3, 2e-4)
    add(add.product(rates, add.values("seed", 0, 1), add.values("ema.decay", 0.9)))
    add({"optim.learning_rate": 1e-3, "seed": 2, "ema.decay": 0.9})
    assert space.names(add.trials) == [
        "learning_rate=0.001,seed=0",
        "learning_rate=0.001,seed=1",
        "learning_rate=0.0002,seed=0",
        "learning_rate=0.0002,seed=1",
        "learning_rate=0.001,seed=2",
    ]
    two = space.product(space.values("a.size", 1, 2), space.values("b.size", (1, 2), (1, 3)))
    assert space.names(two)[0] == "a.size=1,b.size=1x2"
    assert space.names([{}]) == ["base"]


def test_long_names_are_cut_and_stay_distinct():
    found = space.names([{"a": "x" * 300 + end} for end in "12"])
    assert len(set(found)) == 2 and max(map(len, found)) < 200
