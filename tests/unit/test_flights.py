"""Requests in flight, on engines that answer, hang on to them or are lost when the test says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpg_megatron.rollout import flights as flights_module
from gpg_megatron.rollout.calls import PendingCalls
from gpg_megatron.rollout.failures import EngineDied
from gpg_megatron.rollout.flights import Flights, answer_all
from gpg_megatron.rollout.sampling import Sampled, SamplingRequest
from gpg_megatron.types import Completion, Prompt, SamplingParams
from tests.samples import float32, int32


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flights_module, "_LOOK_S", 0.001)


def request(i: int, *, length: int = 3, n: int = 2, max_tokens: int = 4) -> SamplingRequest:
    """The seed is i."""
    prompt = Prompt(
        id=f"d/{i}", token_ids=int32(range(length)), messages=(), ground_truth="", data_source="d"
    )
    params = SamplingParams(
        n=n, temperature=1.0, top_p=1.0, top_k=-1, max_tokens=max_tokens, stop=(), seed=i
    )
    return SamplingRequest(prompt=prompt, params=params)


class Ref:
    """To an answer, as Ray's."""

    def __init__(self, future: Future[Sampled]) -> None:
        self.future = lambda: future


class Engines:
    """See flights.Engines. An engine that has gone is replaced by one with a new id."""

    def __init__(self, n: int) -> None:
        self.there = list(range(n))
        self.replaces = True
        self.version: int | None = 0
        self.open: dict[str, tuple[int, SamplingRequest, Future[Sampled]]] = {}
        self.asked: list[tuple[str, int, SamplingRequest]] = []
        self.stopped: list[tuple[int, str]] = []

    def ready(self) -> list[int]:
        return list(self.there)

    def ask(self, engine: int, request: SamplingRequest, name: str) -> Any:
        assert engine in self.there
        future: Future[Sampled] = Future()
        self.open[name] = engine, request, future
        self.asked.append((name, engine, request))
        return Ref(future)

    def answer(self, name: str) -> None:
        """The seed, and that many samples of it."""
        _, request, future = self.open.pop(name)
        n = request.params.n
        future.set_result(
            Sampled(
                lengths=(1,) * n,
                token_ids=int32([request.params.seed] * n),
                logprobs=float32([-1.0] * n),
                finish_reasons=("stop",) * n,
                texts=("",) * n,
                versions=((("0", 0, 1),),) * n,
            )
        )

    def lose(self, engine: int) -> None:
        if self.replaces:
            self.there.remove(engine)
        for name in [name for name, (owner, _, _) in self.open.items() if owner == engine]:
            self.open.pop(name)[2].set_exception(EngineDied("it is gone"))

    def stop(self, engine: int, name: str) -> None:
        self.stopped.append((engine, name))

    def generating(self, sent: Mapping[Any, int]) -> PendingCalls:
        def answers(timeout_s: float) -> list[Any]:
            ((ref, _),) = sent.items()
            return [ref.future().result()]

        return cast(PendingCalls, SimpleNamespace(answers=answers))


def flights_of(engines: Engines) -> Flights:
    return Flights(engines, timeout_s=20.0)


class Watched(Flights):
    """The answers come in a random order."""

    def __init__(self, engines: Engines, random: Random) -> None:
        super().__init__(engines, timeout_s=20.0)
        self._held = engines
        self._random = random
        self.loads: list[Counter[int]] = []
        """Samples of each engine, whenever an answer is waited for."""

    def next(self) -> list[tuple[int, list[Completion] | None]]:
        load: Counter[int] = Counter()
        for engine, request, _ in self._held.open.values():
            load[engine] += request.params.n
        self.loads.append(load)
        self._held.answer(self._random.choice(list(self._held.open)))
        return super().next()


def test_no_two_requests_of_an_engine_have_one_name() -> None:
    """A stream of groups and an evaluation beside it each have flights of their own."""
    engines = Engines(1)
    stream, evaluation = flights_of(engines), flights_of(engines)
    for key in range(3):
        for flights in (stream, evaluation):
            flights.start(key, request(key))
    assert len({name for name, _, _ in engines.asked}) == len(engines.asked) == 6


def test_what_ends_while_it_is_stopped_is_counted_once() -> None:
    landed: list[Any] = []

    class Ending(Engines):
        def stop(self, engine: int, name: str) -> None:
            self.answer(name)
            landed.extend(flights.next())  # as another thread may

    flights = flights_of(Ending(1))
    flights.start(0, request(0))
    flights.stop(0, keep=False)
    assert landed == [] and len(flights) == flights.owed == 0


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 8), st.integers(1, 99)), max_size=30),
    st.integers(1, 4),
    st.integers(8, 40),
    st.randoms(use_true_random=False),
)
def test_each_request_is_answered_once_and_no_engine_idles_while_any_waits(
    sizes: list[tuple[int, int, int]], n_engines: int, max_num_seqs: int, random: Random
) -> None:
    requests = [request(i, length=p, n=n, max_tokens=m) for i, (p, n, m) in enumerate(sizes)]
    flights = Watched(Engines(n_engines), random)
    answers = answer_all(flights, requests, n_engines * max_num_seqs)
    found = [[(c.prompt_id, c.index) for c in group] for group in answers]
    assert found == [[(f"d/{i}", k) for k in range(n)] for i, (_, n, _) in enumerate(sizes)]
    for load in flights.loads:
        assert sum(load.values()) < n_engines * max_num_seqs + 8, "there was room for the last one"
    if sum(n for _, n, _ in sizes) >= n_engines * (max_num_seqs + 8):
        assert all(flights.loads[0][engine] > max_num_seqs - 8 for engine in range(n_engines))


# ---- engines that are lost --------------------------------------------------------------------


class Fated(Engines):
    """Every request meets a fate: its engine answers all that it has, keeps it for later, or is
    lost. When none is left another one comes, with the same weights or newer ones."""

    def __init__(self, n: int, fates: Sequence[str], publishes: Sequence[bool]) -> None:
        super().__init__(n)
        self._fates = list(fates)
        self._publishes = list(publishes)
        self._next_id = n
        self._old = 0

    def ready(self) -> list[int]:
        if self.there:
            return list(self.there)
        if self.version is None:
            self.version = self._old + (self._publishes.pop() if self._publishes else 0)
            self.there = [self._next_id]
            self._next_id += 1
        else:
            self._old, self.version = self.version, None
        return []

    def ask(self, engine: int, request: SamplingRequest, name: str) -> Any:
        ref = super().ask(engine, request, name)
        fate = self._fates.pop() if self._fates else "answers"
        if fate == "lost":
            self.lose(engine)
        elif fate == "answers":
            for other in list(self.open):
                self.answer(other)
        return ref


class Unheld(Flights):
    """Of what is kept, the oldest is answered when an answer is waited for."""

    def __init__(self, engines: Fated) -> None:
        super().__init__(engines, timeout_s=20.0)
        self._held = engines

    def _wait(self, seconds: float) -> list[str]:
        if self._held.open:
            self._held.answer(next(iter(self._held.open)))
        return super()._wait(seconds)


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=12),
    n_engines=st.integers(1, 3),
    room=st.integers(1, 12),
    fates=st.lists(st.sampled_from(["answers", "keeps", "lost"]), max_size=30),
    publishes=st.lists(st.booleans(), max_size=8),
)
def test_every_request_is_answered_by_its_own_seed_whatever_is_lost(
    sizes: list[int], n_engines: int, room: int, fates: list[str], publishes: list[bool]
) -> None:
    requests = [request(i, n=n) for i, n in enumerate(sizes)]
    flights = Unheld(Fated(n_engines, fates, publishes))
    answers = answer_all(flights, requests, room)
    found = [[(c.prompt_id, c.token_ids.tolist()) for c in group] for group in answers]
    assert found == [[(f"d/{i}", [i])] * n for i, n in enumerate(sizes)]
    assert len(flights) == flights.owed == 0


def test_what_a_lost_engine_owes_goes_to_another_one_unchanged() -> None:
    engines = Engines(2)
    flights = flights_of(engines)
    for key in range(4):
        flights.start(key, request(key))
    assert [engine for _, engine, _ in engines.asked] == [0, 1, 0, 1]
    engines.lose(0)
    assert flights.next() == [] and len(flights) == 4
    engines.answer(engines.asked[1][0])
    assert [key for key, _ in flights.next()] == [1]
    assert [(engine, r.params.seed) for _, engine, r in engines.asked[4:]] == [(1, 0), (1, 2)]


def test_with_no_engine_left_requests_wait_for_one_and_for_the_same_weights() -> None:
    engines = Engines(1)
    flights = flights_of(engines)
    for key in range(3):
        flights.start(key, request(key))
    engines.lose(0)
    assert flights.next() == []
    flights.start(3, request(3))
    flights.stop(1, keep=False)
    assert len(flights) == 3 and len(engines.asked) == 3
    engines.there, engines.version = [1], None  # weights are on their way: only new ones are asked
    flights.start(4, request(4))
    assert [r.params.seed for _, _, r in engines.asked[3:]] == [4]
    engines.version = 0
    engines.answer(engines.asked[3][0])
    assert [key for key, _ in flights.next()] == [4]
    assert [r.params.seed for _, _, r in engines.asked[4:]] == [0, 2, 3]
    engines.lose(1)
    assert flights.next() == []
    engines.there, engines.version = [2], 1
    assert flights.next() == [(0, None), (2, None), (3, None)], "newer weights: all over again"
    assert len(flights) == flights.owed == 0


def test_an_engine_that_nothing_replaces_is_an_error() -> None:
    engines = Engines(2)
    engines.replaces = False
    flights = flights_of(engines)
    flights.start(0, request(0))
    engines.lose(0)
    with pytest.raises(EngineDied, match="it is gone"):
        flights.next()
