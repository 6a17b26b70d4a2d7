"""Rollout batches, one step at a time; with trainer.max_staleness=1 the next one is drawn while
the policy learns from the present one.

    take prompts -> generate -> score -> (too few live groups: draw again) -> groups
                                         (more than a batch: kept for the next step)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np

from gpg_megatron.algorithm.advantages import check_dead_by
from gpg_megatron.algorithm.redraw import draw_size, needs_redraw, select
from gpg_megatron.config.sections import Config
from gpg_megatron.data.stream import Stream
from gpg_megatron.host.collectives import Broadcast, OnRank0
from gpg_megatron.loop.group_arrays import FlatGroups, flatten, unflatten
from gpg_megatron.loop.state import LoopState
from gpg_megatron.observe.metrics import rollout_metrics
from gpg_megatron.observe.watchdog import Watchdog
from gpg_megatron.reward.pool import RewardPool
from gpg_megatron.rollout.fleet import Fleet
from gpg_megatron.rollout.sampling import SamplingRequest, training_params
from gpg_megatron.types import Prompt, ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One rollout batch, as every rank sees it."""

    groups: tuple[ScoredGroup, ...]
    """To train on. Only rank 0 has their messages and texts."""
    skipped: bool
    """No update is to be made."""
    metrics: Mapping[str, float]
    """Of what was sampled for this step, whether it is trained on now, later or never."""
    timings: Mapping[str, float]
    """timing/rollout_s and timing/reward_s, whenever they were spent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawn:
    """What the engines and the scorers made for one step."""

    step: int
    groups: tuple[ScoredGroup, ...]
    redraws: int
    timings: Mapping[str, float]


class Rollouts:
    """The rollout batches of a run, as every rank takes them. All calls are collective."""

    def __init__(
        self,
        collector: Collector | None,
        on_rank0: OnRank0,
        broadcast: Broadcast,
        watchdog: Watchdog,
        *,
        last_ahead: int,
    ) -> None:
        """
        Args:
            collector: on rank 0; None elsewhere.
            last_ahead: batches up to this step's are begun while the one before is learned from;
                0: none is.
        """
        self._collector = collector
        self._on_rank0 = on_rank0
        self._broadcast = broadcast
        self._watchdog = watchdog
        self._last_ahead = last_ahead

    def take(self, step: int) -> Rollout:
        """The batch of a step; the engines begin the next one if they may run ahead."""
        rollout = self._share(lambda: self._drawn.take(step))
        if self._collector is not None and step < self._last_ahead:
            self._collector.begin(step + 1)
        return rollout

    def _share(self, draw: Callable[[], Rollout]) -> Rollout:
        """What draw returns on rank 0, on every rank. Arrays are not pickled."""
        mine: list[tuple[Rollout, FlatGroups]] = []

        def describe() -> tuple[Rollout, str, int, int]:
            rollout = draw()
            flat = flatten(map(_without_texts, rollout.groups))
            mine.append((rollout, flat))
            return replace(rollout, groups=()), flat.text, len(flat.tokens), len(flat.logprobs)

        rest, text, n_tokens, n_logprobs = self._on_rank0(describe)
        rollout, flat = mine.pop() if mine else (rest, _empty(text, n_tokens, n_logprobs))
        for array in (flat.tokens, flat.logprobs):
            self._broadcast(array)
        return rollout if self._collector else replace(rest, groups=unflatten(flat))

    def drain(self) -> None:
        """Wait until the engines have drawn what they began: weights must not change under it."""
        if self._last_ahead:
            with self._watchdog.phase("wait"):
                self._on_rank0(lambda: self._drawn.wait())

    def state(self) -> LoopState:
        """What a resumed run needs. On rank 0."""
        return self._drawn.state()

    @property
    def _drawn(self) -> Collector:
        assert self._collector is not None, "called on rank 0 only"
        return self._collector


class Collector:
    """Draws in a thread of its own. Between wait() and the next begin() the engines are idle."""

    def __init__(
        self, config: Config, stream: Stream, fleet: Fleet, pool: RewardPool, watchdog: Watchdog
    ) -> None:
        self._config = config
        self._stream = stream
        self._fleet = fleet
        self._pool = pool
        self._watchdog = watchdog
        self._carried: tuple[ScoredGroup, ...] = ()
        self._ahead: tuple[int, Future[_Drawn]] | None = None

    def begin(self, step: int) -> None:
        """Start to draw the batch of a step, with the weights that the engines have now."""
        assert self._ahead is None, "one batch at a time"
        future: Future[_Drawn] = Future()

        def draw() -> None:
            try:
                future.set_result(self._draw(step))
            except Exception as error:  # raised again where the batch is taken
                future.set_exception(error)

        # A daemon: a run that fails elsewhere does not wait for the engines.
        threading.Thread(target=draw, name="rollout", daemon=True).start()
        self._ahead = step, future

    def wait(self) -> None:
        """Return when the batch that was begun is there. Raises what drawing it raised."""
        if self._ahead is not None:
            self._ahead[1].result()

    def take(self, step: int) -> Rollout:
        """The batch of a step; drawn now, unless it was begun before."""
        if self._ahead is None:
            self.begin(step)
        assert self._ahead is not None and self._ahead[0] == step
        drawn, carried = self._ahead[1].result(), self._carried
        self._ahead = None
        size = self._config.trainer.train_batch_size
        selection = select([*carried, *drawn.groups], self._config.algorithm, batch_size=size)
        self._carried = selection.carried
        return Rollout(
            groups=selection.groups,
            skipped=selection.skipped,
            metrics={
                **rollout_metrics(drawn.groups),
                "group/redraws": drawn.redraws,
                "group/redraws_exhausted": int(selection.exhausted),
                "group/drawn": len(drawn.groups),
                "group/carried_in": len(carried),
                "group/carried_out": len(selection.carried),
                "group/filtered": selection.n_filtered,
            },
            timings=drawn.timings,
        )

    def state(self) -> LoopState:
        """What a resumed run needs: the position, and what was drawn and not yet trained on."""
        ahead, drawn = None, self._ahead[1].result() if self._ahead else None
        if drawn is not None:
            ahead = {"step": drawn.step, "redraws": drawn.redraws, "timings": dict(drawn.timings)}
        return LoopState(
            values={
                "stream": self._stream.state(),
                "carried": len(self._carried),
                "ahead": ahead,
            },
            groups=(*self._carried, *(drawn.groups if drawn else ())),
        )

    def restore(self, state: LoopState) -> None:
        """Go on where state() was taken. Raises UserError: the data or the seed are others."""
        values, n_carried = state.values, state.values["carried"]
        self._stream.restore(values["stream"])
        self._carried = state.groups[:n_carried]
        if values["ahead"]:
            drawn = _Drawn(groups=state.groups[n_carried:], **values["ahead"])
            future: Future[_Drawn] = Future()
            future.set_result(drawn)
            self._ahead = drawn.step, future

    def _draw(self, step: int) -> _Drawn:
        size, algorithm = self._config.trainer.train_batch_size, self._config.algorithm
        carried, n = self._carried, self._config.rollout.n
        drawn: list[ScoredGroup] = []
        redraws = 0
        while not drawn or needs_redraw([*carried, *drawn], algorithm, redraws, batch_size=size):
            redraws += bool(drawn)
            prompts = self._stream.take(draw_size(len(carried) + len(drawn), size))
            with self._watchdog.phase("rollout"):
                requests = sampling_requests(self._config, prompts, step=step, redraw=redraws)
                completions = self._fleet.generate(requests)
            with self._watchdog.phase("reward"):
                scored = self._pool.score(
                    [(p, completions[i * n : (i + 1) * n]) for i, p in enumerate(prompts)]
                )
            drawn += map(_without_extra_info, scored)
            check_dead_by(drawn, algorithm.dead_by)
        timings = self._watchdog.pop_timings()
        return _Drawn(step=step, groups=tuple(drawn), redraws=redraws, timings=timings)


def _without_extra_info(group: ScoredGroup) -> ScoredGroup:
    """The rewards are known, and it may hold what neither JSON nor another rank can read."""
    return replace(group, prompt=replace(group.prompt, extra_info={}))


def _without_texts(group: ScoredGroup) -> ScoredGroup:
    """What the policy learns from: a third of it would be texts."""
    return replace(
        group,
        prompt=replace(group.prompt, messages=()),
        completions=tuple(replace(completion, text="") for completion in group.completions),
    )


def _empty(text: str, n_tokens: int, n_logprobs: int) -> FlatGroups:
    return FlatGroups(
        text=text,
        tokens=np.empty(n_tokens, np.int32),
        logprobs=np.empty(n_logprobs, np.float32),
    )


def sampling_requests(
    config: Config, prompts: Sequence[Prompt], *, step: int, redraw: int
) -> list[SamplingRequest]:
    """One request for each prompt; no two of a run share a seed."""
    seeds = [_seed(config.trainer.seed, step, redraw, place) for place in range(len(prompts))]
    return [
        SamplingRequest(prompt=prompt, params=training_params(config.rollout, seed=seed))
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]


def _seed(run: int, step: int, redraw: int, place: int) -> int:
    """One number for the four; the engine hashes it, so only uniqueness matters."""
    return ((run * 10**6 + step) * 10**3 + redraw) * 10**6 + place
