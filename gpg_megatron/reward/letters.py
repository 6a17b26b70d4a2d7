"""What a run of letters in an answer is: factors, a name, a word, a function."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gpg_megatron.reward import vocabulary as v

_TEXT_COMMANDS = v.words("sin cos tan cot csc log ln lcm gcd arcsin arccos arctan pi infinity")
_CAPITAL_WORDS = v.words("AM PM USD DNE NOT AND OR YES NO")
_SINGLE_UNITS = frozenset("mgshLlJNWVACKF")
_TIMES = re.compile(r"\s*\{?10\}?\s*(?:\^|\*\*|[⁰¹²³⁴⁵⁶⁷⁸⁹])|\s+\d")
_UNIT_END = re.compile(
    r"[\s}]*(?:\.?[\s}$]*\Z|\^\s*\{?-?\d|/|\\cdot|\\text|\\mathrm|[²³])", re.DOTALL
)


def in_text(run: str, before: Sequence[str]) -> list[str]:
    """The tokens of a run of letters inside \\text{} and the like."""
    if len(run) == 1:
        counted = _after_number(before) or _within_unit(before) or _in_fraction(before)
        unit = counted and run in _SINGLE_UNITS
        return ['"' + run.casefold() if unit else run]
    if run in _TEXT_COMMANDS:
        return [v.BARE_COMMANDS[run]]
    if run.isupper() and run not in _CAPITAL_WORDS:
        return [run]
    return ['"th' if run in ("st", "nd", "rd") else '"' + run.casefold()]


def in_mathematics(run: str, before: Sequence[str], spaced: bool, rest: str) -> list[str]:
    """The tokens of a run of letters outside of text.

    Args:
        run: the letters.
        before: the last tokens in front of it, without braces.
        spaced: whether a space stands in front of it.
        rest: what follows it; the first characters are enough.
    """
    after_number = _after_number(before)
    if len(run) == 1:
        if after_number and run in "xX" and _TIMES.match(rest) and not rest.startswith("^"):
            return ["*"]
        unit = (after_number and spaced and _UNIT_END.match(rest)) or _within_unit(before)
        return ['"' + run.casefold() if unit and run in _SINGLE_UNITS else run]
    if after_number and not spaced and run in ("st", "nd", "rd", "th"):
        return ['"th']
    if run == "in" and before and before[-1].isalpha():
        return ["\\in"]
    lower = run.casefold()
    known_unit = run in v.BARE_UNITS
    if known_unit and (after_number or (before and before[-1].startswith('"'))):
        return ['"' + lower]
    if run in v.BARE_COMMANDS:
        return [v.BARE_COMMANDS[run]]
    if run.isupper():
        return ['"' + lower] if run in _CAPITAL_WORDS else [run]
    if lower in v.BARE_WORDS and (run.islower() or run[1:].islower()):
        return ['"' + lower]
    capitalised = len(run) > 2 and run[0].isupper() and run[1:].islower()
    counted = len(run) > 3 and after_number and spaced and run.islower()
    after_word = bool(before) and before[-1].startswith('"') and len(run) > 2
    if capitalised or counted or after_word:
        return ['"' + lower]
    return _factors(run)


def _after_number(before: Sequence[str]) -> bool:
    return bool(before) and (before[-1][-1] in "0123456789)%" or before[-1] == "\\pi")


def _within_unit(before: Sequence[str]) -> bool:
    """Behind "m/" or "erg ": an s is a second."""
    if before and before[-1][0] == '"' and before[-1][1:] in v.UNITS:
        return True
    return len(before) > 1 and before[-1] in "/*" and before[-2][0] == '"'


def _in_fraction(before: Sequence[str]) -> bool:
    """The fraction m over s, in text."""
    if before and before[-1] == "\\frac":
        return True
    return len(before) > 1 and before[-2] == "\\frac" and before[-1][0] == '"'


def _factors(run: str) -> list[str]:
    """A product of letters; a function or a root at its end is one token: xsqrt, bcos."""
    for name in ("sqrt", "sin", "cos", "tan", "log", "ln", "pi"):
        if run.endswith(name) and len(run) <= len(name) + 2:
            return [*run[: -len(name)], v.BARE_COMMANDS[name]]
    return list(run)
