"""The loop itself: what it transfers, what it traces, and what may change when a run goes on."""

import jax
import pytest

from diffusion.training.parallel import Parallel
from experiments import train
from experiments.run import checks
from tests.faults import tiny


def config_of(mode="jit", kind="denoiser", **train_keys):
    config = tiny.get_config(kind)
    config.parallel.mode = mode
    config.train.update(train_keys)
    return config.lock()


@pytest.fixture
def guarded(monkeypatch):
    """From the third step on, the loop's parts run where no implicit transfer is allowed."""
    seen = []

    def guard(name):
        plain = getattr(train.Loop, name)

        def call(self, done, *rest):
            with jax.transfer_guard("disallow" if done > 2 else "allow"):
                seen.append((name, done))
                return plain(self, done, *rest)

        monkeypatch.setattr(train.Loop, name, call)

    for name in ("advance", "evaluate", "agree", "save"):
        guard(name)
    return seen


@pytest.mark.parametrize(
    ("mode", "kind"), [("jit", "denoiser"), ("pmap", "denoiser"), ("jit", "first_stage")]
)
def test_a_step_makes_no_implicit_transfer(mode, kind, guarded, tmp_path):
    assert train.train(config_of(mode, kind, steps=6), tmp_path / "run") is not None
    assert {("advance", 6), ("agree", 6), ("save", 6)} <= set(guarded)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_a_batch_that_is_left_on_the_host_is_seen(mode, guarded, tmp_path, monkeypatch):
    def left(self, batch):
        return (
            batch
            if self.mode == "jit"
            else {k: v.reshape(8, 1, *v.shape[1:]) for k, v in batch.items()}
        )

    monkeypatch.setattr(Parallel, "batch", left)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train.train(config_of(mode, steps=3), tmp_path / "run")


def traces(folder):
    return sorted(folder.glob("profile/plugins/profile/*/*.xplane.pb"))


def test_the_steps_asked_for_are_traced_and_a_resumed_run_may_ask_for_others(tmp_path, monkeypatch):
    marked = []
    plain = jax.profiler.StepTraceAnnotation

    def annotation(name, step_num):
        marked.append(step_num)
        return plain(name, step_num=step_num)

    monkeypatch.setattr(jax.profiler, "StepTraceAnnotation", annotation)
    assert train.train(config_of(steps=3), tmp_path / "run")
    assert not traces(tmp_path / "run") and not marked
    assert train.train(config_of(steps=6, profile_steps=(5, 6)), tmp_path / "run")
    assert marked == [5, 6]
    (trace,) = traces(tmp_path / "run")
    assert trace.stat().st_size > 1000
    # One that should have begun before begins with the run, and ends with it.
    marked.clear()
    assert train.train(config_of(steps=8, profile_steps=(2, 99)), tmp_path / "run")
    assert marked == [7, 8] and len(traces(tmp_path / "run")) == 2


@pytest.mark.parametrize("steps", [(0, 3), (5, 4), (3,), (1, 2, 3)])
def test_steps_that_cannot_be_traced_are_refused(steps, tmp_path):
    with pytest.raises(ValueError, match=r"train\.profile_steps=.*two numbers"):
        checks.check(config_of(profile_steps=steps))
