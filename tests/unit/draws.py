"""Batches as the state machine of the rollouts draws them in turn, of groups that a test makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from gpg_megatron.algorithm.advantages import is_live
from gpg_megatron.algorithm.redraw import Selection, select
from gpg_megatron.config.algorithm import AlgorithmConfig
from gpg_megatron.loop.stream import (
    Action,
    Asked,
    Event,
    Finished,
    PublishBegan,
    Published,
    Rules,
    State,
    Taken,
    advance,
    next_batch,
)
from gpg_megatron.types import ScoredGroup


def batches(
    config: AlgorithmConfig, *, size: int, n: int, new: Callable[[], ScoredGroup]
) -> Iterator[tuple[Selection, Sequence[int]]]:
    """What is trained on, and how many groups each draw had, for n batches."""
    rules = Rules(
        size=size,
        staleness=0,
        last=n,
        wanted=config.wanted_fraction,
        max_redraws=config.max_redraws,
    )
    state, groups = State(), dict[int, ScoredGroup]()
    actions: list[Action] = []

    def happens(event: Event) -> None:
        nonlocal state
        state, more = advance(rules, state, event)
        actions.extend(more)

    for _ in range(n):
        happens(Asked())
        draws = []
        while (batch := next_batch(rules, state)) is None:
            started = actions.pop().tickets
            assert not actions
            draws.append(len(started))
            for ticket in started:
                groups[ticket] = new()
                happens(Finished(ticket, is_live(groups[ticket], config.dead_by)))
        tickets = {id(groups[group.ticket]): group.ticket for group in batch}
        selection = select([groups[g.ticket] for g in batch], config, batch_size=size)
        yield selection, draws
        carried = frozenset(tickets[id(group)] for group in selection.carried)
        for event in (Taken(carried, selection.skipped), PublishBegan(), Published()):
            happens(event)
