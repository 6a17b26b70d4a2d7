"""Which engine answers which request.

requests that the engines can run at once --spread----> engine 0 .. N-1
more than that                            --handed out, as engines have room-->
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from gpg_megatron.rollout.calls import PendingCalls
from gpg_megatron.rollout.sampling import Sampled, SamplingRequest

Ask = Callable[[int, Sequence[SamplingRequest]], Any]
"""Sends requests to an engine; Ray's reference to its answer."""


def largest_first(requests: Sequence[SamplingRequest]) -> list[int]:
    """Indices of the requests by their token limits, the largest first; ties in their order."""
    return sorted(range(len(requests)), key=lambda i: (-_cost(requests[i]), i))


def _cost(request: SamplingRequest) -> int:
    return len(request.prompt.token_ids) + request.params.n * request.params.max_tokens


def spread(requests: Sequence[SamplingRequest], num_engines: int) -> list[list[int]]:
    """Indices of the requests for each engine, balanced by their token limits.

    Largest first, each to the engine with the least so far; ties go to the lower index.
    """
    load = [0] * num_engines
    parts: list[list[int]] = [[] for _ in range(num_engines)]
    for i in largest_first(requests):
        engine = load.index(min(load))
        parts[engine].append(i)
        load[engine] += _cost(requests[i])
    return parts


def sample(
    requests: Sequence[SamplingRequest],
    ask: Ask,
    calls: PendingCalls,
    *,
    num_engines: int,
    max_num_seqs: int,
    timeout_s: float,
) -> list[list[Sampled]]:
    """[request][sample].

    Args:
        calls: none yet.
        max_num_seqs: samples that one engine runs at once.
        timeout_s: for all of it.

    Raises:
        EngineDied, EngineError, TimeoutError
    """
    if sum(r.params.n for r in requests) <= max_num_seqs * num_engines:
        answers = _spread(requests, ask, calls, num_engines, timeout_s)
    else:
        answers = _hand_out(requests, ask, calls, [max_num_seqs] * num_engines, timeout_s)
    return [answers[k] for k in range(len(requests))]


def _spread(
    requests: Sequence[SamplingRequest],
    ask: Ask,
    calls: PendingCalls,
    num_engines: int,
    timeout_s: float,
) -> dict[int, list[Sampled]]:
    """Everything at once, since the engines can run all of it at once."""
    parts = spread(requests, num_engines)
    asked = [engine for engine, part in enumerate(parts) if part]
    for engine in asked:
        calls.add(ask(engine, [requests[k] for k in parts[engine]]), engine)
    return {
        k: samples
        for engine, answer in zip(asked, calls.answers(timeout_s), strict=True)
        for k, samples in zip(parts[engine], answer, strict=True)
    }


def _hand_out(
    requests: Sequence[SamplingRequest],
    ask: Ask,
    calls: PendingCalls,
    room: list[int],
    timeout_s: float,
) -> dict[int, list[Sampled]]:
    """The largest first, each to the engine with most room; none idles while others have a
    queue of their own."""
    deadline = time.monotonic() + timeout_s
    waiting = deque(largest_first(requests))
    places: dict[Any, tuple[int, int]] = {}
    answers: dict[int, list[Sampled]] = {}
    while waiting or calls:
        while waiting and max(room) > 0:
            k, engine = waiting.popleft(), room.index(max(room))
            ref = ask(engine, [requests[k]])
            calls.add(ref, engine)
            places[ref] = engine, k
            room[engine] -= requests[k].params.n
        for ref, answer in calls.next_answers(deadline, timeout_s).items():
            engine, k = places.pop(ref)
            (answers[k],) = answer
            room[engine] += requests[k].params.n
    return answers
