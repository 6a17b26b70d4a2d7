"""Scorers: pure functions (response text, ground truth) -> Verdict.

This module runs inside the scoring processes, so it imports nothing heavy: the parent turns
verdicts into gpg_megatron.types.Reward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import NamedTuple

from gpg_megatron.answers import last_boxed
from gpg_megatron.reward import equivalence, mathematics


class Verdict(NamedTuple):
    """What a scorer says about one answer; the plain form of gpg_megatron.types.Reward."""

    score: float
    """What the policy gradient uses."""
    accuracy: float
    """1.0 right, 0.0 wrong."""
    parts: dict[str, float]
    """Named components for the metrics and for reward.weights."""
    answer: str | None
    """What was read as the answer, in one spelling for equal answers; None: nothing."""


Scorer = Callable[[str, str], Verdict]

GSM8K_TAIL = 300
"""Characters at the end of a response in which the answer must stand."""

_NUMBER = r"""
    (?P<before>[-+])? [ \t]* \\?[$€£]? [ \t]* (?P<after>[-+])?    # -5, $5, -$5, $ -5, \$5
    (?P<digits>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?                     # 1,234 or 1234
    (?P<fraction>\.\d+)?
"""
# What would make the digits only a piece of the answer: 1/2, 3:30, 2^5, 5-7, 1,2, 3 + 4 = 7.
_CONTINUED = r"(?P<continued>[.,:eE]\d|[ \t]*(?:[-+/^=×]|\*{1,2})[ \t]*\d)?"
_ANSWER = re.compile(
    r"\#{4} [ \t]* (?:\*\*)? [ \t]* (?=[-+$€£\\ \t.]*\d)" + _NUMBER + _CONTINUED, re.VERBOSE
)
_GROUND_TRUTH = re.compile(_NUMBER + r"\.?", re.VERBOSE)


def exact_match(response: str, ground_truth: str) -> Verdict:
    """1 when both texts are equal once surrounding white space is removed, else 0."""
    answer = response.strip()
    right = float(answer == ground_truth.strip())
    return Verdict(right, right, {"exact_match": right}, answer)


def gsm8k(response: str, ground_truth: str) -> Verdict:
    """1 when the last "#### number" of the final 300 characters equals the ground truth.

    Numbers are compared by value: commas, a sign, a currency sign, bold marks, a trailing
    period, and a unit after the number make no difference, nor do decimals (42.0 equals 42).
    An answer that goes on as an expression (1/2, 5-7, 3:30) is not a number. The part
    "format" is 1 when a number was found, right or wrong.

    Raises:
        ValueError: the ground truth is not a number.
    """
    truth = parse_number(ground_truth)
    answer = gsm8k_answer(response)
    right = float(answer is not None and answer == truth)
    found = None if answer is None else format(answer.normalize(), "f")
    return Verdict(right, right, {"gsm8k": right, "format": float(answer is not None)}, found)


def math(response: str, ground_truth: str) -> Verdict:
    """1 when the last \\boxed of the response equals the ground truth.

    Compared are the spellings of mathematics.compare, and plain numbers by value. The part
    "format" is 1 when there was a box with something in it.
    """
    boxed = last_boxed(response)
    right = float(bool(boxed) and mathematics.equal(boxed or "", ground_truth))
    found = mathematics.vote(boxed) if boxed else None
    return Verdict(right, right, {"math": right, "format": float(bool(boxed))}, found)


def math_verify(response: str, ground_truth: str) -> Verdict:
    """1 when the last \\boxed of the response means the same as the ground truth.

    Decided by `math` where that says yes, otherwise by the library math-verify. Without a box
    the end of the response is searched for an expression.
    """
    boxed = last_boxed(response)
    right = float(equivalence.equivalent(response, ground_truth))
    found = mathematics.vote(boxed) if boxed else None
    return Verdict(right, right, {"math_verify": right, "format": float(bool(boxed))}, found)


def gsm8k_answer(response: str) -> Decimal | None:
    """The number after the last "####" that is followed by one; None when there is none."""
    answers = list(_ANSWER.finditer(_ascii_minus(response[-GSM8K_TAIL:])))
    if not answers or answers[-1]["continued"]:
        return None
    return _value(answers[-1])


def parse_number(text: str) -> Decimal:
    """The value of a text that is a number and nothing else ("1,234", "-$5.00", "42.").

    Raises:
        ValueError: it is not.
    """
    match = _GROUND_TRUTH.fullmatch(_ascii_minus(text.strip()))
    value = _value(match) if match else None
    if value is None:
        raise ValueError(f"{text!r} is not a number")
    return value


def _ascii_minus(text: str) -> str:
    return text.replace("\N{MINUS SIGN}", "-")


def _value(match: re.Match[str]) -> Decimal | None:
    digits, fraction = match["digits"] or "", match["fraction"] or ""
    if not (digits or fraction) or (match["before"] and match["after"]):
        return None
    value = Decimal((digits.replace(",", "") or "0") + fraction)
    return -value if "-" in (match["before"], match["after"]) else value


SCORERS: Mapping[str, Scorer] = {
    "exact_match": exact_match,
    "gsm8k": gsm8k,
    "math": math,
    "math_verify": math_verify,
}
"""Name (as in reward.scorer) -> scorer."""

PREPARE: Mapping[str, Callable[[], None]] = {"math_verify": equivalence.prepare}
"""What a scorer needs to be done before its first answer, outside of the time limit."""
