"""What an answer consists of: a value, several values in brackets, an interval, words.

Answer -- name, label, unit --> body: Scalar | Group | Words
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from gpg_megatron.reward import algebra, relations
from gpg_megatron.reward import vocabulary as v
from gpg_megatron.reward.algebra import Rational, UnreadableError, Value
from gpg_megatron.reward.expression import read_expression
from gpg_megatron.reward.form import Item, Node, spell
from gpg_megatron.reward.functions import read_number
from gpg_megatron.reward.relations import Part
from gpg_megatron.reward.units import Unit, is_word, measured, unit_name

MAX_PARTS = 400
MAX_NESTED = 8
MAX_DIGITS = 100
"""Of a fraction that is read at once."""


_GOES_ON = frozenset((*"+-*/()!'", "\\pm", "\\cup", "\\cap", "\\to"))
"""What makes the letter in brackets a factor or a term, and no label."""


class Scalar(NamedTuple):
    """One value."""

    form: str
    """Its normal form."""
    value: Value | None
    """None: it cannot be read as an expression."""
    number: Rational | None
    """Where the value is one."""
    literal: bool
    """It is a number as numbers are written, with nothing left to work out."""
    percent: bool


class Group(NamedTuple):
    """Several values."""

    kind: str
    """"sequence" in brackets, "list" without, "set", "union", "matrix", "ratio" (a : b), "chain"
    (a = b)."""
    brackets: str
    """Of a sequence; of a matrix, its shape."""
    parts: tuple[Answer, ...]


class Words(NamedTuple):
    """A text, or what cannot be read as anything else."""

    text: str


class Answer(NamedTuple):
    """One answer."""

    name: str
    """What stands in front of "=" or "\\in", or ""."""
    label: str
    """The letter of a choice in front of its value, or ""."""
    unit: Unit
    body: Scalar | Group | Words


def read_answer(items: Sequence[Item], nested: int = 0) -> Answer:
    """What these items say. Total: what is nothing else is Words."""
    plain = _plain(items) if 0 < len(items) < 3 and nested <= MAX_NESTED else None
    if plain is not None:
        return plain
    items = trim(items)
    if nested > MAX_NESTED or len(items) > MAX_PARTS:
        return _words(items)
    several = _several(items, nested)
    if several is not None:
        return several
    label, items = _label(items)
    if relations.RELATED.isdisjoint(items):
        return _single(items, nested)._replace(label=label)
    return _related(items, nested)._replace(label=label)


def _plain(items: Sequence[Item]) -> Answer | None:
    """A whole number, a decimal or a fraction of whole numbers, with or without a minus: what
    most answers are, without the rest of the grammar."""
    last = items[-1]
    if len(items) == 2 and items[0] != "-":
        return None
    if isinstance(last, Node):
        if last.command != "\\frac":
            return None
        above, below = ("".join(map(str, side)) for side in last.arguments)
        if not (above.isdecimal() and below.isdecimal()) or max(map(len, last.arguments)) > 1:
            return None
        if len(above + below) > MAX_DIGITS or not int(below):
            return None
        size: Rational = Fraction(int(above), int(below))
        form = f"\\frac{{{above}}}{{{below}}}"
    elif last.isascii() and last.replace(".", "", 1).isdecimal():
        size, form = read_number(last), last
    else:
        return None
    if len(items) == 2:
        size, form = -size, f"- {form}"
    value = algebra.number(size)
    scalar = Scalar(form, value, algebra.rational(value), True, False)
    return Answer("", "", (), scalar)


def _related(items: tuple[Item, ...], nested: int) -> Answer:
    """With a name, an equation or an inequality."""
    name, rest = relations.name(items)
    sides = relations.split(rest, ("=",))
    if len(sides) > 1 and all(sides):
        chain = [read_answer(side, nested + 1) for side in sides]
        if all(isinstance(a.body, Scalar) and a.body.number is not None for a in chain):
            return Answer(name, "", (), Group("chain", "", tuple(chain)))
    rest = relations.split(rest, ("\\approx",))[0]
    bounded = relations.bounds(rest)
    if bounded is not None:
        return _interval(bounded, nested)
    equation = relations.equation(rest)
    if equation is not None:
        return Answer(name, "", (), Words(equation))
    answer = _single(trim(rest), nested)
    return answer._replace(name=name or answer.name)


def trim(items: Sequence[Item]) -> tuple[Item, ...]:
    """Without the words and signs at both ends that add nothing."""
    start, end = 0, len(items)
    while end > start and items[end - 1] in (".", ",", ";", ":", "\\\\"):
        end -= 1
    while start < end:
        item = items[start]
        filler = is_word(item) and str(item)[1:] in v.FILLERS and end - start > 1
        if not filler and item not in ("=", "\\approx", ":", ",", ";", ".", "\\Rightarrow", "\\to"):
            break
        start += 1
    return _without_aside(tuple(items[start:end]))


def _without_aside(items: tuple[Item, ...]) -> tuple[Item, ...]:
    """Without words in brackets at the end: 5 (five)."""
    if len(items) > 3 and items[-1] == ")" and "(" in items:
        at = len(items) - 1 - items[::-1].index("(")
        if at and at < len(items) - 2 and all(map(is_word, items[at + 1 : -1])):
            return items[:at]
    return items


def _several(items: tuple[Item, ...], nested: int) -> Answer | None:
    """A list without brackets, or with a sign that stands for two."""
    parts = relations.split_list(items)
    if len(parts) > 1:
        return _listed(parts, nested)
    both = relations.both_signs(items)
    return None if both is None else _listed([Part("", x) for x in both], nested)


def _listed(parts: Sequence[Part], nested: int) -> Answer:
    answers = [read_answer(part.items, nested + 1) for part in parts]
    joined = relations.joined([part.before for part in parts])
    if joined and all(_is_half_line(a) for a in answers):
        merged = _merged(joined, answers)
        if merged is not None:
            return merged
    # In "5, 6 and 7 cm" the unit is everybody's, in "x = 1, 2" the name.
    unit, name = answers[-1].unit, answers[0].name
    if name and any(a.name not in ("", name) for a in answers):
        name = ""
    flat: list[Answer] = []
    for a in answers:
        if isinstance(a.body, Group) and a.body.kind == "list":
            flat += a.body.parts
        else:
            flat.append(a)
    shared = [a._replace(unit=a.unit or unit, name="" if a.name == name else a.name) for a in flat]
    return Answer(name, "", (), Group("list", "", tuple(shared)))


def _is_half_line(answer: Answer) -> bool:
    body = answer.body
    if not isinstance(body, Group) or body.kind != "sequence" or len(body.parts) != 2:
        return False
    return any(_is_infinite(part) for part in body.parts) and bool(answer.name)


def _is_infinite(answer: Answer) -> bool:
    return isinstance(answer.body, Scalar) and "\\infty" in answer.body.form


def _merged(joined: str, answers: Sequence[Answer]) -> Answer | None:
    """x > 1 and x < 2 is an interval; x < 1 or x > 2 is a union."""
    groups = [a.body for a in answers if isinstance(a.body, Group)]
    if joined == "or":
        parts = tuple(a._replace(name="") for a in answers)
        return Answer(answers[0].name, "", (), Group("union", "", parts))
    lower = [g for g in groups if not _is_infinite(g.parts[0])]
    upper = [g for g in groups if not _is_infinite(g.parts[1])]
    if len(groups) != 2 or len(lower) != 1 or len(upper) != 1:
        return None
    brackets = lower[0].brackets[0] + upper[0].brackets[1]
    parts = (lower[0].parts[0], upper[0].parts[1])
    return Answer(answers[0].name, "", (), Group("sequence", brackets, parts))


def _label(items: tuple[Item, ...]) -> tuple[str, tuple[Item, ...]]:
    """The letter of a choice, where its value follows: (D) 12."""
    letter: Item = ""
    rest = items[3:]
    if len(items) > 3 and items[0] == "(" and items[2] == ")":
        letter = items[1]
    elif len(items) > 2 and items[1] in (".", ":", ")") and not str(items[2])[:1].isupper():
        letter, rest = items[0], items[2:]
    rest = trim(rest)
    operated = (
        not rest or (isinstance(rest[0], Node) and rest[0].command == "^") or rest[0] in _GOES_ON
    )
    if isinstance(letter, str) and len(letter) == 1 and letter in "ABCDEFGH" and not operated:
        return letter, rest
    return "", items


def _interval(bounds: relations.Bounds, nested: int) -> Answer:
    ends = tuple(read_answer(end, nested + 1) for end in (bounds.low, bounds.high))
    return Answer(bounds.name, "", (), Group("sequence", bounds.brackets, ends))


def _single(items: tuple[Item, ...], nested: int) -> Answer:
    """No list, no relation."""
    if not items:
        return _words(items)
    if items == (v.NOTHING,):
        return Answer("", "", (), Group("set", "", ()))
    union = relations.split(items, ("\\cup",))
    if len(union) > 1:
        parts = tuple(read_answer(part, nested + 1) for part in union)
        return Answer("", "", (), Group("union", "", parts))
    enclosed = relations.enclosed(items)
    if enclosed is not None:
        answer = _enclosed(*enclosed, nested)
        if answer is not None:
            return answer
    if items[0] == "\\begin{matrix}" and items[-1] == "\\end{matrix}":
        return _matrix(items[1:-1], nested)
    if items[-1] == ")" and items.count("(") < items.count(")"):
        return _single(trim(items[:-1]), nested)  # B)
    return _scalar(items, nested)


def _enclosed(opening: str, closing: str, inside: tuple[Item, ...], nested: int) -> Answer | None:
    if opening == "\\{" and closing == "\\}":
        rule = relations.set_rule(inside)
        if rule is not None:
            return read_answer(rule, nested + 1)
        parts = relations.split(inside, (",", ";")) if inside else []
        return _group("set", "", parts, nested)
    parts = relations.split(inside, (",", ";"))
    if len(parts) > 1:
        return _group("sequence", opening + closing, parts, nested)
    if (opening, closing) in (("(", ")"), ("[", "]")):
        if any(item in ("=", "<", ">", "\\le", "\\ge", "\\in") for item in inside):
            return read_answer(inside, nested + 1)
        return _single(trim(inside), nested + 1) if nested < MAX_NESTED else None
    return None


def _group(kind: str, brackets: str, parts: Sequence[Sequence[Item]], nested: int) -> Answer:
    brackets = brackets.replace("\\langle", "(").replace("\\rangle", ")")
    answers = tuple(read_answer(part, nested + 1) for part in parts)
    return Answer("", "", (), Group(kind, brackets, answers))


def _matrix(items: tuple[Item, ...], nested: int) -> Answer:
    rows = [row for row in relations.split(items, ("\\\\",)) if row]
    cells = [relations.split(row, ("&",)) for row in rows]
    shape = " ".join(str(len(row)) for row in cells)
    if shape.strip("1 ") == "" and len(cells) > 1:  # A column is a vector.
        return _group("sequence", "()", [row[0] for row in cells], nested)
    return _group("matrix", shape, [cell for row in cells for cell in row], nested)


def _scalar(items: tuple[Item, ...], nested: int) -> Answer:
    part = measured(_in_digits(items))
    if '"to' in part.items:
        part = part._replace(items=tuple(":" if item == '"to' else item for item in part.items))
    ratio = relations.split(part.items, (":",))
    if len(ratio) > 1 and all(ratio):
        answer = _group("ratio", "", ratio, nested)
        return answer._replace(unit=part.unit)
    if relations.enclosed(part.items) is not None and part.unit and nested < MAX_NESTED:
        return read_answer(part.items, nested + 1)._replace(unit=part.unit)
    if any(map(is_word, part.items)):
        return _words(items)
    form = spell(part.items)
    try:
        expression = read_expression(part.items)
    except UnreadableError:
        return Answer("", "", part.unit, Scalar(form, None, None, False, part.percent))
    value = algebra.scale(expression.value, part.scale)
    number = algebra.rational(value)
    scalar = Scalar(form, value, number, expression.literal, part.percent)
    return Answer("", "", part.unit, scalar)


def _in_digits(items: tuple[Item, ...]) -> tuple[Item, ...]:
    """With numbers in place of the words for them, at the front: twenty-five, fifth."""
    if not is_word(items[0]):
        return items
    sign = items[:1] if items[0] in ('"negative', '"minus') else ()
    rest = items[len(sign) :]
    words = [str(item)[1:] if is_word(item) else "" for item in rest[:3]]
    first = words[0] if words else ""
    if first in v.ORDINALS and len(rest) == 1:
        return (*(("-",) if sign else ()), v.ORDINALS[first], '"th')
    if first not in v.NUMBER_WORDS:
        return items
    number, used = int(v.NUMBER_WORDS[first]), 1
    second = 2 if len(rest) > 2 and rest[1] == "-" else 1
    if number >= 20 and len(words) > second and words[second] in v.NUMBER_WORDS:
        ones = int(v.NUMBER_WORDS[words[second]])
        if 0 < ones < 10:
            number, used = number + ones, second + 1
    return (*(("-",) if sign else ()), str(number), *rest[used:])


def _words(items: Sequence[Item]) -> Answer:
    items = [item for item in items if item != '"th']
    text = " ".join(str(item).removeprefix('"') for item in items if not isinstance(item, Node))
    if all(not isinstance(item, Node) for item in items) and text in v.PHRASES:
        sign = v.PHRASES[text]
        if sign == v.NOTHING:  # The set without elements.
            return Answer("", "", (), Group("set", "", ()))
        return Answer("", "", (), Scalar(sign, algebra.symbol(sign), None, False, False))
    named = ['"' + unit_name(str(x)[1:]) if is_word(x) else x for x in items]
    return Answer("", "", (), Words(spell(named)))
