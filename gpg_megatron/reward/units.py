"""What stands behind a number: a unit, a percent sign, a word for a power of ten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gpg_megatron.reward import vocabulary as v
from gpg_megatron.reward.form import Item, Node, spell

Unit = tuple[tuple[str, str], ...]
"""Sorted pairs of a sign and its exponent, as text."""
_ENDS_NO_UNIT = frozenset("0123456789)]xyz")
_KNOWN = frozenset(v.UNITS.values()) | {"am", "pm"}
_SPEEDS = {"mph": ("mi", "h"), "kph": ("km", "h"), "kmh": ("km", "h")}
_QUALIFYING = v.QUALIFIERS | v.CONNECTIVES | set(v.NUMBER_WORDS) | {"half", "to"}
_SQUARE = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cu": "3", "cubed": "3"}


class Measured(NamedTuple):
    """An answer taken apart."""

    items: tuple[Item, ...]
    """What is measured."""
    unit: Unit
    """Empty where there is none."""
    percent: bool
    scale: int
    """1,000,000 for a million."""


def measured(items: Sequence[Item]) -> Measured:
    """Take the unit off the end, or a currency sign off the front."""
    last = items[-1] if items else ""
    if isinstance(last, str) and last[-1] in _ENDS_NO_UNIT and "\\dollar" not in items:
        return Measured(tuple(items), (), False, 1)
    items = _fraction_of_words(items)
    end = len(items)
    while end and _belongs(items, end - 1):
        end -= 1
    tail = list(items[end:])
    while tail and tail[0] in ("*", "/", ".", "-"):
        tail, end = tail[1:], end + 1
    start, currency = 0, False
    while start < end and items[start] in ("\\dollar", "-", "+"):
        currency |= items[start] == "\\dollar"
        start += 1
    head: list[Item] = [item for item in items[:start] if item != "\\dollar"]
    rest = (*head, *items[start:end])
    if not rest or any(map(is_word, rest)) or _qualified(tail):
        return Measured(tuple(items), (), False, 1)
    scale = 1
    words = []
    for item in tail:
        name = item[1:] if isinstance(item, str) else ""
        singular = name.removesuffix("s")
        if singular in v.SCALES and is_word(item):
            scale *= v.SCALES[singular]
        else:
            words.append(item)
    percent = any(item in ("%", '"percent') for item in words) or _per_cent(words)
    unit = () if percent else _unit(words)
    return Measured(rest, unit or ((("\\dollar", "1"),) if currency else ()), percent, scale)


def comparable(unit: Unit) -> bool:
    """Whether it is made of units that measure; "boxes" only says what was counted."""
    return all(sign in _KNOWN for sign, _ in unit)


def is_word(item: Item) -> bool:
    """Whether an item is a word of several letters."""
    return isinstance(item, str) and item.startswith('"')


def _belongs(items: Sequence[Item], at: int) -> bool:
    """Whether an item at the end may be a part of the unit."""
    item = items[at]
    if isinstance(item, Node):
        if item.command != "^" or not at:
            return False
        return is_word(items[at - 1]) or items[at - 1] in ("\\deg", "\\dollar")
    if item in ("%", "\\deg", "\\dollar", "\\Omega", "\\AA", ".") or is_word(item):
        return True
    before, after = items[at - 1] if at else "", items[at + 1] if at + 1 < len(items) else ""
    if item in ("/", "*", "-"):
        return is_word(after) and (bool(at) and (is_word(before) or isinstance(before, Node)))
    # 20 degrees C; a letter between words
    return item in ("C", "F", "a", "x") and bool(at) and before == "\\deg"


def _fraction_of_words(items: Sequence[Item]) -> Sequence[Item]:
    """km/h in place of a fraction of words at the end."""
    last = items[-1] if items else ""
    if not isinstance(last, Node) or last.command != "\\frac" or len(items) < 2:
        return items
    above, below = last.arguments
    words = above and below and all(map(_is_unit, (*above, *below)))
    return (*items[:-1], *above, "/", *below) if words else items


def _is_unit(item: Item) -> bool:
    return is_word(item) or (isinstance(item, Node) and item.command == "^")


def _qualified(tail: Sequence[Item]) -> bool:
    return any(item[1:] in _QUALIFYING for item in tail if isinstance(item, str) and is_word(item))


def _per_cent(words: Sequence[Item]) -> bool:
    return [w for w in words if w != "."] == ['"per', '"cent']


def _unit(words: Sequence[Item]) -> Unit:
    exponents: dict[str, int | str] = {}
    sign, power, last = 1, "", ""
    for item in words:
        if isinstance(item, Node):
            exponent = spell(item.arguments[0]).replace(" ", "")
            exponents[last] = _times(sign, exponent)
            continue
        name = item.removeprefix('"')
        if name in ("/", "per"):
            sign = -1
        elif name in _SQUARE:
            power = _SQUARE[name]
            if last and name.endswith("ed"):
                exponents[last], power = _times(sign, power), ""
        elif name in _SPEEDS:
            above, last = _SPEEDS[name]
            exponents |= {above: sign, last: -sign}
        elif name not in ("*", ".", "-", "of", "the", "in", "a") or (
            name == "in" and not exponents
        ):
            last = unit_name(name)
            exponents[last], power = _times(sign, power or "1"), ""
    if power and not exponents:
        exponents["unit"] = power
    exponents.pop("unit", None) if exponents.get("unit") == 1 else None
    return tuple(sorted((name, str(exponent)) for name, exponent in exponents.items() if name))


def _times(sign: int, exponent: str) -> int | str:
    return sign * int(exponent) if exponent.lstrip("-").isdecimal() else exponent


def unit_name(word: str) -> str:
    """The sign of a unit, or the word in the singular."""
    if word in v.UNITS:
        return v.UNITS[word]
    singular = word[:-1] if word.endswith("s") and not word.endswith("ss") else word
    if singular in v.UNITS and len(singular) > 1:
        return v.UNITS[singular]
    return singular if len(singular) > 2 else word
