"""Drives the state machine of the rollouts (stream.py) on rank 0.

    trainer's thread   take: Asked, Taken        publish: PublishBegan, Published
    thread "rollout"   groups end --> are scored --> Finished; are lost with their engine --> Lost

Whichever thread brings an event does what the machine then wants, under one lock.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from gpg_megatron.algorithm.advantages import check_dead_by, is_live
from gpg_megatron.algorithm.redraw import Selection, select
from gpg_megatron.config.sections import Config
from gpg_megatron.data.stream import Stream
from gpg_megatron.loop.state import LoopState, machine_from_json, machine_to_json
from gpg_megatron.loop.stream import (
    Action,
    Asked,
    Event,
    Finished,
    Group,
    Lost,
    PublishBegan,
    Published,
    Rules,
    Start,
    State,
    Taken,
    advance,
    age,
    may_publish,
    next_batch,
    room_for,
)
from gpg_megatron.observe.metrics import rollout_metrics
from gpg_megatron.observe.watchdog import Watchdog
from gpg_megatron.reward.pool import RewardPool
from gpg_megatron.rollout.flights import Flights, largest_first
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


def rules_of(config: Config, room: int) -> Rules:
    """room: samples that all engines decode at once."""
    t, r = config.trainer, config.rollout
    return Rules(
        size=t.train_batch_size,
        staleness=t.max_staleness,
        last=t.total_training_steps,
        in_flight=r.update == "in-flight",
        room=room_for(room, r.n),
        wanted=config.algorithm.wanted_fraction,
        max_redraws=config.algorithm.max_redraws,
        extra=math.ceil(r.oversample * t.train_batch_size),
        unfinished=r.unfinished,
    )


class Collector:
    """Groups as the trainer takes them. What fails in its thread is raised where it is used."""

    def __init__(
        self,
        config: Config,
        rules: Rules,
        stream: Stream,
        flights: Flights,
        pool: RewardPool,
        watchdog: Watchdog,
    ) -> None:
        self._config = config
        self._rules = rules
        self._stream = stream
        self._flights = flights
        self._pool = pool
        self._watchdog = watchdog
        self._state = State()
        self._prompts: dict[int, Prompt] = {}
        """By ticket, of the whole pool."""
        self._groups: dict[int, ScoredGroup] = {}
        """By ticket, of those that are ready."""
        self._starts = itertools.count()
        self._flying: dict[int, int] = {}
        """Number of a start -> ticket, of those whose answers are wanted."""
        self._seconds: defaultdict[str, float] = defaultdict(float)
        """Since the last batch."""
        self._seen = time.monotonic()
        self._changed = threading.Condition()
        self._failure: Exception | None = None
        # A daemon: a run that fails elsewhere does not wait for the engines.
        threading.Thread(target=self._work, name="rollout", daemon=True).start()

    def take(self) -> Rollout:
        """The next batch, when it is there."""
        with self._changed:
            self._happens(Asked())
            self._wait(lambda: next_batch(self._rules, self._state) is not None)
            batch = next_batch(self._rules, self._state)
            assert batch is not None
            before, groups = self._state, [self._groups[group.ticket] for group in batch]
            size, algorithm = self._rules.size, self._config.algorithm
            selection = select(groups, algorithm, batch_size=size)
            tickets = {id(self._groups[group.ticket]): group.ticket for group in batch}
            carried = frozenset(tickets[id(group)] for group in selection.carried)
            drawn = [g for g, at in zip(groups, batch, strict=True) if not at.carried]
            self._stream.seen(drawn)
            self._happens(Taken(carried, selection.skipped))
            kept = set(self._state.pool)
            self._prompts = {t: prompt for t, prompt in self._prompts.items() if t in kept}
            ready = {group.ticket for group in self._state.ready}
            self._groups = {t: group for t, group in self._groups.items() if t in ready}
            seconds, self._seconds = self._seconds, defaultdict(float)
        return Rollout(
            groups=selection.groups,
            skipped=selection.skipped,
            metrics={
                **rollout_metrics(drawn),
                **redraw_metrics(before.redraws, drawn, groups, selection),
                **(stream_metrics(before, batch) if self._rules.staleness else {}),
            },
            timings=self._timings(seconds),
        )

    def begin_publish(self, *, quiet: bool = False) -> None:
        """Return when weights may change; quiet: when nothing is in flight."""
        with self._changed:
            self._happens(PublishBegan())
            self._wait(lambda: may_publish(self._rules, self._state, quiet=quiet))

    def end_publish(self) -> None:
        """They have changed, or need not."""
        with self._changed:
            self._happens(Published())

    def state(self) -> LoopState:
        """What a resumed run needs: the position, the groups that are ready, and of which prompts
        there are more in flight."""
        with self._changed:
            self._check()
            ready = {group.ticket for group in self._state.ready}
            return LoopState(
                values={
                    "stream": self._stream.state(),
                    "machine": machine_to_json(self._state),
                    "prompts": {t: p.id for t, p in self._prompts.items() if t not in ready},
                    "seconds": dict(self._seconds),
                },
                groups=tuple(self._groups[ticket] for ticket in sorted(ready)),
            )

    def restore(self, state: LoopState, prompts: Mapping[str, Prompt]) -> None:
        """Go on where state() was taken. Raises UserError: the data or the seed are others.

        Args:
            prompts: those of the data, by id.
        """
        values = state.values
        self._stream.restore(values["stream"])
        self._state = machine_from_json(values["machine"])
        tickets = (group.ticket for group in self._state.ready)
        self._groups = dict(zip(tickets, state.groups, strict=True))
        self._prompts = {t: group.prompt for t, group in self._groups.items()}
        self._prompts |= {int(t): prompts[name] for t, name in values["prompts"].items()}
        self._seconds = defaultdict(float, values["seconds"])

    # ---- under the lock -----------------------------------------------------------------------

    def _happens(self, event: Event) -> None:
        now = time.monotonic()
        if self._state.running and not self._state.flying:
            self._seconds["idle"] += now - self._seen
        self._seen = now
        self._state, actions = advance(self._rules, self._state, event)
        for action in actions:
            self._do(action)
        self._changed.notify_all()

    def _do(self, action: Action) -> None:
        if isinstance(action, Start):
            self._start(action)
            return
        for start, ticket in list(self._flying.items()):
            if ticket in action.tickets:
                self._flights.stop(start, keep=action.keep)
                if not action.keep:
                    del self._flying[start]

    def _start(self, action: Start) -> None:
        new = [ticket for ticket in action.tickets if ticket not in self._prompts]
        self._prompts |= zip(new, self._stream.take(len(new)), strict=True)
        requests = sampling_requests(
            self._config,
            [self._prompts[ticket] for ticket in action.tickets],
            step=action.batch,
            redraw=action.redraw,
            first=action.place,
        )
        for i in largest_first(requests):
            start = next(self._starts)
            self._flying[start] = action.tickets[i]
            self._flights.start(start, requests[i])

    def _wait(self, there: Callable[[], bool]) -> None:
        while not there():
            self._check()
            self._changed.wait()
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    # ---- the thread ---------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._flights))
                self._bring()
        except Exception as error:  # raised again where the groups are used
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _bring(self) -> None:
        """Wait for answers, score them, and say so."""
        with self._watchdog.phase("rollout"):
            ended = self._flights.next()
        with self._changed:
            wanted = [(start, answers) for start, answers in ended if start in self._flying]
            answered = [
                (start, self._prompts[self._flying[start]], answers)
                for start, answers in wanted
                if answers is not None
            ]
            if lost := {self._flying.pop(start) for start, answers in wanted if answers is None}:
                self._happens(Lost(frozenset(lost)))
        with self._watchdog.phase("reward"):
            scored = self._pool.score([(prompt, answers) for _, prompt, answers in answered])
        timings = self._watchdog.pop_timings()
        check_dead_by(scored, self._config.algorithm.dead_by)
        with self._changed:
            for name, spent in timings.items():
                self._seconds[name] += spent
            if len(self._flights):
                self._seconds["timing/rollout_s"] += timings["timing/reward_s"]
            for (start, _, _), group in zip(answered, scored, strict=True):
                self._lands(start, group)

    def _lands(self, start: int, group: ScoredGroup) -> None:
        ticket = self._flying.pop(start, None)
        if ticket is None:
            return  # aborted while it was scored
        if not all(len(completion.token_ids) for completion in group.completions):
            self._happens(Lost(frozenset({ticket})))  # cut before it had begun
            return
        self._groups[ticket] = _without_extra_info(group)
        self._happens(Finished(ticket, is_live(group, self._config.algorithm.dead_by)))

    def _timings(self, seconds: Mapping[str, float]) -> dict[str, float]:
        ahead = {"timing/idle_s": seconds.get("idle", 0.0)} if self._rules.staleness else {}
        return {k: v for k, v in seconds.items() if k.startswith("timing/")} | ahead


def stream_metrics(state: State, batch: Sequence[Group]) -> dict[str, float]:
    """When a batch is taken: groups that are not in it, and how old those in it are."""
    ages = Counter(age(state, group.weights) for group in batch)
    return {
        "stream/ready": len(state.ready) - len(batch),
        "stream/in_flight": len(state.flying),
        "stream/waiting": len(state.waiting),
        **{f"staleness/batch_{n}": count / len(batch) for n, count in sorted(ages.items())},
    }


def redraw_metrics(
    redraws: int, drawn: Sequence[ScoredGroup], groups: Sequence[ScoredGroup], chosen: Selection
) -> dict[str, float]:
    """How the batch came about, all counts."""
    return {
        "group/redraws": redraws,
        "group/redraws_exhausted": int(chosen.exhausted),
        "group/drawn": len(drawn),
        "group/carried_in": len(groups) - len(drawn),
        "group/carried_out": len(chosen.carried),
        "group/filtered": chosen.n_filtered,
    }


def _without_extra_info(group: ScoredGroup) -> ScoredGroup:
    """The rewards are known, and it may hold what neither JSON nor another rank can read."""
    return replace(group, prompt=replace(group.prompt, extra_info={}))


def sampling_requests(
    config: Config, prompts: Sequence[Prompt], *, step: int, redraw: int, first: int = 0
) -> list[SamplingRequest]:
    """One request for each prompt; no two of a run share a seed."""
    places = range(first, first + len(prompts))
    return [
        SamplingRequest(
            prompt=prompt,
            params=training_params(
                config.rollout, seed=_seed(config.trainer.seed, step, redraw, place)
            ),
            with_routing=config.rollout.router_replay,
        )
        for prompt, place in zip(prompts, places, strict=True)
    ]


def _seed(run: int, step: int, redraw: int, place: int) -> int:
    """One number for the four; the engine hashes it, so only uniqueness matters."""
    return ((run * 10**6 + step) * 10**3 + redraw) * 10**6 + place
