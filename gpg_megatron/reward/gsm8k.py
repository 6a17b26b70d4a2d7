"""The number behind "####" in an answer to GSM8K.

    #### mark-up number mark-up [unit words] [mark-up]     and then the end of the line

What may stand around the number is what is listed here. Everything else makes it no number: a
piece of an expression, of a range or of a list is not what the answer says.
"""

from __future__ import annotations

import functools
import re
from decimal import Decimal

from gpg_megatron.reward.vocabulary import words

TAIL = 300
"""Characters at the end of a response in which the answer must stand."""

_SPACE = r"[ \t\u00a0\u2009\u202f]"
_CURRENCY = r"(?:US)?\\?[$€£¥₹]"
_NUMBER = rf"""
    (?P<before>[-+\N{{MINUS SIGN}}])?{_SPACE}*(?:{_CURRENCY}{_SPACE}*)*
    (?P<after>[-+\N{{MINUS SIGN}}])?{_SPACE}*
    (?P<digits>\d{{1,3}}(?:(?:,|\{{,\}}|,\\!)\d{{3}})+(?!\d)|\d+)?
    (?P<fraction>\.\d+)?(?<=\d)
"""
_OPEN = rf"""
    (?:{_SPACE}|[*_`"'(\[{{:=]|\\[(\[]|\$(?=[$\\(*])|\$(?=-?\d[\d,.]*\$)
      |\\(?:boxed|fbox|text|textbf|mathbf|mathrm|bf)\b\{{?
      |\b(?:the|final|answer|result|is)\b)*
"""
_CLOSE = rf"(?:{_SPACE}|[*_`\"')\]}}.,;:$€£]|\\[)\]%,;]|%|°|\\\\|\\text\{{|\\(?=\$))*"
_L = r"[^\W\d_²³¹]"
_WORD = rf"(?:{_L}+(?:['’.-]{_L}+)*\.?(?:\^?\{{?[23]\}}?(?![\w.])|[²³])?)"
_PLAIN = re.compile(r" ?(-?\d{1,100})[ \t]*(?:\n|\Z)", re.ASCII)
"""What most answers are, without the rest of the grammar."""
_MARK = re.compile(r"\#{4}(?!\#)")
_ANSWER = re.compile(
    rf"""
    (?:{_SPACE}*\n(?={_OPEN}[-$]?[\d.,]+\W*$))?
    {_OPEN}{_NUMBER}(?P<glued>[A-Za-z]?)(?P<rest>[^\n]*)
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
_REST = re.compile(rf"{_CLOSE}(?:[-–—/(]?{_SPACE}*{_WORD}{_CLOSE})*(?:\#+)?{_SPACE}*", re.VERBOSE)
_LETTERS = re.compile(rf"{_L}+")
_EXACT = re.compile(_NUMBER + r"\.?", re.VERBOSE)
_NO_UNITS = words(
    """or to st nd rd th plus minus times divided over half quarter third thirds hundred hundreds
    thousand thousands million millions billion billions trillion dozen dozens x y z n i e k pi
    sqrt frac no not wait wrong incorrect unknown unsure none nothing unclear cannot but sorry
    maybe through until between one two three four five six seven eight nine ten eleven twelve
    cdot mod squared cubed"""
)
"""Words that make another answer of the number in front of them."""


def last_answer(response: str) -> Decimal | None:
    """The number behind the last "####" of the final TAIL characters.

    None where there is no mark, or no number and nothing else behind it. A mark at the very end
    closes the line of the one before it, and a later line with a mark and words only is a
    heading, unless it takes the number back.
    """
    tail = response[-TAIL:]
    marks = [match.end() for match in _MARK.finditer(tail)]
    while marks and (
        not tail[marks[-1] :].strip() or (len(marks) > 1 and _is_heading(tail, marks))
    ):
        marks.pop()
    if not marks:
        return None
    plain = _PLAIN.match(tail, marks[-1])
    return Decimal(plain[1]) if plain else _number_at(tail, marks[-1])


def _is_heading(tail: str, marks: list[int]) -> bool:
    before, line = tail[marks[-2] : marks[-1]], tail[marks[-1] :]
    found = _LETTERS.findall(line.casefold())
    return "\n" in before and not re.search(r"\d", line) and _NO_UNITS.isdisjoint(found)


@functools.lru_cache(maxsize=4096)
def exact_number(text: str) -> Decimal:
    """The value of a text that is a number and nothing else ("1,234", "-$5.00", "42.").

    Raises:
        ValueError: it is not.
    """
    match = _EXACT.fullmatch(text.strip())
    value = _value(match) if match else None
    if value is None:
        raise ValueError(f"{text!r} is not a number")
    return value


def _number_at(text: str, at: int) -> Decimal | None:
    match = _ANSWER.match(text, at)
    if match is None:
        return None
    # A box with the same number says it once more.
    rest = (match["glued"] + match["rest"]).replace(f"\\boxed{{{match['digits']}}}", "")
    if rest and not _may_follow(rest, glued=bool(match["glued"])):
        return None
    return _value(match)


def _may_follow(rest: str, glued: bool) -> bool:
    if not _REST.fullmatch(rest):
        return False
    found = _LETTERS.findall(rest.casefold().replace("\\text", ""))
    if glued and len(found[0]) == 1 and rest[0] not in "gmlLhs":
        return False  # 12x
    return _NO_UNITS.isdisjoint(found)


def _value(match: re.Match[str]) -> Decimal | None:
    before, after = match["before"], match["after"]
    if before and after:
        return None
    digits = re.sub(r"\D", "", match["digits"] or "") or "0"
    value = Decimal(digits + (match["fraction"] or ""))
    return value if (before or after or "+") == "+" else -value
