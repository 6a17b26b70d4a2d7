"""Rollout batches, one step at a time; with trainer.max_staleness=1 the next one is drawn while
the policy learns from the present one.

    take prompts -> generate -> score -> (too few live groups: draw again) -> groups
                                         (more than a batch: kept for the next step)
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from gpg_megatron.algorithm.advantages import check_dead_by
from gpg_megatron.algorithm.redraw import Selection, draw_size, needs_redraw, select
from gpg_megatron.config.sections import Config
from gpg_megatron.data.stream import Stream
from gpg_megatron.host.collectives import OnRank0
from gpg_megatron.loop.group_json import from_json, to_json
from gpg_megatron.observe.watchdog import Watchdog
from gpg_megatron.reward.pool import RewardPool
from gpg_megatron.rollout.fleet import Fleet
from gpg_megatron.rollout.sampling import SamplingRequest, training_params
from gpg_megatron.types import Prompt, ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One rollout batch, as every rank sees it."""

    selection: Selection
    drawn: tuple[ScoredGroup, ...]
    """Sampled for this step, whether they are trained on now, later or never."""
    redraws: int
    n_carried: int
    """Groups that the step before left to this one."""
    timings: Mapping[str, float]
    """timing/rollout_s and timing/reward_s, whenever they were spent."""

    @property
    def groups(self) -> tuple[ScoredGroup, ...]:
        """To train on."""
        return self.selection.groups


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
        self._watchdog = watchdog
        self._last_ahead = last_ahead

    def take(self, step: int) -> Rollout:
        """The batch of a step; the engines begin the next one if they may run ahead."""
        rollout = self._on_rank0(lambda: self._drawn.take(step))
        if self._collector is not None and step < self._last_ahead:
            self._collector.begin(step + 1)
        return rollout

    def drain(self) -> None:
        """Wait until the engines have drawn what they began: weights must not change under it."""
        if self._last_ahead:
            with self._watchdog.phase("wait"):
                self._on_rank0(lambda: self._drawn.wait())

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as plain JSON. On rank 0."""
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
        self._stream.seen(drawn.groups)
        size = self._config.trainer.train_batch_size
        selection = select([*carried, *drawn.groups], self._config.algorithm, batch_size=size)
        self._carried = selection.carried
        return Rollout(
            selection=selection,
            drawn=drawn.groups,
            redraws=drawn.redraws,
            n_carried=len(carried),
            timings=drawn.timings,
        )

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as plain JSON: the position, and what was drawn and not yet
        trained on."""
        drawn = self._ahead[1].result() if self._ahead else None
        return {
            "stream": self._stream.state(),
            "carried": list(map(to_json, self._carried)),
            "ahead": drawn and _to_json(drawn),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where state() was taken. Raises UserError: the data or the seed are others."""
        self._stream.restore(state["stream"])
        self._carried = tuple(map(from_json, state["carried"]))
        if state["ahead"]:
            drawn = _from_json(state["ahead"])
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


def _to_json(drawn: _Drawn) -> dict[str, Any]:
    return {
        "step": drawn.step,
        "groups": list(map(to_json, drawn.groups)),
        "redraws": drawn.redraws,
        "timings": dict(drawn.timings),
    }


def _from_json(data: Mapping[str, Any]) -> _Drawn:
    return _Drawn(**dict(data) | {"groups": tuple(map(from_json, data["groups"]))})


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
