"""Every test sees 8 fake CPU devices, warnings as errors and no implicit rank promotion."""

import collections
import gc
import importlib.metadata
import json
import os
import pathlib
import time

# What one process compiled, small programs too, the next one reads: a later run of the suite, the
# other worker, and the processes that tests start, which inherit all of this.
CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("WANDB_MODE", "disabled")
# Compilation rules the suite's time: half of it is LLVM's optimisation of what runs for a moment,
# and half of the rest XLA's newer emitters of fused operations. Without both, the same operations
# are compiled, slower and rounded a little differently; JAX_DISABLE_MOST_OPTIMIZATIONS=0 asks for
# both. XLA ends a process that hands it a flag unknown to it, so only where the flag is known.
FAST = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1"
if FAST and importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {FLAGS}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Seconds of each file of tests: of the last whole run here, else as they were when committed.
DURATIONS = (CACHE.with_name("durations.json"), pathlib.Path(__file__).with_name("durations.json"))


class TimeLeft:
    """Says now and then how long the tests will still take, by what each file took before.

    Where `done` of `total` seconds of the table took `elapsed`, the rest takes elapsed / done as
    long; the first twentieth counts as if it had gone as in the table, shared by the workers.
    """

    def __init__(self, table, say, every_secs=30.0, clock=time.monotonic):
        self.table, self.say, self.every_secs, self.clock = table, say, every_secs, clock
        self.workers = 1
        self.began = self.said = clock()
        self.tests = collections.Counter()
        self.ended, self.secs = collections.Counter(), collections.Counter()

    def expect(self, ids) -> None:
        self.tests = collections.Counter(test.split("::")[0] for test in ids)

    def left_secs(self) -> float:
        known = [self.table[file] / n for file, n in self.tests.items() if file in self.table]
        usual = sum(known) / len(known) if known else 1.0  # a test, of a file that is new
        each = {f: self.table[f] / n if f in self.table else usual for f, n in self.tests.items()}
        total = sum(each[file] * n for file, n in self.tests.items())
        done = sum(each[file] * n for file, n in self.ended.items() if file in each)
        first = total / 20 or 1.0
        pace = (self.clock() - self.began + first / self.workers) / (done + first)
        return pace * (total - done)

    def pytest_collection_finish(self, session):
        if session.items:
            self.expect([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        self.expect(ids)
        self.workers = max(self.workers, 1 + int(node.gateway.id.removeprefix("gw")))

    def pytest_runtest_logreport(self, report):
        file = report.nodeid.split("::")[0]
        self.secs[file] += report.duration
        if report.when != "teardown":
            return
        self.ended[file] += 1
        if self.clock() - self.said > self.every_secs:
            self.said = self.clock()
            gone, left = (secs / 60 for secs in (self.said - self.began, self.left_secs()))
            self.say(f"{gone:.0f} min gone, about {left:.0f} min left")

    def pytest_sessionfinish(self, exitstatus):
        whole = {*self.table} <= {*self.ended}
        if exitstatus == 0 and whole and self.ended == self.tests and CACHE.parent.is_dir():
            secs = {file: round(n, 1) for file, n in sorted(self.secs.items())}
            DURATIONS[0].write_text(json.dumps(secs, indent=0) + "\n")


def durations() -> dict[str, float]:
    found = [path for path in DURATIONS if path.is_file()]
    return json.loads(found[0].read_text()) if found else {}


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # the process that the others report to

        def say(line):
            reporter = config.pluginmanager.get_plugin("terminalreporter")
            reporter.ensure_newline()
            reporter.write_line(line)

        config.pluginmanager.register(TimeLeft(durations(), say), "time_left")


def pytest_collection_finish():
    """As commands do (`experiments/host/cli.py`): a tenth to a quarter of the tests' time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_collection_modifyitems(config, items):
    """Longest files first where several processes share them, so that all end together."""
    if hasattr(config, "workerinput"):
        table = durations()
        items.sort(key=lambda item: -table.get(item.nodeid.split("::")[0], 0.0))


@pytest.fixture
def x64():
    """Double precision for the test that asks for it."""
    with jax.enable_x64(True):
        yield
