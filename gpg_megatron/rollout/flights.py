"""Groups that engines are answering, each by a call of its own: they end in any order, and Ray's
object store never holds a batch.

start(key, request) --> the engine that owes least --Ray--> next(): (key, completions)
                 ^------- its engine is lost <------'
stop(key) ------------------------------------Ray--> that engine

What a lost engine owes is asked of another with the same seed, which has the same answer, or of the
one that replaces it; where the weights have changed meanwhile, next says that it is lost.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gpg_megatron.rollout.calls import CONTROL_TIMEOUT_S, PendingCalls
from gpg_megatron.rollout.failures import EngineDied
from gpg_megatron.rollout.sampling import SamplingRequest, to_completions
from gpg_megatron.types import Completion

_NUMBERS = itertools.count()
"""Of requests. An evaluation may ask the engines that a stream of groups asks."""
_LOOK_S = 0.2
"""Between two looks whether what waits for an engine can be asked."""


class Engines(Protocol):
    """What flights ask of a fleet."""

    @property
    def version(self) -> int | None:
        """Of the weights; None: they are being changed."""

    def ready(self) -> Sequence[int]:
        """Ids of the engines that may be asked; none: later. Raises EngineError: never more."""

    def ask(self, engine: int, request: SamplingRequest, name: str) -> Any:
        """Send a request to an engine under a name; Ray's reference to its samples."""

    def stop(self, engine: int, name: str) -> None:
        """End the request of that name."""

    def generating(self, sent: Mapping[Any, int]) -> PendingCalls:
        """Requests that were sent: reads their answers, and names failures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Waiting:
    """A request that no engine has."""

    key: int
    request: SamplingRequest
    version: int | None = None
    """Of the weights with which it was asked before; None: it was not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flight:
    """A request that an engine has."""

    key: int
    request: SamplingRequest
    version: int | None
    engine: int
    ref: Any
    future: Any
    began: float


class Flights:
    """What is in flight. start and stop may be called while another thread waits in next."""

    def __init__(self, engines: Engines, *, timeout_s: float) -> None:
        """timeout_s: for each group."""
        self._engines = engines
        self._timeout_s = timeout_s
        self._lock = threading.RLock()
        self._load: Counter[int] = Counter()
        """Samples that each engine owes."""
        self._waiting: list[_Waiting] = []
        """In the order of their starts."""
        self._flying: dict[str, _Flight] = {}
        """By name, in the order in which they were asked."""
        self._ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._unwanted: set[str] = set()

    def __len__(self) -> int:
        """Those whose answers are wanted."""
        with self._lock:
            return len(self._waiting) + len(self._flying) - len(self._unwanted)

    @property
    def owed(self) -> int:
        """Samples, of all engines and of those that are waited for."""
        with self._lock:
            return self._load.total() + sum(one.request.params.n for one in self._waiting)

    def start(self, key: int, request: SamplingRequest) -> None:
        """Returns at once. No two whose answers are wanted have the same key."""
        with self._lock:
            self._send([_Waiting(key=key, request=request)])

    def stop(self, key: int, *, keep: bool) -> None:
        """End a group if it still runs; keep: what it has comes, else nothing does. One that waits
        for an engine has nothing: it is forgotten, or comes whole."""
        with self._lock:  # what lands meanwhile is not marked
            meant = {
                name: flight.engine
                for name, flight in self._flying.items()
                if flight.key == key and name not in self._unwanted
            }
            if not keep:
                self._unwanted |= meant.keys()
                self._waiting = [one for one in self._waiting if one.key != key]
        for name, engine in meant.items():
            self._engines.stop(engine, name)

    def next(self) -> list[tuple[int, list[Completion] | None]]:
        """Those that have ended since the last call, maybe none that is wanted; something has to
        be in flight. None: its engine and the weights that began it are no more, so that it has to
        be started again.

        Raises:
            EngineDied, EngineError, TimeoutError
        """
        names: list[str] = []
        lost: list[int] = []
        while not (names or lost):
            with self._lock:
                waiting, self._waiting = self._waiting, []
                lost = self._send(waiting)
            names = self._wait(0.0 if lost else _LOOK_S)
        return [
            *((key, None) for key in lost),
            *(landed for name in names if (landed := self._landed(name))),
        ]

    def _send(self, requests: Sequence[_Waiting]) -> list[int]:
        """Ask engines, or let requests wait for some; the keys of those that are lost."""
        lost = []
        for one in requests:
            ready, version = self._engines.ready(), self._engines.version
            if not ready or (version is None and one.version is not None):
                self._waiting.append(one)
            elif one.version not in (None, version):
                lost.append(one.key)
            else:
                self._ask(one, min(ready, key=self._load.__getitem__))
        return lost

    def _ask(self, one: _Waiting, engine: int) -> None:
        name = f"group {next(_NUMBERS)}"
        version = self._engines.version
        ref = self._engines.ask(engine, one.request, name)
        future = ref.future()
        self._load[engine] += one.request.params.n
        self._flying[name] = _Flight(
            key=one.key,
            request=one.request,
            version=version,
            engine=engine,
            ref=ref,
            future=future,
            began=time.monotonic(),
        )
        future.add_done_callback(lambda _: self._ended.put(name))

    def _wait(self, seconds: float) -> list[str]:
        """Names of those that have ended, when there are any or the time is over."""
        try:
            names = [self._ended.get(timeout=seconds)]
        except queue.Empty:
            self._check_first()
            return []
        while not self._ended.empty():
            names.append(self._ended.get())
        return names

    def _check_first(self) -> None:
        """Raises TimeoutError: the first to be asked is late."""
        with self._lock:
            first = next(iter(self._flying.values()), None)
        if first is not None and time.monotonic() - first.began > self._timeout_s:
            late = self._engines.generating({first.ref: first.engine})
            late.next_answers(time.monotonic(), self._timeout_s)

    def _landed(self, name: str) -> tuple[int, list[Completion]] | None:
        with self._lock:
            flight, is_wanted = self._flying.pop(name), name not in self._unwanted
            self._unwanted.discard(name)
            self._load[flight.engine] -= flight.request.params.n
        key, request = flight.key, flight.request
        try:
            sampled = self._sampled(flight)
        except EngineDied:
            if flight.engine in self._engines.ready():
                raise  # nothing replaces it
            if is_wanted:
                again = _Waiting(key=key, request=request, version=flight.version)
                with self._lock:
                    self._waiting.append(again)
            return None
        return (key, to_completions(request, sampled)) if is_wanted else None

    def _sampled(self, flight: _Flight) -> Any:
        if flight.future.exception() is None:
            return flight.future.result()
        (sampled,) = self._engines.generating({flight.ref: flight.engine}).answers(
            CONTROL_TIMEOUT_S
        )
        return sampled


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
        for k, completions in flights.next():
            if completions is None:
                waiting.append(k)
            else:
                found[k] = completions
    return [found[k] for k in range(len(requests))]
