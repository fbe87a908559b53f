"""What the suite says of its own time, and in which order its files run."""

import json
import pathlib
import types

import pytest

HERE = pathlib.Path(__file__).parent
# 600 s of six tests, 400 s of four.
TABLE = {"a.py": 600.0, "b.py": 400.0}
IDS = [f"a.py::test_{i}" for i in range(6)] + [f"b.py::test_{i}" for i in range(4)]


@pytest.fixture
def suite(request):
    """The suite's own conftest.py, as pytest has loaded it."""
    return request.config.pluginmanager.get_plugin(str(HERE / "conftest.py"))


def ends(plugin, clock, nodeid, secs):
    clock[0] += secs
    for when in ("setup", "call", "teardown"):
        report = types.SimpleNamespace(nodeid=nodeid, when=when, duration=secs / 3)
        plugin.pytest_runtest_logreport(report)


def test_what_is_left_follows_the_table_and_then_the_pace(suite):
    clock, said = [0.0], []
    plugin = suite.TimeLeft(TABLE, said.append, every_secs=30, clock=lambda: clock[0])
    plugin.expect(IDS)
    assert plugin.left_secs() == pytest.approx(1000)  # nothing known but the table
    for test in IDS[:6]:
        ends(plugin, clock, test, 200)  # twice as slow as the table has it
    # (1200 s + the first 50 s) for 650 s of the table; 400 s of it are left
    assert plugin.left_secs() == pytest.approx(400 * 1250 / 650)
    assert said[-1] == "20 min gone, about 13 min left" and len(said) == 6
    for test in IDS[6:]:
        ends(plugin, clock, test, 1)
    assert plugin.left_secs() == 0 and len(said) == 6  # too soon after the last line


def test_two_workers_and_files_that_are_new(suite):
    plugin = suite.TimeLeft(TABLE, print, clock=lambda: 0.0)
    node = types.SimpleNamespace(gateway=types.SimpleNamespace(id="gw1"))
    plugin.pytest_xdist_node_collection_finished(node, [*IDS, "new.py::test_x"])
    assert plugin.left_secs() == pytest.approx(1100 / 2)  # the new one as the others are


def test_long_files_go_first_where_processes_share_them(suite, monkeypatch):
    monkeypatch.setattr(suite, "durations", lambda: {"b.py": 9.0, "a.py": 3.0, "c.py": 5.0})
    names = ("a.py::x", "b.py::x", "c.py::x", "c.py::y", "new.py::x", "b.py::y")
    items = [types.SimpleNamespace(nodeid=name) for name in names]
    suite.pytest_collection_modifyitems(types.SimpleNamespace(), items)
    assert tuple(item.nodeid for item in items) == names
    suite.pytest_collection_modifyitems(types.SimpleNamespace(workerinput={}), items)
    assert [item.nodeid[:4] for item in items] == ["b.py", "b.py", "c.py", "c.py", "a.py", "new."]


def test_the_table_is_of_files_that_are_here(suite):
    committed = json.loads((HERE / "durations.json").read_text())
    missing = [name for name in committed if not (HERE.parent / name).is_file()]
    assert not missing and sum(committed.values()) > 60
