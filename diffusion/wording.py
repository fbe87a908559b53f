"""What people read: numbers, durations, sizes, tables of text, and how far something is."""

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar

Batch = TypeVar("Batch", bound=Sized)


def number(value: Any) -> str:
    """Four significant digits, in full from 10,000 to a million: 0.2513; 12,346; 1.5e-07."""
    if isinstance(value, int):
        return f"{value:,}"
    value = float(value)
    whole = math.isfinite(value) and (value.is_integer() or abs(value) >= 1e4)
    return f"{value:,.0f}" if whole and abs(value) < 1e6 else f"{value:,.4g}"


def duration(secs: int | float) -> str:
    """25 s; 3 min 20 s; 1 h 02 min."""
    minutes, secs = divmod(round(secs), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {secs:02d} s" if minutes else f"{secs} s"


def size(count_bytes: int) -> str:
    """In one unit, so that sizes compare: 0.3 MiB; 3,278.8 MiB."""
    return f"{count_bytes / 2**20:,.1f} MiB"


def table(rows: Sequence[Sequence[str]], align: str = ">") -> str:
    """Columns as wide as their widest cell: the first by `align` (< or >), the others right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    sides = [align, *">" * (len(widths) - 1)]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths))
        for row in rows
    )


class Progress:
    """One line on stderr: `samples 1,200/50,000  3 min 20 s left`.

    On a terminal it is rewritten in place; elsewhere a plain line, every `every_secs` at most. The
    time left follows from the pace since the first call of `at`, which leaves compilation out; of
    an unknown total (None) there is none.
    """

    def __init__(
        self,
        name: str,
        total: int | None,
        every_secs: int | float = 15,
        silent: bool = False,
        stream: Any = None,
    ):
        self._name, self._total = name, total
        self._every_secs, self._silent = every_secs, silent
        self._stream = stream or sys.stderr
        self._tty = self._stream.isatty()
        self._open = False
        self._first: tuple[int, float] | None = None
        self._said = time.monotonic()

    def at(self, done: int, *said: str) -> None:
        """`done` of the total are done; `said` is shown beside it."""
        now = time.monotonic()
        if self._first is None or done <= self._first[0]:
            self._first = (done, now)
        if self._silent or not (self._tty or now - self._said >= self._every_secs):
            return
        self._said = now
        total = self._total or 0
        parts = [f"{self._name} {done:,}" + (f"/{total:,}" if total else ""), *said]
        if self._first[0] < done < total:
            pace = (now - self._first[1]) / (done - self._first[0])
            parts.append(f"{duration(pace * (total - done))} left")
        self._line("  ".join(parts), keep=not self._tty)

    def over(self, batches: Iterable[Batch], done: int = 0) -> Iterator[Batch]:
        """The same batches; says how many of their rows there are after each."""
        try:
            for batch in batches:
                yield batch
                done += len(batch)
                self.at(done)
        finally:
            self.close()

    def message(self, text: str) -> None:
        """A line that stays."""
        self._line(text, keep=True)

    def _line(self, text: str, keep: bool) -> None:
        self._stream.write(("\r" if self._open else "") + text)
        self._stream.write(("\x1b[K" if self._tty else "") + ("\n" if keep else ""))
        self._stream.flush()
        self._open = not keep

    def close(self) -> None:
        """Ends the line that is rewritten in place."""
        if self._open:
            self._stream.write("\n")
            self._open = False
