"""Names the phase that is running, times it, and says so when it takes too long."""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO


class Watchdog:
    """Phase timer with an alarm that prints one line and stops nothing.

        with Watchdog(rank=rank, limit_s=300) as watchdog:
            with watchdog.phase("rollout"):
                ...
            metrics |= watchdog.pop_timings()      # {"timing/rollout_s": 3.2}

    The line comes each time that limit_s seconds pass in which no phase began or ended.

    Args:
        rank: named in the line.
        limit_s: seconds without progress before the line.
        stream: where the line goes; None: stderr.
    """

    def __init__(self, *, rank: int, limit_s: float, stream: TextIO | None = None) -> None:
        self._rank = rank
        self._limit_s = limit_s
        self._stream = stream
        self._seconds: defaultdict[str, float] = defaultdict(float)
        # Phases that have begun and not ended, outermost first: (name, start).
        self._open: tuple[tuple[str, float], ...] = ()
        self._progress = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body under timing/<name>_s; a phase inside a phase counts in both."""
        start = self._progress = time.monotonic()
        outer = self._open
        self._open = (*outer, (name, start))
        try:
            yield
        finally:
            self._open = outer
            self._progress = time.monotonic()
            self._seconds[name] += self._progress - start

    def pop_timings(self) -> dict[str, float]:
        """Seconds of every phase that ended since the last call, by metric name."""
        seconds, self._seconds = self._seconds, defaultdict(float)
        return {f"timing/{name}_s": value for name, value in seconds.items()}

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join(timeout=5.0)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _watch(self) -> None:
        said = 0.0
        while not self._closed.wait(min(self._limit_s / 4, 1.0)):
            phases, now = self._open, time.monotonic()
            if not phases or now - max(said, self._progress) < self._limit_s:
                continue
            said = now
            name, start = phases[-1]
            print(
                f"[rank {self._rank}] {name} has been running for {now - start:.0f} s",
                file=self._stream or sys.stderr,
                flush=True,
            )
