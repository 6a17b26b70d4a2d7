"""Groups that engines are answering, each by a call of its own: they end in any order, and Ray's
object store never holds a batch.

start(key, request) --Ray--> the engine that owes least --> next(): (key, completions)
"""

from __future__ import annotations

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

Ask = Callable[[int, SamplingRequest], Any]
"""Sends a request to an engine; Ray's reference to its samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flight:
    request: SamplingRequest
    engine: int
    ref: Any
    future: Any
    began: float


class Flights:
    """What is in flight. start may be called while another thread waits in next."""

    def __init__(
        self,
        ask: Ask,
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
        self._pending = pending
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._load = [0] * num_engines
        """Samples that each engine owes."""
        self._flying: dict[int, _Flight] = {}
        """In the order of their starts."""
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()

    def __len__(self) -> int:
        return len(self._flying)

    @property
    def owed(self) -> int:
        """Samples, of all engines."""
        return sum(self._load)

    def start(self, key: int, request: SamplingRequest) -> None:
        """Returns at once. No two that are in flight have the same key."""
        with self._lock:
            engine = self._load.index(min(self._load))
            self._load[engine] += request.params.n
        ref = self._ask(engine, request)
        future = ref.future()
        self._flying[key] = _Flight(
            request=request, engine=engine, ref=ref, future=future, began=time.monotonic()
        )
        future.add_done_callback(lambda _: self._ended.put(key))

    def next(self) -> list[tuple[int, list[Completion]]]:
        """Those that have ended since the last call, at least one; something has to be in flight.

        Raises:
            EngineDied, EngineError, TimeoutError
        """
        keys = [self._wait()]
        while not self._ended.empty():
            keys.append(self._ended.get())
        return [(key, self._landed(key)) for key in keys]

    def _wait(self) -> int:
        first = next(iter(self._flying.values()))
        left = first.began + self._timeout_s - time.monotonic()
        try:
            return self._ended.get(timeout=max(0.0, left))
        except queue.Empty:
            late = self._pending({first.ref: first.engine})
            late.next_answers(time.monotonic(), self._timeout_s)
            raise AssertionError("it is late") from None

    def _landed(self, key: int) -> list[Completion]:
        flight = self._flying.pop(key)
        with self._lock:
            self._load[flight.engine] -= flight.request.params.n
        if flight.future.exception() is None:
            sampled = flight.future.result()
        else:
            (sampled,) = self._pending({flight.ref: flight.engine}).answers(CONTROL_TIMEOUT_S)
        return to_completions(flight.request, sampled)


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
