"""What ends a run from outside its loop: signals, steps that hang, steps that are skipped.

Exit statuses, for whatever starts runs: 0 finished, 2 refused (`cli.py`), 75 saved
after a signal, 76 hung, 77 another process was lost (`cluster.py`). After 75 to 77, and
after the 134 of a process that its runtime aborted, the same command goes on where it stood. A
signal before the command has read its config ends it as it ends any program: nothing is lost yet.
"""

import collections
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

INTERRUPTED = 75  # exit status: saved after a signal; the same command goes on
HUNG = 76  # exit status: a step took longer than the limit; the same command goes on

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
NAMED = 64  # examples of a batch, in a message
BAD_STEP = "its loss or gradient is not finite, or a spike"
ONE_REQUEST_SECS = 1.0  # a terminal and a launcher may both pass one Ctrl-C on


class StopOnSignal:
    """SIGTERM, SIGINT and SIGUSR1 ask the loop to save and end; a second one ends at once.

    Signals within a second count as one. A context manager; afterwards signals are as before.
    """

    def __init__(self):
        self.requested = False
        self._since = 0.0

    def __enter__(self) -> "StopOnSignal":
        self._old = {s: signal.signal(s, self._ask) for s in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, signum, frame):
        del frame
        now = time.monotonic()
        if not self.requested:
            self.requested, self._since = True, now
        elif now - self._since > ONE_REQUEST_SECS:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)


class SkippedSteps:
    """Ends a run that skips step after step, naming the examples of the last batch.

    A step's count of skipped steps in a row is read when the step is done, `late` steps after it
    was started, so that the host waits for no step that it would not wait for anyway.
    """

    def __init__(self, limit: int, late: int, read: Callable[[Any], int], say: Callable):
        self._limit, self._late, self._read, self._say = limit, late, read, say
        self._open: collections.deque[tuple[int, Any, Any]] = collections.deque()
        self.in_a_row = 0

    def step(self, done: int, in_a_row: Any, examples: Any) -> None:
        """Step `done` was started: its count, on the device, and its examples' indices."""
        self._open.append((done, in_a_row, examples))
        while len(self._open) > self._late:
            self._look()

    def settle(self) -> None:
        """Waits for all that was started. ValueError as `step`'s: so many in a row were skipped."""
        while self._open:
            self._look()

    def _look(self) -> None:
        done, count, examples = self._open.popleft()
        self.in_a_row = self._read(count)
        if not self.in_a_row:
            return
        named = ", ".join(map(str, examples[:NAMED])) + (", ..." if len(examples) > NAMED else "")
        named = f"examples on this process are {named}"
        self._say(f"step {done:,} was skipped: {BAD_STEP}; its {named}")
        if self.in_a_row >= self._limit:
            raise ValueError(
                f"{self.in_a_row} steps in a row up to step {done} were skipped: {BAD_STEP} "
                f"(train.max_skipped_in_a_row={self._limit}); the last one's {named}; "
                "parameters are as before them, and the last checkpoint before them is kept: "
                "lower optim.learning_rate or look at the data"
            )


class Watchdog:
    """Ends the process with status 76, every thread's stack printed, when work takes too long.

    `start_secs` bounds everything before the first step is done: restoring, compiling, the first
    collective. `step_secs` bounds each thing that `doing` names after that. 0: no limit.
    """

    def __init__(self, start_secs: float, step_secs: float):
        self._step_secs = step_secs
        self._now = ("starting", time.monotonic(), start_secs)
        self._stop = threading.Event()
        shortest = min([s for s in (start_secs, step_secs) if s > 0], default=0)
        self._pause = min(shortest / 10, 5.0)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._now = (self._now[0], time.monotonic(), self._now[2])
        if self._pause:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()

    def doing(self, what: str) -> None:
        """The last thing is done; `what` begins."""
        self._now = (what, time.monotonic(), self._step_secs)

    def _watch(self) -> None:
        while not self._stop.wait(self._pause):
            what, since, limit = self._now
            if limit and time.monotonic() - since > limit:
                print(
                    f"error: {what} has taken more than {limit:g} s (watchdog.*_secs): the run "
                    "ends here with every thread's stack; the same command goes on from the "
                    "last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                os._exit(HUNG)
