"""Equivalence of mathematical expressions with the library math-verify (on sympy).

It is asked where our own comparison knows neither that two answers are equal nor that they
differ. That may take any time and memory: the scoring process is killed when it does, so the
library's own alarms are off.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from gpg_megatron.answers import last_boxed
from gpg_megatron.reward import mathematics
from gpg_megatron.reward.algebra import Rational

TAIL = 500
"""Characters at the end of a response without a box in which an expression is looked for."""
DIGITS = 12
"""To which the library compares what it cannot compare exactly; its own default of 6 makes all
small numbers equal."""


def prepare() -> None:
    """Import the library and use it once, so that no answer pays for that."""
    equivalent("\\boxed{(x+1)^2}", "x^2+2x+1")


def equivalent(response: str, ground_truth: str, tolerance: Rational = 0) -> bool:
    """Whether the last box of the response (or, without one, its end) means the ground truth;
    the tolerance is for what is in a box."""
    boxed = last_boxed(response)
    if boxed is None:
        return _by_library(response[-TAIL:], ground_truth)
    known = mathematics.compare(boxed, ground_truth, tolerance)
    if known is not None:
        return known
    if mathematics.says_more(boxed) or mathematics.says_more(ground_truth):
        return False
    return _by_library(f"\\boxed{{{boxed}}}", ground_truth)


def _by_library(text: str, ground_truth: str) -> bool:
    from math_verify import verify

    target = _parse(text)
    if not target:
        return False
    truth = _truth(ground_truth)
    return bool(verify(truth, target, float_rounding=DIGITS, timeout_seconds=None))


@functools.lru_cache(maxsize=1024)
def _truth(ground_truth: str) -> list[Any]:
    return _parse(f"\\boxed{{{ground_truth}}}")


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    # It warns, once per process, that time limits are the caller's: they are.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    parsed: list[Any] = parse(text, parsing_timeout=None)
    return parsed
