"""Mathematical answers: when two are equal, and the spelling by which answers vote.

    text -- form --> items -- reading --> Answer -- equality --> True, False or None

Linear in the answer but for sets, nothing is rounded, and what would grow too large is not
computed: no answer needs a limit of time or memory.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from gpg_megatron.reward import equality
from gpg_megatron.reward.algebra import Rational
from gpg_megatron.reward.form import MAX_ANSWER, Item, Node, TooDeepError, nest
from gpg_megatron.reward.reading import Answer, Words, read_answer
from gpg_megatron.reward.tokens import tokenize
from gpg_megatron.reward.vocabulary import QUALIFIERS

_PLAIN = re.compile(r"-?\d{1,60}(?:\.\d{1,60})?", re.ASCII)
_LIST_OF_THREES = re.compile(r"\d,\d{3}(?!\d)", re.ASCII)


def equal(answer: str, truth: str, tolerance: Rational = 0) -> bool:
    """Whether an answer is known to be equal to the truth; docs/rewards.md has the table."""
    return compare(answer, truth, tolerance) is True


def compare(answer: str, truth: str, tolerance: Rational = 0) -> bool | None:
    """True: equal. False: different. None: neither is known.

    Args:
        answer, truth: the content of a box; any string. One of more than MAX_ANSWER characters
            is equal to nothing.
        tolerance: largest difference of two equal numbers, relative to the truth's.
    """
    answer, truth = answer.strip(), truth.strip()
    if max(len(answer), len(truth)) > MAX_ANSWER:
        return False
    if answer == truth:
        return True
    if not answer or not truth:
        return False
    if _PLAIN.fullmatch(answer) and _PLAIN.fullmatch(truth):
        return equality.near(_value(answer), _value(truth), tolerance)
    if _flat(answer) == _flat(truth):
        return True
    verdict = equality.compare(_read(answer), _read(truth), tolerance)
    if verdict is not True and _LIST_OF_THREES.search(answer + " " + truth):
        # 100,200 may be two numbers.
        again = equality.compare(
            _read(answer, commas_group=False), _read(truth, commas_group=False), tolerance
        )
        verdict = again if again else verdict
    return verdict


def _value(text: str) -> Rational:
    return Fraction(text) if "." in text else int(text)


def says_more(answer: str) -> bool:
    """Whether an answer is an equation, or has words that make another answer of its value
    ("at least 5", "not C"): a library that reads on to the value would be misled."""
    body = _read(answer.strip()).body
    if not isinstance(body, Words):
        return False
    qualified = any(f"\\text{{{word}}}" in body.text for word in QUALIFIERS)
    return qualified or body.text.endswith(" 0") or body.text.startswith("0 ")


@functools.lru_cache(maxsize=4096)
def vote(answer: str) -> str:
    """One text for answers of the same value; a number as an answer would write it."""
    text = answer.strip()
    if len(text) > MAX_ANSWER:
        return text[:MAX_ANSWER]
    return equality.vote_key(_read(text))


@functools.lru_cache(maxsize=4096)
def _items(text: str, commas_group: bool) -> tuple[Item, ...]:
    try:
        return nest(tokenize(text, commas_group=commas_group))
    except TooDeepError:
        return (text,)


@functools.lru_cache(maxsize=4096)
def _read(text: str, commas_group: bool = True) -> Answer:
    return read_answer(_items(text, commas_group))


def _flat(text: str) -> str | tuple[Item, ...]:
    """The items; the letters alone, where there are only letters and words: "Evelyn" in whatever
    style and case."""
    items = _items(text, True)
    letters = [item for item in items if isinstance(item, str) and item not in (".", "-")]
    bare = "".join(letters).replace('"', "")
    plain = len(bare) > 2 and bare.isalpha() and not any(isinstance(i, Node) for i in items)
    return bare.casefold() if plain else items
