"""Groups that engines are answering, each by a call of its own: they end in any order, and Ray's
object store never holds a batch.

start(key, request) --Ray--> the engine that owes least --> next(): (key, completions)
stop(key) ----------Ray--> that engine
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpg_megatron.rollout.calls import CONTROL_TIMEOUT_S, PendingCalls
from gpg_megatron.rollout.sampling import SamplingRequest, to_completions
from gpg_megatron.types import Completion

Ask = Callable[[int, SamplingRequest, str], Any]
"""Sends a request to an engine under a name; Ray's reference to its samples."""
Stop = Callable[[int, str], Any]
"""Ends the request of that name."""
_NUMBERS = itertools.count()
"""Of requests. An evaluation may ask the engines that a stream of groups asks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flight:
    key: int
    request: SamplingRequest
    engine: int
    ref: Any
    future: Any
    began: float


class Flights:
    """What is in flight. start and stop may be called while another thread waits in next."""

    def __init__(
        self,
        ask: Ask,
        stop: Stop,
        pending: Callable[[Mapping[Any, int]], PendingCalls],
        *,
        num_engines: int,
        timeout_s: float,
    ) -> None:
        """
        Args:
            pending: calls that have been sent -> what reads their answers and names failures.
            timeout_s: for each group.
        """
        self._ask = ask
        self._stop = stop
        self._pending = pending
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._load = [0] * num_engines
        """Samples that each engine owes."""
        self._flying: dict[str, _Flight] = {}
        """By name, in the order of their starts."""
        self._ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._unwanted: set[str] = set()

    def __len__(self) -> int:
        """Those whose answers are wanted."""
        return len(self._flying) - len(self._unwanted)

    @property
    def owed(self) -> int:
        """Samples, of all engines."""
        return sum(self._load)

    def start(self, key: int, request: SamplingRequest) -> None:
        """Returns at once. No two whose answers are wanted have the same key."""
        with self._lock:
            engine = self._load.index(min(self._load))
            self._load[engine] += request.params.n
        name = f"group {next(_NUMBERS)}"
        ref = self._ask(engine, request, name)
        future = ref.future()
        with self._lock:
            self._flying[name] = _Flight(
                key=key,
                request=request,
                engine=engine,
                ref=ref,
                future=future,
                began=time.monotonic(),
            )
        future.add_done_callback(lambda _: self._ended.put(name))

    def stop(self, key: int, *, keep: bool) -> None:
        """End a group if it still runs; keep: what it has comes, else nothing does."""
        with self._lock:  # what lands meanwhile is not marked
            meant = {
                name: flight.engine
                for name, flight in self._flying.items()
                if flight.key == key and name not in self._unwanted
            }
            if not keep:
                self._unwanted |= meant.keys()
        for name, engine in meant.items():
            self._stop(engine, name)

    def next(self) -> list[tuple[int, list[Completion]]]:
        """Those that have ended since the last call, maybe none that is wanted; something has to
        be in flight.

        Raises:
            EngineDied, EngineError, TimeoutError
        """
        names = [self._wait()]
        while not self._ended.empty():
            names.append(self._ended.get())
        return [landed for name in names if (landed := self._landed(name))]

    def _wait(self) -> str:
        with self._lock:
            first = next(iter(self._flying.values()))
        left = first.began + self._timeout_s - time.monotonic()
        try:
            return self._ended.get(timeout=max(0.0, left))
        except queue.Empty:
            late = self._pending({first.ref: first.engine})
            late.next_answers(time.monotonic(), self._timeout_s)
            raise AssertionError("it is late") from None

    def _landed(self, name: str) -> tuple[int, list[Completion]] | None:
        with self._lock:
            flight, is_wanted = self._flying.pop(name), name not in self._unwanted
            self._unwanted.discard(name)
            self._load[flight.engine] -= flight.request.params.n
        if flight.future.exception() is None:
            sampled = flight.future.result()
        else:
            (sampled,) = self._pending({flight.ref: flight.engine}).answers(CONTROL_TIMEOUT_S)
        return (flight.key, to_completions(flight.request, sampled)) if is_wanted else None


def largest_first(requests: Sequence[SamplingRequest]) -> list[int]:
    """Indices of the requests by their token limits, the largest first; ties in their order."""
    return sorted(range(len(requests)), key=lambda i: (-_cost(requests[i]), i))


def _cost(request: SamplingRequest) -> int:
    return len(request.prompt.token_ids) + request.params.n * request.params.max_tokens


def answer_all(
    flights: Flights, requests: Sequence[SamplingRequest], room: int
) -> list[list[Completion]]:
    """[request][sample]. The largest request first, as long as the engines owe fewer samples than
    they have room for; none idles while others have a queue of their own. Raises as next does."""
    waiting = deque(largest_first(requests))
    found: dict[int, list[Completion]] = {}
    while len(found) < len(requests):
        while waiting and flights.owed < room:
            k = waiting.popleft()
            flights.start(k, requests[k])
        found.update(flights.next())
    return [found[k] for k in range(len(requests))]
