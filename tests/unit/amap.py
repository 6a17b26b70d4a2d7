"""The loss of AMAP-ML's trainer, from its description and without the product's code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer with its advantage, alpha not in it."""

    n_prompt: int
    """Tokens."""
    logprobs: tuple[float, ...]
    """Of the response."""
    advantage: float
    live: bool
    """Its group has a gradient."""


def amap_loss(groups: Sequence[Sequence[Answer]], *, n_ranks: int, room: int) -> float:
    """The mean over micro-batches of alpha * (token mean), alpha being that of the micro-step.

    In a micro-step each rank takes one micro-batch, of at most about room tokens. Micro-batches
    without a response token do not count, nor do those of a micro-step without a live group,
    which would be drawn again.
    """
    losses = []
    for step in _micro_steps(groups, n_ranks * room):
        n_live = sum(answer.live for answer in step)
        if not n_live:
            continue
        alpha = len(step) / n_live
        rest = step
        for n_left in range(n_ranks, 0, -1):
            # The last ranks have one answer less where the number does not divide.
            size = -(-len(rest) // n_left)
            part, rest = rest[:size], rest[size:]
            n_tokens = sum(len(answer.logprobs) for answer in part)
            if n_tokens:
                total = sum(answer.advantage * sum(answer.logprobs) for answer in part)
                losses.append(-alpha * total / n_tokens)
    return sum(losses) / len(losses) if losses else 0.0


def _micro_steps(groups: Sequence[Sequence[Answer]], room: int) -> Iterator[list[Answer]]:
    """The answers of as many whole groups as fit, at least one."""
    step: list[Answer] = []
    for group in groups:
        both = [*step, *group]
        if step and sum(answer.n_prompt + len(answer.logprobs) for answer in both) > room:
            yield step
            both = list(group)
        step = both
    if step:
        yield step


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A group as far as the size of its gradient goes, when all of its tokens agree."""

    live: bool
    n_tokens: int


def amap_size(draw: Callable[[], Drawn], *, per_step: int, n_steps: int) -> float:
    """The size of the gradient of n_steps micro-steps of per_step groups each, by its own rule:
    draw per_step groups again and again until half of a micro-step is live, keep the live ones and
    fill up with dead ones; alpha is groups over live groups. A live token has the size 1."""
    sizes = []
    for _ in range(n_steps):
        drawn = [draw() for _ in range(per_step)]
        while sum(group.live for group in drawn) < per_step / 2:
            drawn += [draw() for _ in range(per_step)]
        kept = sorted(drawn, key=lambda group: not group.live)[:per_step]
        alpha = len(kept) / sum(group.live for group in kept)
        tokens = sum(group.n_tokens for group in kept)
        sizes.append(alpha * sum(group.n_tokens for group in kept if group.live) / tokens)
    return sum(sizes) / n_steps
