"""The rollout batches of a run: rank 0 collects them (collector.py), every rank takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np

from gpg_megatron.host.collectives import Broadcast, OnRank0
from gpg_megatron.loop.collector import Collector, Rollout
from gpg_megatron.loop.group_arrays import FlatGroups, flatten, unflatten
from gpg_megatron.loop.state import LoopState
from gpg_megatron.observe.watchdog import Watchdog


class Rollouts:
    """The rollout batches of a run, as every rank takes them. All calls are collective."""

    def __init__(
        self,
        collector: Collector | None,
        on_rank0: OnRank0,
        broadcast: Broadcast,
        watchdog: Watchdog,
        *,
        ahead: bool,
        stops: bool = False,
    ) -> None:
        """
        Args:
            collector: on rank 0; None elsewhere.
            ahead: the engines work while the policy learns.
            stops: nothing is in flight while held-out prompts are answered.
        """
        self._collector = collector
        self._on_rank0 = on_rank0
        self._broadcast = broadcast
        self._watchdog = watchdog
        self._ahead = ahead
        self._stops = ahead and stops

    def take(self) -> Rollout:
        """The next batch. Arrays are not pickled."""
        with self._watchdog.phase("wait") if self._ahead else nullcontext():
            return self._take()

    def _take(self) -> Rollout:
        mine: list[tuple[Rollout, FlatGroups]] = []

        def describe() -> tuple[Rollout, str, list[tuple[tuple[int, ...], str]]]:
            rollout = self._here.take()
            flat = flatten(rollout.groups, with_texts=False)
            mine.append((rollout, flat))
            forms = [(array.shape, array.dtype.name) for array in flat.arrays]
            return replace(rollout, groups=()), flat.text, forms

        rest, text, forms = self._on_rank0(describe)
        rollout, flat = mine.pop() if mine else (rest, _empty(text, forms))
        for array in flat.arrays:
            self._broadcast(array)
        return rollout if self._collector else replace(rest, groups=unflatten(flat))

    @contextmanager
    def updating(self) -> Iterator[None]:
        """The body may change the engines' weights."""
        with self._watchdog.phase("wait") if self._ahead else nullcontext():
            self._on_rank0(lambda: self._here.begin_publish())
        yield
        if self._collector is not None:
            self._collector.end_publish()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The body answers held-out prompts, with the newest weights. On rank 0."""
        if self._stops:
            self._here.begin_publish(quiet=True)
        yield
        if self._stops:
            self._here.end_publish()

    def state(self) -> LoopState:
        """What a resumed run needs. On rank 0."""
        return self._here.state()

    @property
    def _here(self) -> Collector:
        assert self._collector is not None, "called on rank 0 only"
        return self._collector


def _empty(text: str, forms: Sequence[tuple[tuple[int, ...], str]]) -> FlatGroups:
    tokens, logprobs, experts = (np.empty(shape, dtype) for shape, dtype in forms)
    return FlatGroups(text=text, tokens=tokens, logprobs=logprobs, experts=experts)
