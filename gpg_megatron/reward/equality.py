"""Whether an answer is equal to a truth: True, False, or None where this cannot be told.

The truth is what was asked for, the answer what was written: 0.5 is an answer to 50 %, 50 is one
too, but 50 % and not 0.5 is one to 50. So equality is no equivalence between answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction

from gpg_megatron.reward import algebra
from gpg_megatron.reward.algebra import Rational
from gpg_megatron.reward.reading import Answer, Group, Scalar, Words
from gpg_megatron.reward.units import comparable

Verdict = bool | None

MAX_MATCHED = 40
"""Parts of a set; larger ones are compared in order only."""


def compare(answer: Answer, truth: Answer, tolerance: Rational = 0) -> Verdict:
    """Whether these are equal, numbers when they are near."""
    if answer.label and _is_letter(truth):
        return answer.label == truth.body.form if isinstance(truth.body, Scalar) else None
    if truth.label and _is_letter(answer):
        return truth.label == answer.body.form if isinstance(answer.body, Scalar) else None
    if answer.name and truth.name and answer.name != truth.name and not _functions(answer, truth):
        return False
    units = (answer.unit, truth.unit)
    if all(units) and answer.unit != truth.unit and all(map(comparable, units)):
        return False
    return _bodies(answer, truth, tolerance)


def _functions(answer: Answer, truth: Answer) -> bool:
    """y = 2x and f(x) = 2x name the same function; words and vectors are names of no variable."""
    names = (answer.name, truth.name)
    if any("(" in name or (len(name) > 1 and name[0].islower()) or "{" in name for name in names):
        return True
    return any(name.isupper() for name in names) or _has_symbols(truth)


def _has_symbols(answer: Answer) -> bool:
    return isinstance(answer.body, Scalar) and answer.body.number is None


def _is_letter(answer: Answer) -> bool:
    body = answer.body
    return isinstance(body, Scalar) and len(body.form) == 1 and body.form.isupper()


def _bodies(answer: Answer, truth: Answer, tolerance: Rational) -> Verdict:
    a, t = answer.body, truth.body
    if isinstance(t, Group) and t.kind == "chain":
        return _any(compare(answer, side, tolerance) for side in t.parts)
    if isinstance(a, Group) and a.kind == "chain":
        if not _consistent(a.parts, tolerance):
            return False
        return compare(a.parts[-1], truth, tolerance)
    if isinstance(a, Scalar) and isinstance(t, Scalar):
        return _scalars(a, t, tolerance)
    if isinstance(a, Group) and isinstance(t, Group):
        return _groups(a, t, tolerance)
    if isinstance(a, Words) and isinstance(t, Words):
        return True if a.text == t.text else None
    if isinstance(a, Words) or isinstance(t, Words):
        sides = {_as_equation(answer), _as_equation(truth)}
        return True if len(sides) == 1 and "" not in sides else None
    return _scalar_and_group(answer, truth, tolerance)


def _consistent(sides: Sequence[Answer], tolerance: Rational) -> bool:
    """Whether a = b = c is true, percent signs being what they are."""
    bodies = [side.body for side in sides if isinstance(side.body, Scalar)]
    last = bodies[-1]
    return all(
        a.number is not None
        and last.number is not None
        and _numbers(a, a.number, last, last.number, tolerance)
        for a in bodies
    )


def _as_equation(answer: Answer) -> str:
    """y = 3x + 1 as the reader writes 3x - y + 1 = 0; "" for what is no equation."""
    body = answer.body
    if isinstance(body, Words):
        return body.text if body.text.endswith(" = 0") else ""
    if not isinstance(body, Scalar) or body.value is None or not answer.name.isalpha():
        return ""
    difference = algebra.add(body.value, {((answer.name, 1),): -1})
    return f"{algebra.key(algebra.split(difference)[1])} = 0"


def _scalar_and_group(answer: Answer, truth: Answer, tolerance: Rational) -> Verdict:
    group, other = (answer, truth) if isinstance(answer.body, Group) else (truth, answer)
    assert isinstance(group.body, Group)
    kind, parts = group.body.kind, group.body.parts
    if kind == "ratio":
        value = _ratio(group.body)
        number = other.body.number if isinstance(other.body, Scalar) else None
        if value is None or number is None:
            return None
        if group is answer:
            return near(value, number, tolerance)
        return near(number, value, tolerance)
    if kind == "list" and group is answer and _each(parts, truth, tolerance):
        return True  # 3/4 or 0.75
    if kind in ("set", "list") and len(parts) == 1:
        if group is answer:
            return compare(parts[0], truth, tolerance)
        return compare(answer, parts[0], tolerance)
    if kind == "sequence" and isinstance(other.body, Scalar) and other.body.form == "\\R":
        return [_form(part) for part in parts] == ["- \\infty", "\\infty"]
    return False if not _has_symbols(other) else None


def _each(answers: Iterable[Answer], truth: Answer, tolerance: Rational) -> Verdict:
    return _all(compare(answer, truth, tolerance) for answer in answers)


def _ratio(group: Group) -> Fraction | None:
    numbers = [part.body.number for part in group.parts if isinstance(part.body, Scalar)]
    if len(numbers) != 2 or len(group.parts) != 2 or numbers[0] is None or not numbers[1]:
        return None
    return Fraction(numbers[0]) / numbers[1]


def _form(answer: Answer) -> str:
    return answer.body.form.removeprefix("+ ") if isinstance(answer.body, Scalar) else ""


def _scalars(a: Scalar, t: Scalar, tolerance: Rational) -> Verdict:
    if a.form == t.form and a.percent == t.percent and a.number == t.number:
        return True
    if a.number is not None and t.number is not None:
        if not _numbers(a, a.number, t, t.number, tolerance):
            return False
        return True if a.literal or not t.literal else None
    if a.value is None or t.value is None:
        return None
    if a.value == t.value:
        return True
    return _told_apart(a, t)


def near(answer: Rational, truth: Rational, tolerance: Rational) -> bool:
    """Whether two numbers differ by no more than this share of the truth."""
    if answer == truth or not tolerance:
        return answer == truth
    return abs(Fraction(answer - truth)) <= tolerance * abs(Fraction(truth))


def _numbers(a: Scalar, answer: Rational, t: Scalar, truth: Rational, tolerance: Rational) -> bool:
    if near(answer, truth, tolerance):
        return True
    if a.percent == t.percent:
        return False
    if a.percent:
        return near(answer, 100 * truth, tolerance)
    return near(100 * answer, truth, tolerance)


def _told_apart(a: Scalar, t: Scalar) -> Verdict:
    """False where two values that have no other spelling differ: symbols and numbers."""
    assert a.value is not None and t.value is not None
    multiples = len(a.value) == 1 and a.value.keys() == t.value.keys()
    if (_is_large(a) and t.number is not None) or (_is_large(t) and a.number is not None):
        return False
    return False if multiples or (_is_plain(a) and _is_plain(t)) else None


def _is_large(scalar: Scalar) -> bool:
    """The factorial of a number that is too large to be written out."""
    terms = list(scalar.value or {})
    return len(terms) == 1 and any(
        base[:2] == "!(" and base[2:-1].isdigit() for base, _ in terms[0]
    )


def _is_plain(scalar: Scalar) -> bool:
    """A polynomial in symbols and roots of primes: no two of them are equal."""
    assert scalar.value is not None
    bases = (base for term in scalar.value for base, _ in term)
    return all("(" not in base and not (base[0] == "#" and len(base) > 7) for base in bases)


def _groups(a: Group, t: Group, tolerance: Rational) -> Verdict:
    if "ratio" in (a.kind, t.kind):
        first, second = _ratio(a), _ratio(t)
        if first is not None and second is not None:
            return near(first, second, tolerance)
    if (t.kind == "union" and a.kind == "union") or {a.kind, t.kind} <= {"set", "list"}:
        return _unordered(a.parts, t.parts, tolerance)
    # Three numbers in square brackets are no interval.
    points = {a.brackets, t.brackets} == {"()", "[]"} and min(len(a.parts), len(t.parts)) > 2
    if a.kind != t.kind or (a.brackets != t.brackets and not points):
        return _across(a, t, tolerance)
    return _ordered(a.parts, t.parts, tolerance)


def _across(a: Group, t: Group, tolerance: Rational) -> Verdict:
    """Groups of different kinds: a vector may be written as a row or in angle brackets."""
    if a.kind == t.kind == "sequence" and len(a.parts) == len(t.parts) == 2:
        return False
    kinds = {a.kind, t.kind}
    if kinds == {"sequence", "matrix"} or kinds == {"matrix"}:
        return False if kinds == {"matrix"} else None
    if kinds == {"list", "sequence"}:
        named, other = (a, t) if a.kind == "list" else (t, a)
        if len({part.name for part in named.parts} - {""}) == len(named.parts):
            # x = 1, y = 2 is the point (1, 2).
            bare = [part._replace(name="") for part in named.parts]
            return _ordered(bare, other.parts, tolerance) if other.brackets == "()" else None
    return False if kinds <= {"sequence", "set", "list", "union", "matrix"} else None


def _ordered(answers: Sequence[Answer], truths: Sequence[Answer], tolerance: Rational) -> Verdict:
    if len(answers) != len(truths):
        return False
    return _all(compare(a, t, tolerance) for a, t in zip(answers, truths, strict=True))


def _unordered(answers: Sequence[Answer], truths: Sequence[Answer], tolerance: Rational) -> Verdict:
    """Each truth is met by an answer and each answer meets a truth."""
    if any("\\dots" in _form(x) for x in (*answers, *truths)):
        return _ordered(answers, truths, tolerance)
    if len(answers) * len(truths) > MAX_MATCHED**2:
        return _ordered(answers, truths, tolerance)
    verdicts = [[compare(a, t, tolerance) for t in truths] for a in answers]
    rows = _all(_any(row) for row in verdicts)
    columns = _all(_any(row[i] for row in verdicts) for i in range(len(truths)))
    return _all((rows, columns))


def _all(verdicts: Iterable[Verdict]) -> Verdict:
    result: Verdict = True
    for verdict in verdicts:
        if verdict is False:
            return False
        result = None if verdict is None else result
    return result


def _any(verdicts: Iterable[Verdict]) -> Verdict:
    result: Verdict = False
    for verdict in verdicts:
        if verdict:
            return True
        result = None if verdict is None else result
    return result


def vote_key(answer: Answer) -> str:
    """One text for answers of the same value; names, labels and units are not in it, and a
    percentage is the number that is written."""
    body = answer.body
    if isinstance(body, Words):
        return body.text.replace("\\text", "").translate(_NO_BRACES).casefold()
    if isinstance(body, Group):
        return _group_key(body)
    if body.value is None:
        return body.form
    return algebra.key(body.value) if body.number is None else _written(body.number)


_NO_BRACES = str.maketrans("", "", "{} ")


def _group_key(group: Group) -> str:
    parts = [vote_key(part) for part in group.parts]
    if group.kind == "chain":
        return parts[-1]
    if group.kind in ("set", "list", "union"):
        separator = "\\cup" if group.kind == "union" else ","
        return separator.join(sorted(set(parts))) or "\\emptyset"
    brackets = group.brackets if group.kind == "sequence" else "()"
    opening, closing = brackets[0], brackets[1:]
    separator = ":" if group.kind == "ratio" else ","
    return f"{opening}{separator.join(parts)}{closing}{group.brackets * (group.kind == 'matrix')}"


def _written(number: Rational) -> str:
    """A whole number, or a fraction in lowest terms."""
    if number.denominator == 1:
        return str(number.numerator)
    sign = "-" if number < 0 else ""
    return f"{sign}\\frac{{{abs(number.numerator)}}}{{{number.denominator}}}"
