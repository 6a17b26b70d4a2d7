"""What a number of the configuration may be: said on its field, and nowhere else.

    lr: float = ranged(1e-6, above=0)

rules.py refuses what is outside, and a test compares docs/configuration.md with the fields.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

_T = TypeVar("_T")
_METADATA = "range"
_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "above": ("greater than", operator.gt),
    "at_least": ("at least", operator.ge),
    "below": ("less than", operator.lt),
    "at_most": ("at most", operator.le),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The finite numbers within all bounds that are given."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    or_value: float | None = None
    """One more number that is legal."""

    def __contains__(self, number: float) -> bool:
        if number == self.or_value:
            return True
        bounds = ((getattr(self, name), holds) for name, (_, holds) in _BOUNDS.items())
        finite = isinstance(number, int) or math.isfinite(number)  # the latter cannot be long
        return finite and all(b is None or holds(number, b) for b, holds in bounds)

    def __str__(self) -> str:
        """As messages and docs/configuration.md say it."""
        bounds = ((words, getattr(self, name)) for name, (words, _) in _BOUNDS.items())
        given = [f"{words} {bound}" for words, bound in bounds if bound is not None]
        beside = "" if self.or_value is None else f", or {self.or_value}"
        return (" and ".join(given) or "a finite number") + beside


def ranged(default: _T, **bounds: float) -> _T:
    """A dataclass field with the Range of these bounds. None is legal where the type says so."""
    return field(default=default, metadata={_METADATA: Range(**bounds)})


def ranges(config: Any) -> Iterator[tuple[str, Range, Any]]:
    """Of all sections of a Config: section.key, its range, its value."""
    for section in fields(config):
        values = getattr(config, section.name)
        for key in fields(values):
            if _METADATA in key.metadata:
                name = f"{section.name}.{key.name}"
                yield name, key.metadata[_METADATA], getattr(values, key.name)
