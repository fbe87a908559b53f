"""A trace of a few steps, for TensorBoard's profile plugin, XProf or Perfetto."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from experiments.host import cluster


class Profile:
    """Traces steps `first` to `last`, both included, of the first process into `folder`.

    steps: (first, last), counted as the log counts them, or () for none. A context manager, which
    ends a trace that the run ends within.
    """

    def __init__(self, steps: Sequence[int], folder: pathlib.Path):
        self._first, self._last = steps if steps and cluster.is_first() else (0, 0)
        self._folder = folder
        self._running = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()

    @contextlib.contextmanager
    def step(self, number: int, state: Callable[[], Any]) -> Iterator[None]:
        """Around step `number` and its data. `state` gives what was computed last."""
        if not self._first <= number <= self._last:
            yield
            return
        if not self._running:
            jax.block_until_ready(state())  # steps that run ahead are no part of it
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if number == self._last:
            jax.block_until_ready(state())
            self.__exit__()
