"""The normal form of an answer: its tokens with every argument in its place.

    text -- tokenize --> tokens -- nest --> Item, Item ... -- spell --> text

An Item is a token, or a Node: a command with the items of each of its arguments. Braces that
only group are gone, \\frac12 is \\frac{1}{2}, x^2 is x^{2}. The normal form of a normal form is
itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gpg_megatron.reward import vocabulary as v
from gpg_megatron.reward.tokens import tokenize

MAX_ANSWER = 2000
"""Characters; no reference answer comes near, and a longer one is wrong."""
MAX_DEPTH = 40
"""Arguments inside of arguments; deeper ones stay as they are written."""
MAX_ROUNDS = 8
"""Of spelling; two are enough for nearly all."""


class Node(NamedTuple):
    """A command with its arguments."""

    command: str
    arguments: tuple[tuple[Item, ...], ...]
    degree: tuple[Item, ...] = ()
    """Of a root: \\sqrt[3]{x}."""


Item = str | Node


_EMPTY_POWER = Node("^", ((),))


class TooDeepError(ValueError):
    """Nested more than MAX_DEPTH deep."""


def normal_form(answer: str) -> str:
    """The spelling that stands for all those that LaTeX shows alike; any string has one.

    A spelling may read as something simpler than what it came from, as 0^{o} reads as 0 degrees:
    it is spelled again until nothing changes.
    """
    text = answer.strip()
    for _ in range(MAX_ROUNDS):
        again = _spelled_once(text).strip()
        if again == text:
            break
        text = again
    return text


def _spelled_once(text: str) -> str:
    if len(text) > MAX_ANSWER:
        return text
    try:
        return spell(nest(tokenize(text)))
    except TooDeepError:
        return text


def nest(tokens: Sequence[str]) -> tuple[Item, ...]:
    """The tokens with their arguments.

    Raises:
        TooDeepError: nested more than MAX_DEPTH deep.
    """
    reader = _Reader(tokens)
    items: list[Item] = []
    while reader.rest:
        items += reader.items(0)
        if reader.rest:
            reader.rest.pop()  # A brace that nothing opened.
    return _without_marks(items)


def _without_marks(items: list[Item]) -> tuple[Item, ...]:
    """Without the stars of bold print at both ends, which may have been read as powers."""
    while items:
        first = items[0]
        if first == "*":
            items = items[1:]
        elif items[-1] in ("*", _EMPTY_POWER):
            items = items[:-1]
        elif isinstance(first, Node) and first.command == "^":
            items = [*first.arguments[0], *items[1:]]
        else:
            break
    return tuple(items)


class _Reader:
    def __init__(self, tokens: Sequence[str]) -> None:
        self.rest = list(reversed(tokens))
        """What is not yet read, the next token at the end."""

    def items(self, depth: int) -> list[Item]:
        """Up to the closing brace, or to the end."""
        if depth > MAX_DEPTH:
            raise TooDeepError
        result: list[Item] = []
        while self.rest and self.rest[-1] != "}":
            token = self.rest.pop()
            if token == "{":
                result += self._group(depth)
            elif token == "\\over":
                below = self.items(depth + 1)
                return [Node("\\frac", (tuple(result), tuple(below)))]
            elif token in v.ARGUMENTS:
                result.append(self._node(token, depth))
            else:
                result.append(token)
        return result

    def _group(self, depth: int) -> list[Item]:
        inside = self.items(depth + 1)
        if self.rest:
            self.rest.pop()
        return inside

    def _node(self, command: str, depth: int) -> Node:
        degree: tuple[Item, ...] = ()
        if command == "\\sqrt" and self.rest and self.rest[-1] == "[" and "]" in self.rest:
            self.rest.pop()
            content: list[str] = []
            while self.rest and (token := self.rest.pop()) != "]":
                content.append(token)
            degree = tuple(_Reader(content).items(depth + 1))
        arguments = [self._argument(command, depth) for _ in range(v.ARGUMENTS[command])]
        return Node(command, tuple(arguments), () if degree == ("2",) else degree)

    def _argument(self, command: str, depth: int) -> tuple[Item, ...]:
        if not self.rest or self.rest[-1] == "}":
            return ()
        token = self.rest.pop()
        if token == "{":
            return tuple(self._group(depth))
        if token in v.ARGUMENTS:
            if depth > MAX_DEPTH:
                raise TooDeepError
            return (self._node(token, depth + 1),)
        if command in ("\\frac", "\\binom") and token[0].isdecimal() and len(token) > 1:
            self.rest.append(token[1:])
            return (token[0],)
        if command == "\\sqrt" and token == "(":
            return tuple(self._parenthesis(depth))
        if command in "^_" and token in "+-" and self.rest and self.rest[-1] not in "{}":
            return (token, self.rest.pop())
        return (token,)

    def _parenthesis(self, depth: int) -> list[Item]:
        """What a root without braces is taken of: sqrt(2x)."""
        content, open_ = [], 1
        while self.rest:
            token = self.rest.pop()
            open_ += (token == "(") - (token == ")")
            if not open_:
                break
            content.append(token)
        return list(nest_within(content, depth + 1))


def nest_within(tokens: Sequence[str], depth: int) -> list[Item]:
    """nest for tokens that stand inside of others."""
    reader, items = _Reader(tokens), list[Item]()
    while reader.rest:
        items += reader.items(depth)
        if reader.rest:
            reader.rest.pop()
    return items


def spell(items: Sequence[Item]) -> str:
    """The items as text, from which the same items are read."""
    parts: list[str] = []
    before = ""
    for item in items:
        if isinstance(item, Node):
            index = f"[{spell(item.degree)}]" if item.degree else ""
            arguments = "".join(f"{{{spell(argument)}}}" for argument in item.arguments)
            text = f"{item.command}{index}{arguments}"
        else:
            text = f"\\text{{{item[1:]}}}" if item[0] == '"' else item
        parts += [_gap(before, text), text]
        before = text
    return "".join(parts)


def _gap(before: str, after: str) -> str:
    """What keeps two tokens apart: braces where a space would join them."""
    if not before or after[0] in "^_":
        return ""
    if after[0].isdecimal() or after[0] == ".":
        return "{}" if before[-1].isalnum() and before[0] != "\\" else " "
    # With a space, a letter behind a number, a bracket or a percent sign would be a unit.
    return "" if (before[-1].isdecimal() or before[-1] in ")%") and after.isalpha() else " "
