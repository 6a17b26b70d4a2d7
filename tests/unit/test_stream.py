"""The state machine of the rollouts: by hand, and by random schedules with losses and kills."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpg_megatron.algorithm.redraw import select
from gpg_megatron.config.algorithm import AlgorithmConfig
from gpg_megatron.loop.state import machine_from_json, machine_to_json
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
    Stop,
    Taken,
    advance,
    may_publish,
    next_batch,
)
from gpg_megatron.types import Prompt, Reward, ScoredGroup
from tests.samples import int32


def play(rules: Rules, *events: Event, state: State | None = None) -> tuple[State, list[Action]]:
    """The last state, and all actions."""
    state = State() if state is None else state
    actions: list[Action] = []
    for event in events:
        state, new = advance(rules, state, event)
        actions += new
    return state, actions


def finished(*tickets: int, dead: tuple[int, ...] = ()) -> list[Event]:
    return [Finished(t, t not in dead) for t in tickets]


PUBLISH = (PublishBegan(), Published())


def tickets(batch: tuple[Group, ...] | None) -> list[int] | None:
    return None if batch is None else [group.ticket for group in batch]


# ---- by hand --------------------------------------------------------------------------------


def test_in_turn_the_engines_work_only_while_the_trainer_waits() -> None:
    rules = Rules(size=2, staleness=0, last=2)
    state, actions = play(rules, *PUBLISH)
    assert actions == []
    state, actions = play(rules, Asked(), *finished(1, 0), state=state)
    assert actions == [Start((0, 1), 1, 0, 0)]
    assert tickets(next_batch(rules, state)) == [0, 1], "in the order of prompts"
    state, actions = play(rules, Taken(), *PUBLISH, state=state)
    assert actions == [] and may_publish(rules, state)
    state, actions = play(rules, Asked(), *finished(2, 3), Taken(), *PUBLISH, Asked(), state=state)
    assert actions == [Start((2, 3), 2, 0, 0)], "the run has two batches"


def test_one_ahead_is_begun_when_the_batch_before_is_taken() -> None:
    rules = Rules(size=2, staleness=1, last=9)
    state, actions = play(rules, *PUBLISH, Asked(), *finished(0, 1))
    assert actions == [Start((0, 1), 1, 0, 0)] and next_batch(rules, state)
    state, actions = play(rules, Taken(), PublishBegan(), state=state)
    assert actions == [Start((2, 3), 2, 0, 0)] and not may_publish(rules, state)
    state, actions = play(rules, *finished(2, 3), state=state)
    assert may_publish(rules, state)
    state, actions = play(rules, Published(), Asked(), state=state)
    assert actions == [], "the next batch is there"
    assert next_batch(rules, state) == (Group(ticket=2, weights=0), Group(ticket=3, weights=0))
    state, actions = play(rules, Taken(), state=state)
    assert actions == [Start((4, 5), 3, 0, 0)] and state.flying == {4: 1, 5: 1}


def test_dead_groups_are_redrawn_and_surplus_live_ones_are_carried() -> None:
    rules = Rules(size=3, staleness=0, last=9, wanted=1.0, max_redraws=2)
    state, actions = play(rules, Asked(), *finished(0, 1, 2, dead=(0, 2)))
    assert actions == [Start((0, 1, 2), 1, 0, 0), Start((3, 4, 5), 1, 1, 0)]
    assert next_batch(rules, state) is None
    state, actions = play(rules, *finished(3, 4, 5), state=state)
    assert actions == [] and tickets(next_batch(rules, state)) == [0, 1, 2, 3, 4, 5]
    state, actions = play(rules, Taken(frozenset({5})), *PUBLISH, Asked(), state=state)
    assert actions == [Start((6, 7), 2, 0, 0)], "one of three is there already"
    assert state.ready == (Group(ticket=5, weights=0, carried=True),)


@pytest.mark.parametrize(
    ("pattern", "wanted", "redraws"),
    [
        ("dddddddddd", 0.0, 0),  # off
        ("LLLLLddddd", 0.6, 1),  # 5 of 10 < 6
        ("LLLLLLdddd", 0.6, 0),  # met exactly
        ("LLLLLddddd" + "Lddddddddd", 0.6, 1),  # accumulated: 6
        ("dddddddddd" * 3, 0.6, 3),
        ("dddddddddd" * 4, 0.6, 3),  # no draw is left
        ("LLLLLLLLLL", 1.0, 0),
    ],
)
def test_live_groups_add_up_over_draws(pattern: str, wanted: float, redraws: int) -> None:
    rules = Rules(size=10, staleness=0, last=1, wanted=wanted, max_redraws=3)
    events = [Finished(ticket, letter == "L") for ticket, letter in enumerate(pattern)]
    state, _ = play(rules, Asked(), *events)
    assert state.redraws == redraws
    assert (next_batch(rules, state) is not None) is (len(pattern) == 10 * (1 + redraws))


def test_no_draw_is_left() -> None:
    rules = Rules(size=2, staleness=0, last=9, wanted=0.5, max_redraws=1)
    state, _ = play(rules, Asked(), *finished(0, 1, 2, dead=(0, 1, 2)))
    assert next_batch(rules, state) is None
    state, actions = play(rules, *finished(3, dead=(3,)), state=state)
    assert actions == [] and tickets(next_batch(rules, state)) == [0, 1, 2, 3]


def test_a_drain_completes_the_next_batch_and_starts_nothing_else() -> None:
    rules = Rules(size=2, staleness=2, last=9, room=3)
    state, actions = play(rules, *PUBLISH, Asked(), *finished(0, 1), Taken())
    assert actions == [
        Start((0, 1, 2), 1, 0, 0),
        Start((3,), 1, 0, 3),
        Start((4,), 2, 0, 0),
    ], "two batches, three groups at once"
    state, actions = play(rules, PublishBegan(), *finished(2), state=state)
    assert actions == [] and not may_publish(rules, state), "5 is of the batch after the next"
    state, actions = play(rules, *finished(3, 4), Published(), state=state)
    assert actions == [Start((5,), 2, 0, 1)] and state.flying == {5: 1}


def test_weights_change_under_what_is_in_flight() -> None:
    rules = Rules(size=2, staleness=1, last=9, in_flight=True)
    state, actions = play(rules, *PUBLISH, Asked())
    assert actions == [Start((0, 1, 2, 3), 1, 0, 0)], "two batches are in time for these weights"
    state, actions = play(rules, *finished(3, 0, 1), Taken(), PublishBegan(), state=state)
    assert actions == [] and state.flying == {2: 0} and may_publish(rules, state)
    state, actions = play(rules, Published(), state=state)
    assert actions == [Start((4, 5), 2, 0, 0)] and state.flying == {2: 0, 4: 1, 5: 1}
    state, _ = play(rules, *finished(4, 5), state=state)
    assert next_batch(rules, state) is None, "2 comes before 4"


def test_what_is_lost_is_started_again_once_and_with_another_seed() -> None:
    rules = Rules(size=3, staleness=0, last=9)
    state, actions = play(rules, Asked(), Finished(1, True), Lost(frozenset({0, 2})))
    assert actions == [Start((0, 1, 2), 1, 0, 0), Start((0, 2), 1, 0, 3)]
    assert state.waiting == () and set(state.flying) == {0, 2}


def test_a_batch_that_chooses_waits_for_those_that_would_be_too_old() -> None:
    rules = Rules(size=2, staleness=2, last=9, in_flight=True, extra=2)
    state, actions = play(rules, *PUBLISH, Asked(), *finished(1, 3))
    assert actions == [Start((0, 1, 2, 3, 4, 5), 1, 0, 0)]
    assert tickets(next_batch(rules, state)) == [1, 3], "0 and 2 go on"
    state, _ = play(rules, Taken(), *PUBLISH, *finished(6, 7), state=state)
    assert next_batch(rules, state) is None, "they are not among the first four"
    state, _ = play(rules, *finished(4, 5), state=state)
    assert tickets(next_batch(rules, state)) == [4, 5]
    state, _ = play(rules, Taken(), *PUBLISH, state=state)
    assert next_batch(rules, state) is None, "0 and 2 are as old as they may be"
    state, _ = play(rules, *finished(0, 2), state=state)
    assert tickets(next_batch(rules, state)) == [0, 2], "before 6 and 7"


def test_what_is_aborted_is_drawn_again_and_what_is_cut_belongs_to_the_batch() -> None:
    abort = Rules(size=2, staleness=0, last=9, extra=1, unfinished="abort")
    state, actions = play(abort, Asked(), *finished(0, 2), Taken(), *PUBLISH, Asked())
    assert actions == [Start((0, 1, 2), 1, 0, 0), Stop((1,), False), Start((1, 3, 4), 2, 0, 0)]
    cut = Rules(size=3, staleness=0, last=9, extra=1, unfinished="cut")
    state, actions = play(cut, Asked(), *finished(0, 2))
    assert actions == [Start((0, 1, 2), 1, 0, 0), Stop((1,), True)]
    assert next_batch(cut, state) is None
    state, _ = play(cut, *finished(1), state=state)
    assert tickets(next_batch(cut, state)) == [0, 1, 2]


# ---- random schedules -----------------------------------------------------------------------


def scored(group: Group) -> ScoredGroup:
    prompt = Prompt(
        id=str(group.ticket), token_ids=int32((1,)), messages=(), ground_truth="", data_source=""
    )
    rewards = [Reward(score=s, accuracy=s, parts={}) for s in (0.0, float(group.live))]
    return ScoredGroup(prompt=prompt, completions=(), rewards=tuple(rewards))


@dataclass
class World:
    """A trainer and engines that do what the machine says, in an order that a seed decides."""

    rules: Rules
    algorithm: AlgorithmConfig
    chance: random.Random
    p_live: float
    state: State = field(default_factory=State)
    flying: dict[int, int] = field(default_factory=dict)
    trained: Counter[int] = field(default_factory=Counter)
    dropped: Counter[int] = field(default_factory=Counter)
    seeds: set[tuple[int, int, int]] = field(default_factory=set)
    phase: str = "publish"
    batches: int = 0
    saved: Any = field(init=False)

    def __post_init__(self) -> None:
        self.save()

    def event(self, event: Event) -> None:
        self.state, actions = advance(self.rules, self.state, event)
        for action in actions:
            if isinstance(action, Stop):
                for ticket in action.tickets:
                    if self.flying.pop(ticket, None) is not None and action.keep:
                        self.event(Finished(ticket, True))
                continue
            for place, ticket in enumerate(action.tickets, start=action.place):
                assert ticket not in self.flying, "it is in flight once"
                self.flying[ticket] = self.state.weights
                seed = (action.batch, action.redraw, place)
                assert seed not in self.seeds
                self.seeds.add(seed)
        if not isinstance(event, Finished):
            assert set(self.state.flying) == set(self.flying)

    def finish_one(self) -> None:
        ticket = self.chance.choice(sorted(self.flying))
        del self.flying[ticket]
        self.event(Finished(ticket, self.chance.random() < self.p_live))

    def lose_some(self) -> None:
        lost = {t for t in self.flying if self.chance.random() < 0.5}
        for ticket in lost:
            del self.flying[ticket]
        self.event(Lost(frozenset(lost)))

    def kill(self) -> None:
        """The process ends; another one goes on from what was written last."""
        self.flying.clear()
        state, self.trained, self.dropped, self.seeds, self.batches = copy.deepcopy(self.saved)
        self.state = machine_from_json(json.loads(state))
        self.phase = "publish"

    def save(self) -> None:
        """As the loop does after a publish."""
        parts = (self.trained, self.dropped, self.seeds, self.batches)
        self.saved = copy.deepcopy((json.dumps(machine_to_json(self.state)), *parts))

    def trainer(self) -> None:
        """What the loop does next, if it can."""
        if self.phase == "publish":
            self.event(PublishBegan())
            self.phase = "publishing"
        elif self.phase == "publishing" and may_publish(self.rules, self.state):
            assert self.rules.in_flight or not self.flying
            self.event(Published())
            self.phase = "ask"
        elif self.phase == "ask":
            self.event(Asked())
            self.phase = "take"
        elif self.phase == "take" and (batch := next_batch(self.rules, self.state)) is not None:
            self.take(batch)
            self.phase = "publish"

    def take(self, batch: tuple[Group, ...]) -> None:
        by_id = {id(group): ticket for group, ticket in self.scored(batch)}
        chosen = select(self.order, self.algorithm, batch_size=self.rules.size)
        carried = {by_id[id(group)] for group in chosen.carried}
        kept = set() if chosen.skipped else {by_id[id(group)] for group in chosen.groups}
        for group in batch:
            age = self.state.learned - group.weights
            assert group.weights <= self.state.weights
            if group.ticket in kept:
                assert age <= self.rules.staleness + (group.carried and self.rules.staleness < 2)
        self.trained.update(kept)
        self.dropped.update({group.ticket for group in batch} - kept - carried)
        assert carried.isdisjoint(kept)
        self.event(Taken(frozenset(carried), chosen.skipped))
        self.batches += 1

    def scored(self, batch: tuple[Group, ...]) -> list[tuple[ScoredGroup, int]]:
        self.order = [scored(group) for group in batch]
        return [(s, g.ticket) for s, g in zip(self.order, batch, strict=True)]

    def nothing_is_lost_or_there_twice(self) -> None:
        there = Counter(self.state.pool) + self.trained + self.dropped
        assert there == Counter(range(self.state.next_ticket))


RULES = st.fixed_dictionaries(
    {
        "size": st.integers(1, 5),
        "staleness": st.integers(0, 4),
        "in_flight": st.booleans(),
        "room": st.none() | st.integers(1, 12),
        "wanted": st.sampled_from([0.0, 0.0, 0.5, 1.0]),
        "max_redraws": st.integers(0, 3),
        "extra": st.sampled_from([0, 0, 1, 3]),
        "unfinished": st.sampled_from(["carry", "abort", "cut"]),
    }
)


@settings(max_examples=250, deadline=None)
@given(
    rules=RULES,
    p_live=st.sampled_from([0.2, 0.7, 1.0]),
    on_exhausted=st.sampled_from(["train", "skip"]),
    filter_groups=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_nothing_is_lost_nothing_is_trained_on_twice_and_none_is_too_old(
    rules: dict[str, Any], p_live: float, on_exhausted: Any, filter_groups: bool, seed: int
) -> None:
    """1,000 schedules with engines that are lost and runs that are killed anywhere."""
    filters = filter_groups and rules["wanted"] == 1.0
    algorithm = AlgorithmConfig(
        beta_th=0.0 if filters else rules["wanted"],
        filter_groups=filters,
        max_redraws=rules["max_redraws"],
        on_exhausted=on_exhausted,
    )
    if rules["unfinished"] == "cut":
        rules["extra"] = min(rules["extra"], rules["size"] - 1)
    for number in range(4):
        chance = random.Random(f"{seed}/{number}")
        run(World(Rules(last=6, **rules), algorithm, chance, p_live))


def run(world: World) -> None:
    """To the last batch."""
    chance, rules, steps = world.chance, world.rules, 0
    while world.batches < rules.last:
        steps += 1
        assert steps < 5000, "it comes to its end"
        p = chance.random()
        if p < 0.01:
            world.kill()
        elif p < 0.03:
            world.lose_some()
        elif p < 0.05 and world.phase == "ask":
            world.save()
        elif p < 0.6 and world.flying:
            world.finish_one()
        else:
            world.trainer()
        if p < 0.05 or world.phase == "publish":
            world.nothing_is_lost_or_there_twice()
            n_open = (1 + rules.staleness) * rules.size + rules.extra
            most = max(n_open, rules.size * (1 + rules.max_redraws) + rules.extra)
            assert len(world.state.pool) <= most, "a bounded number of prompts is taken"
        assert rules.room is None or len(world.flying) <= rules.room
