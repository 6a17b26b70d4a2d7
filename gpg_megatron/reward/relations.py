"""Taking the items of an answer apart at signs: lists, names, equations, bounds, brackets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from gpg_megatron.reward import algebra
from gpg_megatron.reward.algebra import UnreadableError
from gpg_megatron.reward.expression import read_expression
from gpg_megatron.reward.form import Item, Node, spell
from gpg_megatron.reward.units import is_word

Items = tuple[Item, ...]

_OPENING = {"(": 1, "[": 1, "\\{": 1, "\\langle": 1, "\\lfloor": 1, "\\lceil": 1}
_CLOSING = {")": 1, "]": 1, "\\}": 1, "\\rangle": 1, "\\rfloor": 1, "\\rceil": 1}
_LESS, _GREATER = ("<", "\\le"), (">", "\\ge")
_RELATIONS = ("=", "\\ne", "\\approx", "\\equiv", *_LESS, *_GREATER)
_SEPARATORS = {
    **dict.fromkeys((",", ";", "\\\\"), ","),
    **dict.fromkeys(('"and', "\\and"), "and"),
    **dict.fromkeys(('"or', "\\or"), "or"),
}
RELATED = frozenset((*_RELATIONS, "\\in", ":"))
"""Signs without which there is neither a name nor a relation."""
_MAX_SIGNS = 3


class Part(NamedTuple):
    """A part of a list."""

    before: str
    """The separator in front of it: ",", "and", "or"; "" for the first."""
    items: Items


class Bounds(NamedTuple):
    """An inequality for one name."""

    name: str
    brackets: str
    low: Items
    high: Items


def split(items: Sequence[Item], signs: Sequence[str]) -> list[Items]:
    """The parts between these signs outside of brackets and environments."""
    for sign in signs:
        if sign in items:
            return [part.items for part in _split(items, dict.fromkeys(signs, ""))]
    return [tuple(items)]


def split_list(items: Sequence[Item]) -> list[Part]:
    """The parts of a list without brackets; one for what is no list."""
    parts = [part for part in _split(items, _SEPARATORS) if part.items]
    return parts or [Part("", tuple(items))]


def _split(items: Sequence[Item], separators: dict[str, str]) -> list[Part]:
    if separators.keys().isdisjoint(items):
        return [Part("", tuple(items))]
    parts: list[Part] = []
    current: list[Item] = []
    depth, before = 0, ""
    for item in items:
        if isinstance(item, str):
            if item in _OPENING or item.startswith("\\begin{"):
                depth += 1
            elif (item in _CLOSING or item.startswith("\\end{")) and depth:
                depth -= 1
            elif depth == 0 and item in separators:
                parts.append(Part(before, tuple(current)))
                # Of ", and" the word counts.
                before, current = separators[item], []
                continue
        current.append(item)
    return [*parts, Part(before, tuple(current))]


def joined(separators: Sequence[str]) -> str:
    """The one word that joins a list, or ""."""
    words = set(separators[1:]) - {","}
    return words.pop() if len(words) == 1 else ""


def both_signs(items: Items) -> list[Items] | None:
    """The values that plus-minus signs stand for; with a minus-plus sign they change together.

    None where there is no such sign, or too many.
    """
    found = _signs(items)
    if not 0 < len(found) <= _MAX_SIGNS:
        return None
    together = "\\mp" in found
    results = []
    for signs in product("+-", repeat=1 if together else len(found)):
        chosen = list(signs * len(found) if together else signs)
        results.append(_with_signs(items, chosen))
    return results


def _signs(items: Items) -> list[str]:
    found = []
    for item in items:
        if isinstance(item, Node):
            for argument in item.arguments:
                found += _signs(argument)
        elif item in ("\\pm", "\\mp"):
            found.append(item)
    return found


def _with_signs(items: Items, chosen: list[str]) -> Items:
    """The items with the next of the chosen signs in each place, which it takes off the list."""
    result: list[Item] = []
    for item in items:
        if isinstance(item, Node):
            arguments = tuple(_with_signs(argument, chosen) for argument in item.arguments)
            result.append(item._replace(arguments=arguments))
        elif item in ("\\pm", "\\mp"):
            sign = chosen.pop(0)
            flipped = {"+": "-", "-": "+"}[sign]
            result.append(flipped if item == "\\mp" else sign)
        else:
            result.append(item)
    return tuple(result)


def name(items: Items) -> tuple[str, Items]:
    """(what is equal to something, what it is equal to); ("", items) without a name."""
    for sign in ("\\in", "="):
        parts = split(items, (sign,))
        if len(parts) < 2 or not all(parts):
            continue
        if is_name(parts[0]):
            found, rest = _spelled(parts[0]), parts[1:]
        elif sign == "=" and len(parts) == 2 and is_name(parts[1]):
            found, rest = _spelled(parts[1]), parts[:1]
        else:
            continue
        return found, split(rest[-1], ("\\approx",))[0]
    words, colon, rest_items = _before(items, ":")
    if colon and words and all(map(is_word, words)):
        return _spelled(words), rest_items
    return "", items


def is_name(items: Items) -> bool:
    """x, x_1, f(x), f^{-1}(x), AB, slope, (x, y), angle ABC."""
    if not items or len(items) > 9:
        return False
    kept = [item for item in items if item not in (*"()[],'|", "\\angle", "\\triangle", "\\deg")]
    nodes = [item for item in kept if isinstance(item, Node)]
    if any(node.command not in ("^", "_", "\\overline", "\\tilde", "\\dot") for node in nodes):
        return False
    if any(n.command == "^" and spell(n.arguments[0]) not in ("- 1", "'", "*") for n in nodes):
        return False
    letters = [item for item in kept if isinstance(item, str)]
    if all(is_word(item) for item in letters) and letters:
        return True
    called = items[0] != "(" and "(" in items and items[-1] == ")"
    plain = all(item[-1].isalpha() or (item.isdecimal() and called) for item in letters)
    bracketed = items[0] == "(" and items[-1] == ")"
    return plain and bool(letters or nodes) and (len(letters) < 2 or bracketed or called)


def _spelled(items: Items) -> str:
    text = spell(items).replace("\\text", "")
    return text if len(items) == 1 else text.replace(" ", "")


def _before(items: Items, sign: str) -> tuple[Items, bool, Items]:
    if sign not in items:
        return items, False, ()
    at = items.index(sign)
    return items[:at], True, items[at + 1 :]


def bounds(items: Items) -> Bounds | None:
    """The interval that an inequality for a name describes."""
    signs = [item for item in items if item in (*_LESS, *_GREATER)]
    parts = split(items, (*_LESS, *_GREATER))
    if len(parts) != len(signs) + 1 or not all(parts) or len(signs) not in (1, 2):
        return None
    if len({sign in _LESS for sign in signs}) != 1:
        return None
    if signs[0] in _GREATER:
        parts, signs = parts[::-1], signs[::-1]
    strict = ["(" if sign in "<>" else "[" for sign in signs]
    if len(signs) == 2 and is_name(parts[1]):
        closing = ")" if strict[1] == "(" else "]"
        return Bounds(_spelled(parts[1]), strict[0] + closing, parts[0], parts[2])
    if len(signs) == 1 and is_name(parts[0]):
        closing = ")" if strict[0] == "(" else "]"
        return Bounds(_spelled(parts[0]), "(" + closing, ("-", "\\infty"), parts[1])
    if len(signs) == 1 and is_name(parts[1]):
        return Bounds(_spelled(parts[1]), strict[0] + ")", parts[0], ("\\infty",))
    return None


def equation(items: Items) -> str | None:
    """One text for all ways of writing an equation or inequality; None for anything else."""
    signs = [item for item in items if item in _RELATIONS]
    parts = split(items, _RELATIONS)
    if len(signs) != 1 or len(parts) != 2 or not all(parts):
        return None
    sign = str(signs[0])
    if sign in _GREATER:
        sign, parts = {">": "<", "\\ge": "\\le"}[sign], parts[::-1]
    try:
        left, right = (read_expression(part).value for part in parts)
        difference = algebra.add(left, algebra.scale(right, -1))
        if algebra.rational(difference) is not None:
            return None
        content, primitive = algebra.split(difference)
        if sign in _LESS and content < 0:
            return f"0 {sign} {algebra.key(primitive)}"
        return f"{algebra.key(primitive)} {sign} 0"
    except UnreadableError:
        return None


def enclosed(items: Items) -> tuple[str, str, Items] | None:
    """(opening bracket, closing bracket, what is inside), where they are one pair around all."""
    if len(items) < 2 or not isinstance(items[0], str) or items[0] not in _OPENING:
        return None
    last = items[-1]
    if not isinstance(last, str) or last not in _CLOSING:
        return None
    depth = 0
    for at, item in enumerate(items):
        if isinstance(item, str):
            depth += (item in _OPENING) - (item in _CLOSING)
        if depth == 0 and at < len(items) - 1:
            return None
    return items[0], last, items[1:-1]


def set_rule(inside: Items) -> Items | None:
    """The rule of {x : rule}."""
    for sign in (":", "|"):
        parts = split(inside, (sign,))
        if len(parts) == 2 and is_name(name(parts[0])[1] or parts[0]):
            return parts[1]
        if len(parts) == 2 and name(parts[0])[0]:
            return parts[1]
    return None
