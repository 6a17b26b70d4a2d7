"""Where policy and engines keep their memory: a state machine that decides, and moves nothing.

disaggregated   ranks and engines have GPUs of their own and keep everything: no actions
colocated       they share the GPUs, and hand the memory to each other:

    START --> POLICY --> SYNC --> ROLLOUT --> POLICY        one round for each step
                          |         | ^
                          '-> READ <' |                     to save, or to compare log-probs
                               '------'

Within a transition everything is given back before anything is taken, so that no GPU ever holds
more than the larger of the two states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from gpg_megatron.types import EnginePart, PolicyPart

Mode = Literal["colocated", "disaggregated"]
Part = PolicyPart | EnginePart


class State(Enum):
    """What the GPUs are for."""

    START = "start"
    """The engines have started; there is no policy yet."""
    ROLLOUT = "rollout"
    """The engines generate."""
    POLICY = "policy"
    """The policy is built, loaded or trained."""
    SYNC = "sync"
    """The parameters are sent into the engines."""
    READ = "read"
    """The policy is saved or compared and stays as it is; so do the engines' weights."""


@dataclass(frozen=True, slots=True)
class Sleep:
    """Engines: give everything back. Level 1 keeps the weights in host memory, level 2 drops
    them."""

    level: Literal[1, 2]


@dataclass(frozen=True, slots=True)
class Wake:
    """Engines: take these parts again."""

    parts: tuple[EnginePart, ...]


@dataclass(frozen=True, slots=True)
class Offload:
    """Policy ranks: move these parts to host memory and free them on the device."""

    parts: tuple[PolicyPart, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """Policy ranks: bring these parts back."""

    parts: tuple[PolicyPart, ...]


Action = Sleep | Wake | Offload | Load
Transition = tuple[State, State]

RESIDENT: Mapping[State, frozenset[Part]] = {
    State.START: frozenset({"weights", "kv_cache"}),
    State.ROLLOUT: frozenset({"weights", "kv_cache"}),
    State.POLICY: frozenset({"parameters", "gradients", "optimizer"}),
    State.SYNC: frozenset({"parameters", "weights"}),
    State.READ: frozenset({"parameters", "optimizer"}),
}
"""Colocated: what is on the GPUs in each state."""

# The only way from a sleep of level 2 to ROLLOUT leads through SYNC, where a publish brings all
# weights; that is why a step whose updates were all skipped publishes too. Into READ the engines
# go with weights that are still right: level 1.
_COLOCATED: Mapping[Transition, tuple[Action, ...]] = {
    # The policy is built when the engines have gone: what it takes is not loaded here.
    (State.START, State.POLICY): (Sleep(2),),
    (State.ROLLOUT, State.POLICY): (Sleep(2), Load(("parameters", "gradients", "optimizer"))),
    (State.POLICY, State.SYNC): (Offload(("gradients", "optimizer")), Wake(("weights",))),
    (State.SYNC, State.ROLLOUT): (Offload(("parameters",)), Wake(("kv_cache",))),
    (State.ROLLOUT, State.READ): (Sleep(1), Load(("parameters", "optimizer"))),
    (State.SYNC, State.READ): (Sleep(1), Load(("optimizer",))),
    (State.READ, State.ROLLOUT): (
        Offload(("parameters", "optimizer")),
        Wake(("weights", "kv_cache")),
    ),
}

TRANSITIONS: Mapping[Mode, Mapping[Transition, tuple[Action, ...]]] = {
    "colocated": _COLOCATED,
    "disaggregated": {(a, b): () for a in State for b in State if b is not State.START},
}
"""What is done between two states, in this order; what is not named is illegal."""


def actions_between(mode: Mode, before: State, after: State) -> tuple[Action, ...]:
    """What leads from one state to another; nothing for a state that is entered twice.

    Raises:
        ValueError: no row of the table does.
    """
    if before is after:
        return ()
    try:
        return TRANSITIONS[mode][before, after]
    except KeyError:
        legal = sorted(b.name for a, b in TRANSITIONS[mode] if a is before)
        raise ValueError(
            f"placement {mode}: no transition from {before.name} to {after.name}; "
            f"from {before.name} to {' or '.join(legal)}"
        ) from None


class Placement:
    """The machine. Every policy rank holds one, and enters the same states in the same order."""

    def __init__(self, mode: Mode, perform: Callable[[Action], None]) -> None:
        """perform: does an action, and returns when its memory is free or there."""
        self._mode = mode
        self._perform = perform
        self._state = State.START

    @property
    def state(self) -> State:
        """Where the machine is."""
        return self._state

    @property
    def must_publish(self) -> bool:
        """Whether the engines have lost their weights, so that new ones have to come even if
        nothing was learned."""
        return self._mode == "colocated" and self._state is State.POLICY

    def enter(self, state: State) -> None:
        """Go there, by all actions of the transition.

        Raises:
            ValueError: there is no such transition.
        """
        for action in actions_between(self._mode, self._state, state):
            self._perform(action)
        self._state = state
