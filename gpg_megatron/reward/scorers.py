"""Scorers: pure functions (response text, ground truth) -> Verdict.

This module runs inside the scoring processes, so it imports nothing heavy: the parent turns
verdicts into gpg_megatron.types.Reward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import NamedTuple

from gpg_megatron.answers import last_boxed
from gpg_megatron.reward import equivalence, mathematics, verl
from gpg_megatron.reward.algebra import Rational
from gpg_megatron.reward.gsm8k import exact_number, last_answer


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


def exact_match(response: str, ground_truth: str) -> Verdict:
    """1 when both texts are equal once surrounding white space is removed, else 0."""
    answer = response.strip()
    right = float(answer == ground_truth.strip())
    return Verdict(right, right, {"exact_match": right}, answer)


def gsm8k(response: str, ground_truth: str) -> Verdict:
    """1 when the number behind the last "####" of the final 300 characters is the ground truth.

    Numbers are compared by value: commas, a sign, a currency sign, mark-up, a trailing period and
    a unit make no difference, nor do decimals (42.0 equals 42). What else follows (1/2, 5-7, 3:30,
    "3 or 4") makes it no number. The part "format" is 1 when a number was found, right or wrong.

    Raises:
        ValueError: the ground truth is not a number.
    """
    truth = exact_number(ground_truth)
    answer = last_answer(response)
    right = float(answer is not None and answer == truth)
    parts = {"gsm8k": right, "format": float(answer is not None)}
    return Verdict(right, right, parts, _written(answer))


def math(response: str, ground_truth: str, tolerance: Rational = 0) -> Verdict:
    """1 when the last \\boxed of the response is known to equal the ground truth.

    What is equal is decided by mathematics.compare, numbers up to a relative tolerance. The part
    "format" is 1 when there was a box with something in it.
    """
    boxed = last_boxed(response)
    right = float(bool(boxed) and mathematics.equal(boxed or "", ground_truth, tolerance))
    # All right answers vote alike, and the truth's vote is known from the first of them.
    found = mathematics.vote(ground_truth if right else boxed) if boxed else None
    return Verdict(right, right, {"math": right, "format": float(bool(boxed))}, found)


def math_verify(response: str, ground_truth: str, tolerance: Rational = 0) -> Verdict:
    """1 when the last \\boxed of the response means the same as the ground truth.

    Decided by `math` where that says yes, otherwise by the library math-verify. Without a box
    the end of the response is searched for an expression.
    """
    boxed = last_boxed(response)
    right = float(equivalence.equivalent(response, ground_truth, tolerance))
    found = mathematics.vote(ground_truth if right else boxed) if boxed else None
    return Verdict(right, right, {"math_verify": right, "format": float(bool(boxed))}, found)


def verl_gsm8k(response: str, ground_truth: str) -> Verdict:
    """verl's own verdict on an answer to GSM8K, to compare with numbers measured with verl."""
    right = float(verl.gsm8k_equal(response, ground_truth))
    return Verdict(right, right, {"verl_gsm8k": right}, _written(last_answer(response)))


def verl_math(response: str, ground_truth: str) -> Verdict:
    """verl's own verdict on an answer to MATH, to compare with numbers measured with verl."""
    right = float(verl.math_equal(response, ground_truth))
    boxed = last_boxed(response)
    return Verdict(right, right, {"verl_math": right}, mathematics.vote(boxed) if boxed else None)


def _written(answer: Decimal | None) -> str | None:
    return None if answer is None else format(answer.normalize(), "f")


SCORERS: Mapping[str, Scorer] = {
    "exact_match": exact_match,
    "gsm8k": gsm8k,
    "math": math,
    "math_verify": math_verify,
    "verl_gsm8k": verl_gsm8k,
    "verl_math": verl_math,
}
"""Name (as in reward.scorer) -> scorer."""

TOLERANT = frozenset(("math", "math_verify"))
"""Scorers that have a tolerance."""

PREPARE: Mapping[str, Callable[[], None]] = {"math_verify": equivalence.prepare}
"""What a scorer needs to be done before its first answer, outside of the time limit."""
