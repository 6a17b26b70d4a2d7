"""Which engine answers which request: one queue, handed out as the engines have room.

A request is a call of its own, so that its samples come as soon as they are finished, and Ray's
object store never holds a batch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gpg_megatron.rollout.calls import PendingCalls
from gpg_megatron.rollout.sampling import Sampled, SamplingRequest

Ask = Callable[[int, SamplingRequest], Any]
"""Sends a request to an engine; Ray's reference to its samples."""


def largest_first(requests: Sequence[SamplingRequest]) -> list[int]:
    """Indices of the requests by their token limits, the largest first; ties in their order."""
    return sorted(range(len(requests)), key=lambda i: (-_cost(requests[i]), i))


def _cost(request: SamplingRequest) -> int:
    return len(request.prompt.token_ids) + request.params.n * request.params.max_tokens


def sample(
    requests: Sequence[SamplingRequest],
    ask: Ask,
    calls: PendingCalls,
    *,
    num_engines: int,
    max_num_seqs: int,
    timeout_s: float,
) -> Iterator[tuple[int, Sampled]]:
    """(index of a request, its samples), in the order in which they are finished.

    The largest request first, each to the engine with most room; none idles while others have a
    queue of their own.

    Args:
        calls: none yet.
        max_num_seqs: samples that one engine runs at once.
        timeout_s: for all of it.

    Raises:
        EngineDied, EngineError, TimeoutError
    """
    deadline = time.monotonic() + timeout_s
    waiting = deque(largest_first(requests))
    room = [max_num_seqs] * num_engines
    places: dict[Any, tuple[int, int]] = {}
    while waiting or calls:
        while waiting and max(room) > 0:
            k, engine = waiting.popleft(), room.index(max(room))
            ref = ask(engine, requests[k])
            calls.add(ref, engine)
            places[ref] = engine, k
            room[engine] -= requests[k].params.n
        for ref, sampled in calls.next_answers(deadline, timeout_s).items():
            engine, k = places.pop(ref)
            room[engine] += requests[k].params.n
            yield k, sampled
