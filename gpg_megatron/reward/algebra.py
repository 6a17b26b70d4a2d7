"""Exact values of expressions: sums of terms with rational coefficients, in one order.

    Value = {Term: coefficient}        3x^2 y - 1/2   is   {((x, 2), (y, 1)): 3, (): -1/2}
    Term  = ((base, exponent), ...)    sorted by base, no exponent 0

A base is a text: a symbol, "#7" for a prime number below a root, or the key of a sum that stays a
factor. Sums are multiplied by constants and divided by symbols; otherwise a product of sums stays
a product: x(x + 1) and x^2 + x have different values here. Square roots are simplified and
divisors made rational. Nothing is ever rounded, and what would grow too large is an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from math import gcd, isqrt, lcm

Rational = int | Fraction
"""Whole numbers are int: they cost a tenth."""
Term = tuple[tuple[str, Rational], ...]
Value = dict[Term, Rational]

MAX_BITS = 1024
"""Of a power that is computed; a larger one stays a power."""
MAX_KEY = 4000
"""Characters of a key."""
MAX_FACTORED = 10**6
"""Larger numbers below a root are only tested for being a power."""
_CONSTANTS = ("\\pi", "e", "i")


class UnreadableError(ValueError):
    """No value can be given."""


def number(value: Rational) -> Value:
    """A constant; zero is the empty sum."""
    return {(): _lowest(value)} if value else {}


def symbol(name: str) -> Value:
    """A variable, a constant with a name, or a function of something."""
    return {((name, 1),): 1}


def rational(value: Value) -> Rational | None:
    """The number that a value is; None for one with symbols or roots."""
    if not value:
        return 0
    return value.get(()) if len(value) == 1 else None


def add(first: Value, second: Value) -> Value:
    """The sum."""
    total = dict(first)
    for term, coefficient in second.items():
        result = total.get(term, 0) + coefficient
        if result:
            total[term] = _lowest(result)
        else:
            del total[term]
    return total


def scale(value: Value, factor: Rational) -> Value:
    """The value times a number.

    Raises:
        UnreadableError: a coefficient has more than 8 * MAX_BITS bits.
    """
    if not factor:
        return {}
    if factor == 1:
        return value
    scaled = {term: _lowest(c * factor) for term, c in value.items()}
    for c in scaled.values():
        if max(c.numerator.bit_length(), c.denominator.bit_length()) > 8 * MAX_BITS:
            raise UnreadableError
    return scaled


def multiply(first: Value, second: Value) -> Value:
    """The product."""
    if len(first) > 1 and len(second) > 1:
        first, second = _factor(first), _factor(second)
    elif len(first) > 1:
        first, second = second, first
    if not first or not second:
        return {}
    [(term, coefficient)] = first.items()
    if not term:
        return scale(second, coefficient)
    if len(second) > 1 and not _distributes(term):
        second = _factor(second)
    if len(second) == 1:
        [(other, c)] = second.items()
        return scale(_merge((*term, *other)), coefficient * c)
    total: Value = {}
    for other, c in second.items():
        total = add(total, scale(_merge((*term, *other)), coefficient * c))
    return total


def divide(above: Value, below: Value) -> Value:
    """The quotient.

    Raises:
        UnreadableError: the divisor is 0.
    """
    n = rational(below)
    if n:
        return scale(above, 1 / Fraction(n))
    return multiply(above, power(below, number(-1)))


def power(base: Value, exponent: Value) -> Value:
    """base to the exponent.

    Raises:
        UnreadableError: 0 to a power that is not positive.
    """
    n = rational(exponent)
    if n is None:
        content, primitive = split(exponent)
        name = f"({key(base)})^({key(primitive)})"
        return _merge(((name, content),))
    if n == 0 or not base:
        if n <= 0 and not base:
            raise UnreadableError
        return number(1) if n == 0 else {}
    if len(base) > 1:
        content, primitive = split(base)
        if content < 0 and n.denominator > 1:
            content, primitive = -content, scale(primitive, -1)
        return multiply(_number_power(content, n), _merge(((f"({key(primitive)})", n),)))
    [(term, coefficient)] = base.items()
    return multiply(_number_power(coefficient, n), _term_power(term, n))


def split(value: Value) -> tuple[Rational, Value]:
    """The value as a number times a sum with whole coefficients without a common divisor, whose
    first term, in the order of keys, is positive."""
    if not value:
        return 0, {}
    below = lcm(*(c.denominator for c in value.values()))
    above = gcd(*(int(c * below) for c in value.values()))
    content = _lowest(Fraction(above, below))
    if value[min(value, key=_order)] < 0:
        content = -content
    return content, {term: int(c / Fraction(content)) for term, c in value.items()}


def key(value: Value) -> str:
    """The text that two values share exactly when they are the same.

    Raises:
        UnreadableError: it is too long.
    """
    terms = sorted(value.items(), key=lambda item: _order(item[0]))
    text = "+".join(f"{c}{_order(term)}" for term, c in terms) or "0"
    if len(text) > MAX_KEY:
        raise UnreadableError
    return text


def _lowest(value: Rational) -> Rational:
    if value.__class__ is int:
        return value
    return value.numerator if value.denominator == 1 else value


def _order(term: Term) -> str:
    return "".join(f"*{base}^{exponent}" for base, exponent in term)


def _factor(value: Value) -> Value:
    """A sum of several terms as a single one: number times base."""
    if len(value) < 2:
        return value
    content, primitive = split(value)
    return {((f"({key(primitive)})", 1),): content}


def _distributes(term: Term) -> bool:
    return all(
        base in _CONSTANTS or base[0] == "#" or (exponent < 0 and base[0] != "(")
        for base, exponent in term
    )


def _merge(factors: Iterable[tuple[str, Rational]]) -> Value:
    """The product of powers of bases."""
    exponents: dict[str, Rational] = {}
    for base, exponent in factors:
        exponents[base] = _lowest(exponents.get(base, 0) + exponent)
    coefficient: Rational = 1
    for base, exponent in exponents.items():
        if base[0] == "#" and exponent.denominator <= abs(exponent.numerator):
            whole = exponent.numerator // exponent.denominator
            n = int(base[1:])
            if n.bit_length() * abs(whole) <= MAX_BITS:
                coefficient *= Fraction(n) ** whole
                exponents[base] = _lowest(exponent - whole)
        elif base[0] == "#" and exponent < 0:
            coefficient /= Fraction(int(base[1:]))
            exponents[base] = exponent + 1
        elif base == "i" and exponent.denominator == 1:
            coefficient *= (1, 1, -1, -1)[exponent.numerator % 4]
            exponents[base] = exponent.numerator % 2
    term = tuple(sorted((base, exponent) for base, exponent in exponents.items() if exponent))
    return {term: _lowest(coefficient)}


def _term_power(term: Term, n: Rational) -> Value:
    positive = all(base[0] == "#" or base in ("\\pi", "e") for base, _ in term)
    if n.denominator == 1 or positive or all(exponent == 1 for _, exponent in term):
        return _merge((base, exponent * n) for base, exponent in term)
    return _merge(((f"({_order(term)})", n),))


def _number_power(base: Rational, n: Rational) -> Value:
    if base == 1:
        return number(1)
    if n.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if (bits - 1) * abs(n.numerator) <= MAX_BITS:
            return number(Fraction(base) ** n.numerator)
        sign = -1 if base < 0 and n.numerator % 2 else 1
        roots = multiply(_root(abs(base.numerator), n), _root(base.denominator, -n))
        return scale(roots, sign)
    roots = multiply(_root(abs(base.numerator), n), _root(base.denominator, -n))
    if base > 0:
        return roots
    if n.denominator % 2:
        return scale(roots, -1 if n.numerator % 2 else 1)
    return multiply(_merge((("i", 2 * n),)), roots) if n.denominator == 2 else _odd(base, n)


def _odd(base: Rational, n: Rational) -> Value:
    """A higher even root of a negative number stays what it is."""
    return _merge(((f"({base})", n),))


def _root(base: int, n: Rational) -> Value:
    """base to the n, base at least 1."""
    if base <= MAX_FACTORED:
        return _merge((f"#{prime}", times * n) for prime, times in _primes(base))
    if n.denominator == 2 and isqrt(base) ** 2 == base:
        return _number_power(isqrt(base), n.numerator)
    return _merge(((f"#{base}", n),))


def _primes(n: int) -> list[tuple[str, int]]:
    found, divisor = [], 2
    while divisor * divisor <= n:
        times = 0
        while n % divisor == 0:
            n //= divisor
            times += 1
        if times:
            found.append((str(divisor), times))
        divisor += 1
    return [*found, (str(n), 1)] if n > 1 else found
