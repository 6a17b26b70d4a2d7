"""Values of number tokens, and of functions where they can be computed."""

from __future__ import annotations

import math
from fractions import Fraction

from gpg_megatron.reward import algebra
from gpg_megatron.reward.algebra import Rational, UnreadableError, Value

MAX_EXPONENT = 400
"""Of ten in 1e400; larger ones are no number."""
MAX_FACTORIAL = 100
MAX_CHOICES = 200
INVERSE = {"\\sin": "\\arcsin", "\\cos": "\\arccos", "\\tan": "\\arctan"}
"""What a function to the power -1 is."""


def is_number(token: str) -> bool:
    """Whether a token is a number."""
    return token[0].isdecimal() or (token[0] == "." and len(token) > 1)


def read_number(token: str) -> Rational:
    """The value of a number token.

    Raises:
        UnreadableError: its exponent is too large.
    """
    if token.isdecimal():
        return int(token)
    if "\\" in token:
        return _repeating(token)
    mantissa, _, exponent = token.partition("e")
    if exponent and abs(int(exponent)) > MAX_EXPONENT:
        raise UnreadableError
    value = Fraction(mantissa)
    return value * Fraction(10) ** int(exponent) if exponent else value


def _repeating(token: str) -> Fraction:
    """0.1\\overline{6} is 1/6."""
    start, _, rest = token.partition("\\overline{")
    whole, _, fixed = start.partition(".")
    period = rest.rstrip("}")
    shift = 10 ** len(fixed)
    tail = Fraction(int(period), (10 ** len(period) - 1) * shift)
    return Fraction(int((whole or "0") + fixed), shift) + tail


def is_power_of_ten(value: Rational) -> bool:
    """Whether a number is 10, 100, 0.1 and so on."""
    text = str(value.numerator * value.denominator)
    return value > 0 and text[0] == "1" and not text[1:].strip("0")


def factorial(value: Value) -> Value:
    """value!"""
    n = algebra.rational(value)
    if isinstance(n, int) and 0 <= n <= MAX_FACTORIAL:
        return algebra.number(math.factorial(n))
    return algebra.symbol(f"!({algebra.key(value)})")


def binomial(n: Value, k: Value) -> Value:
    """n over k."""
    a, b = algebra.rational(n), algebra.rational(k)
    if isinstance(a, int) and isinstance(b, int) and 0 <= b <= a <= MAX_CHOICES:
        return algebra.number(math.comb(a, b))
    return algebra.symbol(f"binom({algebra.key(n)},{algebra.key(k)})")


def bracket(opening: str, value: Value) -> Value:
    """The absolute value, the floor or the ceiling, by its opening bracket."""
    n = algebra.rational(value)
    if opening != "|":
        if n is None:
            return algebra.symbol(f"{opening}({algebra.key(value)})")
        return algebra.number(math.floor(n) if opening == "\\lfloor" else math.ceil(n))
    if n is not None:
        return algebra.number(-n if n < 0 else n)
    # |a - b| is |b - a|.
    content, primitive = algebra.split(value)
    return algebra.symbol(
        f"abs({algebra.key(algebra.scale(primitive, -content if content < 0 else content))})"
    )
