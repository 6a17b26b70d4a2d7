"""Which families make which kind of answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmarks.spelling import groups, gsm8k, numbers, symbols
from benchmarks.spelling.ways import Family, Pair, pairs

KINDS: Mapping[str, tuple[Family, ...]] = {
    "whole": (numbers.WHOLE,),
    "fraction": (numbers.FRACTION,),
    "mixed": (numbers.MIXED,),
    "decimal": (numbers.PERCENT, numbers.MONEY),
    "scientific": (numbers.SCIENTIFIC,),
    "quantity": (numbers.QUANTITY,),
    "radical": (symbols.RADICAL, symbols.PI),
    "polynomial": (symbols.POLYNOMIAL,),
    "vector": (symbols.POINT, symbols.MATRIX),
    "collection": (groups.SET, groups.LIST),
    "interval": (groups.INTERVAL, groups.UNION),
    "word": (groups.CHOICE, groups.NAME),
}
"""Kinds of mathematical answers; `math` and `math_verify` judge them."""

GSM8K: tuple[Family, ...] = (gsm8k.NUMBER,)


def mathematical(per_way: int, seed: int) -> Iterator[Pair]:
    """per_way pairs for each way of spelling of each of KINDS."""
    for kind, families in KINDS.items():
        yield from pairs(kind, families, per_way, seed)


def grade_school(per_way: int, seed: int) -> Iterator[Pair]:
    """The same for GSM8K."""
    return pairs("gsm8k", GSM8K, per_way, seed)
