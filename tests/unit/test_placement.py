"""The table of placement: every legal way through it keeps its promises."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.placement.states import (
    RESIDENT,
    TRANSITIONS,
    Action,
    Load,
    Mode,
    Offload,
    Part,
    Placement,
    Sleep,
    State,
    Transition,
    Wake,
    actions_between,
)

COLOCATED = TRANSITIONS["colocated"]
GIVES_BACK = (Sleep, Offload)


def resident_after(resident: Iterable[Part], action: Action) -> frozenset[Part]:
    """What is on the GPUs after an action; it must not give back what is not there, nor take what
    is."""
    held = frozenset(resident)
    if isinstance(action, Sleep):
        assert "weights" in held, "the engines sleep already"
        return held - {"weights", "kv_cache"}
    parts: frozenset[Part] = frozenset(action.parts)
    if isinstance(action, Offload):
        assert parts <= held
        return held - parts
    assert not parts & held
    return held | parts


@st.composite
def legal_ways(draw: st.DrawFn) -> list[State]:
    """States from START on, each next one legal."""
    way = [State.START]
    for _ in range(draw(st.integers(1, 25))):
        way.append(draw(st.sampled_from([b for a, b in COLOCATED if a is way[-1]])))
    return way


@given(way=legal_ways())
def test_on_every_way_the_gpus_hold_what_a_state_needs_and_never_both(way: list[State]) -> None:
    held = RESIDENT[State.START]
    for before, after in pairwise(way):
        for action in COLOCATED[before, after]:
            held = resident_after(held, action)
            assert not {"kv_cache", "optimizer"} <= held
            assert not {"kv_cache", "parameters"} <= held
            assert not {"weights", "gradients"} <= held
            assert not {"weights", "optimizer"} <= held
        if before is State.START:  # the policy is built now
            assert not held
            held = RESIDENT[State.POLICY]
        assert held == RESIDENT[after]


@given(way=legal_ways())
def test_no_way_generates_from_weights_that_were_dropped(way: list[State]) -> None:
    """A publish is what happens in SYNC; READ is legal only where the weights are whole."""
    whole = True
    for before, after in pairwise(way):
        for action in COLOCATED[before, after]:
            if isinstance(action, Sleep):
                assert whole or action.level == 2, "level 1 would keep a mixture"
                whole = whole and action.level == 1
        whole = whole or after is State.SYNC
        if after in (State.ROLLOUT, State.READ):
            assert whole


@pytest.mark.parametrize("transition", COLOCATED, ids=lambda x: f"{x[0].name}-{x[1].name}")
def test_everything_is_given_back_before_anything_is_taken(transition: Transition) -> None:
    actions = COLOCATED[transition]
    taken = [not isinstance(action, GIVES_BACK) for action in actions]
    assert taken == sorted(taken)
    before, after = (RESIDENT[state] for state in transition)
    held = before
    for action in actions:
        held = resident_after(held, action)
        assert held <= before or held <= after, "more than the larger of the two states"


def test_every_state_can_be_reached_and_left_again() -> None:
    for state in set(State) - {State.START}:
        assert any(b is state for _, b in COLOCATED)
        assert any(a is state for a, _ in COLOCATED)
    assert not any(b is State.START for _, b in COLOCATED)


def recorded(mode: Mode, *states: State) -> tuple[Placement, list[Action]]:
    calls: list[Action] = []
    placement = Placement(mode, calls.append)
    for state in states:
        placement.enter(state)
    return placement, calls


def test_a_step_by_its_calls() -> None:
    placement, calls = recorded(
        "colocated",
        *(State.POLICY, State.SYNC, State.ROLLOUT, State.ROLLOUT, State.POLICY, State.SYNC),
    )
    assert calls == [
        Sleep(2),
        Offload(("gradients", "optimizer")),
        Wake(("weights",)),
        Offload(("parameters",)),
        Wake(("kv_cache",)),
        Sleep(2),
        Load(("parameters", "gradients", "optimizer")),
        Offload(("gradients", "optimizer")),
        Wake(("weights",)),
    ]
    assert placement.state is State.SYNC


def test_disaggregated_moves_nothing_in_any_order() -> None:
    others = [state for state in State if state is not State.START]
    for way in product(others, repeat=3):
        placement, calls = recorded("disaggregated", *way)
        assert calls == [] and placement.state is way[-1]
        assert not placement.must_publish


def test_what_is_not_in_the_table_is_illegal() -> None:
    placement, calls = recorded("colocated", State.POLICY)
    del calls[:]
    message = "placement colocated: no transition from POLICY to ROLLOUT; from POLICY to SYNC"
    with pytest.raises(ValueError, match=message):
        placement.enter(State.ROLLOUT)
    assert placement.state is State.POLICY and calls == []
    everything = {(a, b) for a, b in product(State, State) if a is not b}
    for before, after in everything - COLOCATED.keys():
        with pytest.raises(ValueError, match=f"from {before.name} to {after.name}"):
            actions_between("colocated", before, after)


def test_a_publish_is_due_once_the_engines_have_dropped_their_weights() -> None:
    placement, _ = recorded("colocated")
    due = []
    for state in (State.POLICY, State.SYNC, State.ROLLOUT, State.READ, State.ROLLOUT):
        placement.enter(state)
        due.append(placement.must_publish)
    assert due == [True, False, False, False, False]
