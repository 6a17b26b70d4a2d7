"""Pairs of an answer and a truth whose label is known because of how they were made.

    Family -- sample(rng) --> values -- templates --> Pair(response, truth, right)

A template is one line of text in which <name> stands for a value of the sample. A line in `same`
spells the value that the truths spell, a line in `near` spells another one. Nothing here knows
the scorers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Values = dict[str, str]

_PLACE = re.compile(r"<([a-z][a-z0-9]*)>")
_WHOLE = ("\\boxed", "\\fbox", "####")
"""A line with one of these is the whole response; any other is put into a box."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One way of drawing values, and the lines that spell them."""

    sample: Callable[[random.Random], Values]
    truths: tuple[str, ...]
    same: tuple[str, ...]
    near: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One answer with its label."""

    kind: str
    way: str
    """The template."""
    response: str
    truth: str
    right: bool
    laid_aside: bool
    """Of the third of the ways that nobody looks at before the end."""


def lines(text: str) -> tuple[str, ...]:
    """The lines of a text that are not empty, in order, without the spaces around them."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def pairs(kind: str, families: Sequence[Family], per_way: int, seed: int) -> Iterator[Pair]:
    """per_way pairs for each line of each family of a kind."""
    for number, family in enumerate(families):
        for right, ways in ((True, family.same), (False, family.near)):
            aside = _aside(ways, f"{seed}/{kind}/{number}/{right}")
            for way in ways:
                rng = random.Random(f"{seed}/{kind}/{number}/{way}")
                for _ in range(per_way):
                    values = family.sample(rng)
                    yield Pair(
                        kind=kind,
                        way=way,
                        response=response(fill(way, values)),
                        truth=fill(rng.choice(family.truths), values),
                        right=right,
                        laid_aside=way in aside,
                    )


def fill(way: str, values: Values) -> str:
    """The template with its values; an unknown name is a KeyError."""
    return _PLACE.sub(lambda place: values[place[1]], way)


def response(spelled: str) -> str:
    """The text that a model writes around an answer."""
    if any(mark in spelled for mark in _WHOLE):
        return f"Let us see. {spelled}"
    return f"Let us see. The answer is $\\boxed{{{spelled}}}$."


def _aside(ways: Sequence[str], seed: str) -> frozenset[str]:
    assert len(set(ways)) == len(ways), f"a way stands twice: {sorted(ways)}"
    return frozenset(random.Random(seed).sample(list(ways), len(ways) // 3))
