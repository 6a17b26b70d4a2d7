"""Reading the items of an expression as an exact value.

    sum     = [sign] product (sign product)*
    product = factor ((times | divided by | nothing) factor)*
    factor  = primary (exponent | ! | ')*

Counted on the way is what a reader would still have to work out, so that 2 + 2 can be told from
4 although their values are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from gpg_megatron.reward import algebra, functions
from gpg_megatron.reward import vocabulary as v
from gpg_megatron.reward.algebra import UnreadableError, Value
from gpg_megatron.reward.form import Item, Node, spell

MAX_NESTED = 60
_CLOSED_BY = {"(": ")", "[": "]", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil", "|": "|"}
_STOPS = frozenset((")", "]", "|", "\\rfloor", "\\rceil", "+", "-", "*", "/", "!", "'", ",", "%"))


@dataclass(frozen=True, slots=True)
class Expression:
    """A value, and whether it is one number as numbers are written."""

    value: Value
    literal: bool
    """A whole number, decimal, fraction, mixed number, a power, or a number times a power of 10;
    with a sign. False where something is left to be worked out, or a symbol occurs."""


def read_expression(items: Sequence[Item]) -> Expression:
    """The value of these items, all of them.

    Raises:
        UnreadableError: they are no expression, or one that is too large.
    """
    reader = _Reader(items)
    value = reader.sum()
    if reader.at != len(reader.items):
        raise UnreadableError
    return Expression(value, algebra.rational(value) is not None and reader.is_literal())


class _Reader:
    def __init__(self, items: Sequence[Item], nested: int = 0) -> None:
        if nested > MAX_NESTED:
            raise UnreadableError
        self.items = items
        self.at = 0
        self.nested = nested
        self.sums = self.products = self.quotients = self.powers = self.others = 0

    def is_literal(self) -> bool:
        several = self.sums + self.products + self.quotients > 1 or self.powers > 1
        return not several and not self.others

    def peek(self) -> Item | None:
        return self.items[self.at] if self.at < len(self.items) else None

    def inner(self, items: Sequence[Item]) -> Value:
        """The value of an argument."""
        reader = _Reader(items, self.nested + 1)
        value = reader.sum()
        if reader.at != len(items):
            raise UnreadableError
        self._count(reader)
        return value

    def _count(self, inner: _Reader) -> None:
        self.sums += inner.sums
        self.products += inner.products
        self.quotients += inner.quotients
        self.powers += inner.powers
        self.others += inner.others

    def sum(self) -> Value:
        total = self._signed()
        while (sign := self.peek()) in ("+", "-"):
            right = self._signed()
            a, b = algebra.rational(total), algebra.rational(right)
            if a is not None and b is not None:
                # A whole number and a proper fraction is how some write a mixed number.
                mixed = a.denominator == 1 and b.denominator > 1 and sign == "+" and 0 < b < 1 <= a
                self.sums += 0 if mixed and self.quotients == 1 else 2
            total = algebra.add(total, right)
        return total

    def _signed(self) -> Value:
        negative = False
        while (sign := self.peek()) in ("+", "-"):
            negative ^= sign == "-"
            self.at += 1
        value = self._product()
        return algebra.scale(value, -1) if negative else value

    def _product(self) -> Value:
        value = self._factor()
        while (item := self.peek()) is not None:
            if item == "*":
                self.at += 1
                value = self._times(value, self._signed_factor())
            elif item == "/":
                self.at += 1
                below = self._signed_factor()
                self.quotients += algebra.rational(below) is not None
                value = algebra.divide(value, below)
            elif isinstance(item, str) and item in _STOPS and not self._opens(item):
                break
            elif (
                self._is_number(self.at) and self._is_number(self.at - 1) and not self._power_next()
            ):
                raise UnreadableError  # 3 4
            else:
                value = self._times(value, self._factor())
        return value

    def _opens(self, item: str) -> bool:
        """A bar behind a factor opens an absolute value where none is open."""
        return item == "|" and not self.nested and "|" in self.items[self.at + 1 :]

    def _times(self, first: Value, second: Value) -> Value:
        a, b = algebra.rational(first), algebra.rational(second)
        if a is not None and b is not None and 1 not in (abs(a), abs(b)):
            # 4.5 * 10^33 is a number; 3 * 4 is to be worked out.
            self.products += (
                1
                if self.powers and (functions.is_power_of_ten(a) or functions.is_power_of_ten(b))
                else 2
            )
        return algebra.multiply(first, second)

    def _signed_factor(self) -> Value:
        if self.peek() in ("+", "-"):
            negative = self.items[self.at] == "-"
            self.at += 1
            value = self._factor()
            return algebra.scale(value, -1) if negative else value
        return self._factor()

    def _factor(self) -> Value:
        value = self._primary()
        while (item := self.peek()) is not None:
            if isinstance(item, Node) and item.command == "^":
                self.at += 1
                value = self._raised(value, item.arguments[0])
            elif item == "!":
                self.at += 1
                value = self._factorial(value)
            else:
                break
        return value

    def _raised(self, base: Value, exponent: Sequence[Item]) -> Value:
        whole = algebra.rational(base)
        if whole is not None and whole.denominator == 1:
            self.powers += 1
        else:
            self.others += 1
        if all(item == "'" for item in exponent):
            return algebra.symbol(f"({algebra.key(base)}){''.join(map(str, exponent))}")
        return algebra.power(base, self.inner(exponent))

    def _factorial(self, value: Value) -> Value:
        self.others += 1
        return functions.factorial(value)

    def _power_next(self) -> bool:
        following = self.items[self.at + 1] if self.at + 1 < len(self.items) else ""
        return isinstance(following, Node) and following.command == "^"

    def _is_number(self, at: int) -> bool:
        item = self.items[at]
        return isinstance(item, str) and functions.is_number(item)

    def _primary(self) -> Value:
        item = self.peek()
        if item is None:
            raise UnreadableError
        self.at += 1
        if isinstance(item, Node):
            return self._node(item)
        if functions.is_number(item):
            return self._number(item)
        if item in _CLOSED_BY:
            return self._bracketed(item)
        if item in v.FUNCTIONS:
            return self._function(item)
        if not (item[-1].isalpha() and item[0] != '"') or item.startswith("\\text"):
            raise UnreadableError
        return self._symbol(item)

    def _number(self, token: str) -> Value:
        following = self.peek()
        if isinstance(following, Node) and following.command == "_":
            self.at += 1
            self.others += 1
            return algebra.symbol(f"{token}_{{{spell_base(following)}}}")
        value = functions.read_number(token)
        if isinstance(following, Node) and following.command == "\\frac" and token.isdecimal():
            above, below = following.arguments
            if len(above) == len(below) == 1 and all(map(_is_whole, (above[0], below[0]))):
                part = Fraction(int(str(above[0])), int(str(below[0])) or 1)
                if 0 < part < 1:
                    self.at += 1
                    self.quotients += 1
                    return algebra.number(value + part)
        return algebra.number(value)

    def _node(self, node: Node) -> Value:
        if node.command == "\\frac":
            above, below = map(self.inner, node.arguments)
            if algebra.rational(above) is not None and algebra.rational(below) is not None:
                self.quotients += 1
            return algebra.divide(above, below)
        if node.command == "\\sqrt":
            self.others += 1
            degree = self.inner(node.degree) if node.degree else algebra.number(2)
            return self._root(self.inner(node.arguments[0]), degree)
        if node.command == "\\binom":
            self.others += 1
            n, k = map(self.inner, node.arguments)
            return functions.binomial(n, k)
        if node.command in ("^", "_"):
            raise UnreadableError
        return self._symbol(spell([node]))

    def _root(self, value: Value, degree: Value) -> Value:
        return algebra.power(value, algebra.divide(algebra.number(1), degree))

    def _bracketed(self, opening: str) -> Value:
        reader = _Reader(self.items, self.nested + 1)
        reader.at = self.at
        value = reader.sum()
        if reader.peek() != _CLOSED_BY[opening]:
            raise UnreadableError
        self.at = reader.at + 1
        self._count(reader)
        if opening in "([":
            return self._of_base(value)
        self.others += 1
        return functions.bracket(opening, value)

    def _of_base(self, value: Value) -> Value:
        """(101)_2 is 101_2."""
        following = self.peek()
        n = algebra.rational(value)
        if not isinstance(following, Node) or following.command != "_":
            return value
        if n is None or n.denominator != 1:
            raise UnreadableError
        self.at += 1
        self.others += 1
        return algebra.symbol(f"{n}_{{{spell_base(following)}}}")

    def _function(self, name: str) -> Value:
        self.others += 1
        exponent: Value | None = None
        while isinstance(item := self.peek(), Node) and item.command in ("^", "_"):
            self.at += 1
            if item.command == "_":
                name += f"_{{{spell(item.arguments[0])}}}"
            else:
                exponent = self.inner(item.arguments[0])
        if exponent is not None and algebra.rational(exponent) == -1:
            inverse = functions.INVERSE.get(name)
            name, exponent = (inverse, None) if inverse else (name, exponent)
        argument = self._argument()
        if name == "\\exp":
            return algebra.power(algebra.symbol("e"), argument)
        value = algebra.symbol(f"{name}({algebra.key(argument)})")
        return value if exponent is None else algebra.power(value, exponent)

    def _argument(self) -> Value:
        """What a function is taken of: a bracket, or factors up to the next sign or function."""
        first = self.peek()
        value = self._factor() if first not in ("-", "+") else self._signed_factor()
        while (item := self.peek()) is not None and first not in ("(", "["):
            plain = isinstance(item, Node) or (item not in _STOPS and item not in _CLOSED_BY)
            if not plain or item in v.FUNCTIONS or item in ("*", "/"):
                break
            value = algebra.multiply(value, self._factor())
        return value

    def _symbol(self, name: str) -> Value:
        while True:
            item = self.peek()
            if isinstance(item, Node) and item.command == "_":
                name += f"_{{{spell(item.arguments[0])}}}"
            elif item == "'":
                name += "'"
            else:
                break
            self.at += 1
        return algebra.symbol(name)


def spell_base(node: Node) -> str:
    """The base of a number, in digits."""
    text = spell(node.arguments[0])
    word = text.removeprefix("\\text{").removesuffix("}")
    return v.NUMBER_WORDS.get(word, text)


def _is_whole(item: Item) -> bool:
    return isinstance(item, str) and item.isdecimal()
