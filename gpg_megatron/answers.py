"""Finding the final answer in a mathematical text. Plain string functions, linear in the text."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE = re.compile(r"\\[A-Za-z]+|[^\s${}]+")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_UNCLOSED = re.compile(r"[^\n$]{1,300}")


def last_boxed(text: str) -> str | None:
    """What the last \\boxed or \\fbox of a text holds; None without one.

    Braces are matched, also around nested ones; "\\boxed 5" without braces holds its first
    word. A box whose braces do not close holds what stands up to the end of a last line of at
    most 300 characters, otherwise nothing; the box before it is not taken. A box in a box is
    opened.
    """
    found, at = None, len(text)
    while found is None:
        at = max(text.rfind("\\boxed", 0, at), text.rfind("\\fbox", 0, at))
        if at < 0:
            return None
        found = _BOX.match(text, at)
    start = found.end()
    if text[start : start + 1] != "{":
        bare = _BARE.match(text, start)
        return bare[0] if bare else None
    end = _closing_brace(text, start)
    if end is not None:
        return text[start + 1 : end].strip()
    unclosed = _UNCLOSED.match(text, start + 1)
    return unclosed[0].strip() if unclosed and not text[unclosed.end() :].strip(" \n$.") else None


def _closing_brace(text: str, start: int) -> int | None:
    """Where the brace that opens at start closes; \\{ and \\} are letters."""
    depth = 0
    for brace in _BRACE.finditer(text, start):
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
            if depth == 0:
                return brace.start()
    return None
