"""Which prompts are started when, and of which groups a batch is made: a state machine that
decides, and starts nothing. docs/rollouts.md has it as a picture.

    (new) --Start--> in flight --Finished--> ready --Taken--> trained on
                      ^  |                   |  ^
              waiting <--' Lost, Stop        '--' carried: live, and the batch was full

A prompt has a ticket: its place in the order of prompts, for good. Ages and bounds are counted in
rollout batches: weights w are those after w batches were learned from.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What does not change during a run."""

    size: int
    """Groups of a batch, at least 1."""
    staleness: int
    """K: a batch is learned from by weights at most so many batches younger than its own."""
    last: int
    """Batches of the run."""
    in_flight: bool = False
    """Weights change under running requests; False: those end first."""
    room: int | None = None
    """Groups that may be in flight; None: any number."""
    wanted: float = 0.0
    """Share of a batch that has to be live."""
    max_redraws: int = 0
    extra: int = 0
    """A batch closes when all but so many of the groups that it may be made of have finished."""
    unfinished: Literal["carry", "abort", "cut"] = "carry"
    """What becomes of those: they go on and come into a later batch; they are drawn again; they
    end where they are, and belong to the batch."""

    @property
    def chooses(self) -> bool:
        """Whether a batch is made of those that finish first."""
        return self.extra > 0 and self.unfinished != "cut"


def room_for(samples: int, n: int) -> int:
    """Groups of n that may be in flight where engines decode so many samples at once. Half as many
    again wait in their queues: the samples of a group do not end together."""
    return max(1, 3 * samples // (2 * n))


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Group:
    """One that is ready."""

    ticket: int
    weights: int
    """That sampled its oldest token."""
    live: bool = True
    carried: bool = False
    """An earlier batch had no room for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Everything that is known between two events; the same events lead to the same state."""

    next_ticket: int = 0
    waiting: tuple[int, ...] = ()
    """Tickets whose prompts have to be started again, in order."""
    flying: Mapping[int, int] = field(default_factory=dict)
    """Ticket -> the weights that the engines had when it was started."""
    ready: tuple[Group, ...] = ()
    """By ticket."""
    closed: int = 0
    """Batches that were taken."""
    learned: int = 0
    """Those of them that were learned from: not those that algorithm.on_exhausted=skip skipped."""
    published: int = 0
    """Batches that were taken before the last publish."""
    weights: int = 0
    """Those that the engines have."""
    redraws: int = 0
    """Draws of the next batch, after its first."""
    places: int = 0
    """Prompts that were started since the last batch or redraw; seeds are made of it."""
    running: bool = False
    """The engines may work: the trainer asked for a batch. With K = 0 they may only while it
    waits, since they may have to sleep while it does not."""
    publishing: bool = False

    @property
    def pool(self) -> list[int]:
        """All tickets that are not yet in a batch, in order."""
        return sorted((*self.waiting, *self.flying, *(group.ticket for group in self.ready)))


# ---- events ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """The trainer waits for the next batch."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A group has its answers and their rewards."""

    ticket: int
    live: bool


@dataclass(frozen=True, slots=True)
class Lost:
    """Engines ended, and with them what was in flight there."""

    tickets: frozenset[int]


@dataclass(frozen=True, slots=True)
class Taken:
    """The trainer has the batch that next_batch showed."""

    carried: frozenset[int] = frozenset()
    """Tickets of those groups in it that the next batch begins with."""
    skipped: bool = False
    """No update is made with it."""


@dataclass(frozen=True, slots=True)
class PublishBegan:
    """New weights are about to be sent; may_publish says when they may be."""


@dataclass(frozen=True, slots=True)
class Published:
    """The engines have the weights of all batches so far."""


Event: TypeAlias = Asked | Finished | Lost | Taken | PublishBegan | Published


# ---- actions --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """Give these prompts to engines. No two of a run have the same (batch, redraw, place)."""

    tickets: tuple[int, ...]
    batch: int
    redraw: int
    place: int
    """Of the first ticket; the others follow."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End these requests, if they still run; what they have is kept and finishes, or it is not."""

    tickets: tuple[int, ...]
    keep: bool


Action: TypeAlias = Start | Stop


# ---- the machine ----------------------------------------------------------------------------


def advance(rules: Rules, state: State, event: Event) -> tuple[State, tuple[Action, ...]]:
    """The state after an event, and what is to be done now."""
    state, stops = _after(rules, state, event)
    while _needs_redraw(rules, state):
        state = replace(state, redraws=state.redraws + 1, places=0)
    if rules.extra and rules.unfinished == "cut":
        stops = _cut(rules, state)
    tickets = _startable(rules, state)
    if not tickets:
        return state, stops
    start = Start(tickets, state.closed + 1, state.redraws, state.places)
    state = replace(
        state,
        next_ticket=max(state.next_ticket, tickets[-1] + 1),
        waiting=tuple(t for t in state.waiting if t not in tickets),
        flying={**state.flying, **dict.fromkeys(tickets, state.weights)},
        places=state.places + len(tickets),
    )
    return state, (*stops, start)


def next_batch(rules: Rules, state: State) -> tuple[Group, ...] | None:
    """The groups that the next batch is chosen from, by algorithm.redraw.select; None: some of
    them have yet to finish.

    They are the first of the pool, as many as one draw and the redraws have. Where the batch
    chooses they are those among `extra` more that finished, as few as have enough live ones; those
    that would be too old for the batch after come first, and are waited for.
    """
    if len(state.ready) < rules.size:
        return None
    finished = _finished(rules, state)
    n = rules.size * (1 + state.redraws)
    if not rules.chooses:
        return finished if len(finished) == n else None
    if any(_is_due(rules, state, weights) for weights in state.flying.values()):
        return None
    n_live = 0
    for count, group in enumerate(finished, start=1):
        n_live += group.live
        enough = n_live >= rules.wanted * rules.size
        is_last = count == n and state.redraws == rules.max_redraws
        if count >= rules.size and (enough or is_last):
            return finished[:count]
    return None


def may_publish(rules: Rules, state: State, *, quiet: bool = False) -> bool:
    """Whether weights may change now. Where nothing may be in flight meanwhile (always if quiet),
    drain completes the batch that comes next first; nothing else is started."""
    return (rules.in_flight and not quiet) or not (state.flying or _startable(rules, state))


def resumed(state: State) -> State:
    """What a run goes on from that was ended in this state: what was in flight is started again."""
    waiting = tuple(sorted((*state.waiting, *state.flying)))
    return replace(state, waiting=waiting, flying={}, running=False, publishing=False)


def age(state: State, weights: int) -> int:
    """In batches, of a group that is trained on next."""
    return state.learned - weights


def _after(rules: Rules, state: State, event: Event) -> tuple[State, tuple[Action, ...]]:
    match event:
        case Asked():
            return replace(state, running=True), ()
        case Finished(ticket, live):
            flying = dict(state.flying)
            ready = list(state.ready)
            insort(ready, Group(ticket=ticket, weights=flying.pop(ticket), live=live))
            return replace(state, flying=flying, ready=tuple(ready)), ()
        case Lost(tickets):
            return _back(state, tickets), ()
        case Taken():
            return _taken(rules, state, event)
        case PublishBegan():
            return replace(state, publishing=True), ()
        case Published():
            published, weights = state.closed, state.learned
            return replace(state, publishing=False, published=published, weights=weights), ()


def _taken(rules: Rules, state: State, event: Taken) -> tuple[State, tuple[Action, ...]]:
    batch = next_batch(rules, state)
    assert batch is not None, "it has to be there"
    window = state.pool[: _window(rules, state)]
    gone = {group.ticket for group in batch} - event.carried
    state = replace(
        state,
        ready=tuple(
            replace(group, carried=group.carried or group.ticket in event.carried)
            for group in state.ready
            if group.ticket not in gone
        ),
        closed=state.closed + 1,
        learned=state.learned + (not event.skipped),
        redraws=0,
        places=0,
        running=rules.staleness > 0,
    )
    aborts = rules.extra > 0 and rules.unfinished == "abort"
    late = tuple(t for t in window if aborts and t in state.flying)
    # A surplus of redraws is as old as the batch that it comes from, and one more.
    old = (g.ticket for g in state.ready if age(state, g.weights) > rules.staleness + g.carried)
    return _back(state, frozenset((*late, *old))), (Stop(late, keep=False),) if late else ()


def _cut(rules: Rules, state: State) -> tuple[Stop, ...]:
    """All but `extra` of the next batch have finished."""
    window = state.pool[: _window(rules, state)]
    late = tuple(t for t in window if t in state.flying)
    n_there = len(_finished(rules, state)) + len(late)
    is_time = 0 < len(late) <= rules.extra and n_there == len(window)
    return (Stop(late, keep=True),) if is_time else ()


def _back(state: State, tickets: frozenset[int]) -> State:
    """These are to be started again; what they have is not used."""
    return replace(
        state,
        waiting=tuple(sorted({*state.waiting, *tickets})),
        flying={t: w for t, w in state.flying.items() if t not in tickets},
        ready=tuple(group for group in state.ready if group.ticket not in tickets),
    )


def _window(rules: Rules, state: State) -> int:
    """From how many tickets, in order, the next batch is made."""
    return rules.size * (1 + state.redraws) + (rules.extra if rules.chooses else 0)


def _finished(rules: Rules, state: State) -> tuple[Group, ...]:
    window = set(state.pool[: _window(rules, state)])
    found = [group for group in state.ready if group.ticket in window]
    if rules.chooses:
        found.sort(key=lambda group: (not _is_due(rules, state, group.weights), group.ticket))
    return tuple(found)


def _is_due(rules: Rules, state: State, weights: int) -> bool:
    """Whether the batch after the next one would be too late."""
    return rules.unfinished == "carry" and age(state, weights) >= rules.staleness


def _needs_redraw(rules: Rules, state: State) -> bool:
    """The paper's beta_th: a whole draw has finished, and too few groups are live."""
    n = rules.size * (1 + state.redraws)
    if state.redraws >= rules.max_redraws or not state.running or len(state.ready) < n:
        return False
    finished = _finished(rules, state)
    n_live = sum(group.live for group in finished)
    return len(finished) >= n and n_live < rules.wanted * rules.size


def _startable(rules: Rules, state: State) -> tuple[int, ...]:
    """Tickets to start now: those that wait, then new ones, up to where the pool may reach."""
    if not state.running or (state.publishing and rules.in_flight):
        return ()
    n_open = state.published + 1 + rules.staleness - state.closed
    ahead = min(n_open if rules.in_flight else max(rules.staleness, 1), n_open)
    ahead = min(ahead, rules.last - state.closed)
    if ahead < 1:
        return ()
    # What is aborted never gets old; others must fit into the batches that they are in time for.
    reach = ahead * rules.size + (rules.extra if rules.unfinished == "abort" else 0)
    reach = max(reach, rules.size * (1 + state.redraws))
    if state.publishing:
        reach = min(reach, _window(rules, state))
    n_pool = len(state.waiting) + len(state.flying) + len(state.ready)
    n_new = max(0, reach - n_pool)
    wanted = [t for t in state.pool[:reach] if t in state.waiting] if state.waiting else []
    wanted += range(state.next_ticket, state.next_ticket + n_new)
    room = len(wanted) if rules.room is None else max(0, rules.room - len(state.flying))
    return tuple(wanted[:room])
