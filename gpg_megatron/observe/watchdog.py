"""Names the phase that is running, times it, and says so when it takes too long, and which rank the
others wait for. A rank that gives no sign ends the run."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TextIO

BEAT_S = 2.0
"""How often a rank says where it is."""


class Ranks(Protocol):
    """What ranks say of themselves: one text each."""

    def tell(self, text: str) -> None:
        """This rank's, in place of what it told before."""

    def hear(self) -> dict[int, str]:
        """Of the other ranks."""

    def hear_one(self) -> tuple[int, str]:
        """Of one other rank, always the same: its number and its text, "" before it has told."""


@dataclass(slots=True)
class _Phases:
    """Of one thread."""

    open: tuple[tuple[str, float], ...] = ()
    """Those that have begun and not ended, outermost first: (name, start)."""
    progress: float = 0.0
    """When one began or ended last."""
    said: float = 0.0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Of those that have ended, since the last pop."""


class Watchdog:
    """Phase timer with an alarm that prints one line.

        with closing(Watchdog(rank=rank, limit_s=300)) as watchdog:
            with watchdog.phase("rollout"):
                ...
            metrics |= watchdog.pop_timings()      # {"timing/rollout_s": 3.2}

    The line comes each time that limit_s seconds pass in which no phase of a thread began or
    ended. Each thread has phases and timings of its own.

    Args:
        rank: named in the line.
        limit_s: seconds without progress before the line.
        ranks: the line also names ranks that are elsewhere than this one, or give no sign; None:
            it does not.
        silent_s: seconds without a sign of the rank that this one hears.
        give_up: called with one line then; such a process is stopped, or cannot run.
        stream: where the line goes; None: stderr.
    """

    def __init__(
        self,
        *,
        rank: int,
        limit_s: float,
        ranks: Ranks | None = None,
        silent_s: float = math.inf,
        give_up: Callable[[str], None] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._rank = rank
        self._ranks = ranks
        self._loop = threading.get_ident()
        """The thread whose phases the others hear of."""
        self._number = 0
        self._limit_s, self._silent_s = limit_s, silent_s
        self._give_up = give_up
        self._sign = ("", time.monotonic())
        """What the rank that this one hears told last, and since when."""
        self._stream = stream
        self._threads: defaultdict[int, _Phases] = defaultdict(_Phases)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body under timing/<name>_s; a phase inside a phase counts in both."""
        own = self._threads[threading.get_ident()]
        start = own.progress = time.monotonic()
        outer = own.open
        own.open = (*outer, (name, start))
        try:
            yield
        finally:
            own.open = outer
            own.progress = time.monotonic()
            own.seconds[name] += own.progress - start

    def pop_timings(self) -> dict[str, float]:
        """Seconds of every phase of this thread that ended since its last call, by metric name."""
        own = self._threads[threading.get_ident()]
        seconds, own.seconds = own.seconds, defaultdict(float)
        return {f"timing/{name}_s": value for name, value in seconds.items()}

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join(timeout=5.0)

    def _watch(self) -> None:
        told = 0.0
        while not self._closed.wait(min(self._limit_s / 4, 1.0)):
            if self._ranks is not None and time.monotonic() - told >= BEAT_S:
                told = time.monotonic()
                self._tell(self._ranks)
                self._listen(self._ranks)
            for thread, phases in list(self._threads.items()):
                now, running = time.monotonic(), phases.open
                if not running or now - max(phases.said, phases.progress) < self._limit_s:
                    continue
                phases.said = now
                name, start = running[-1]
                line = f"[rank {self._rank}] {name} has been running for {now - start:.0f} s"
                if self._ranks is not None and thread == self._loop:
                    line += self._others(self._ranks, name)
                print(line, file=self._stream or sys.stderr, flush=True)

    def _tell(self, ranks: Ranks) -> None:
        """A number that grows while this process lives, and where its loop is."""
        self._number += 1
        running = self._threads[self._loop].open
        name, start = running[-1] if running else ("", time.monotonic())
        ranks.tell(f"{self._number} {time.monotonic() - start:.0f} {name}")

    def _listen(self, ranks: Ranks) -> None:
        now = time.monotonic()
        rank, text = ranks.hear_one()
        if not text or text != self._sign[0]:
            self._sign = text, now
        elif now - self._sign[1] > self._silent_s and self._give_up is not None:
            self._give_up(f"policy rank {rank} has given no sign for {now - self._sign[1]:.0f} s")

    def _others(self, ranks: Ranks, name: str) -> str:
        """Which ranks are elsewhere, or tell nothing new for two beats."""
        before = ranks.hear()
        end = time.monotonic() + 2 * BEAT_S
        while time.monotonic() < end:
            self._tell(ranks)  # so that another one that looks now sees this one
            if self._closed.wait(BEAT_S / 2):
                return ""
        late = []
        for rank, text in sorted(ranks.hear().items()):
            _, seconds, where = (text or "0 0 ").split(" ", 2)
            if text == before.get(rank):
                late.append(f"rank {rank} gives no sign" + (f", last in {where}" if where else ""))
            elif where != name:
                place = f"in {where} for {seconds} s" if where else "between two phases"
                late.append(f"rank {rank} is {place}")
        return f"; {'; '.join(late)}" if late else "; so are the other ranks"
