"""What ends a run from outside its loop: signals, and steps that hang.

Exit statuses, for whatever starts runs: 0 finished, 2 refused (`experiments/cli.py`), 75 saved
after a signal, 76 hung, 77 another process was lost (`experiments/cluster.py`). After 75 to 77, and
after the 134 of a process that its runtime aborted, the same command goes on where it stood.
"""

import faulthandler
import os
import signal
import sys
import threading
import time

INTERRUPTED = 75  # exit status: saved after a signal; the same command goes on
HUNG = 76  # exit status: a step took longer than the limit; the same command goes on

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
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
