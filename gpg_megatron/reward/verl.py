"""The verdicts of verl's own scorers for GSM8K and MATH, its faults included.

For comparisons with numbers that were published with verl (0.9.1); see docs/rewards.md. Every
step here stands for one of verl's, in its order, because the order decides what comes out.
"""

from __future__ import annotations

import re

GSM8K_TAIL = 300
_GSM8K = re.compile(r"#### (-?[0-9.,]+)")
_BOX, _BARE_BOX = "\\boxed{", "\\boxed "


def gsm8k_equal(response: str, truth: str) -> bool:
    """The text behind the last "#### " without commas is the truth, character by character."""
    found = _GSM8K.findall(response[-GSM8K_TAIL:])
    return bool(found) and found[-1].replace(",", "") == truth


def math_equal(response: str, truth: str) -> bool:
    """The last box and the truth have one spelling after verl's rewrites."""
    boxed = _last_box(response)
    if boxed is None:
        return False
    try:
        return _rewritten(boxed) == _rewritten(truth)
    except (IndexError, _TwoUnitsError):
        return boxed == truth


class _TwoUnitsError(ValueError):
    """More than one \\text that begins with a space."""


def _last_box(text: str) -> str | None:
    if _BARE_BOX in text:
        return text.split(_BARE_BOX)[-1].split("$")[0]
    start = text.rfind("\\boxed")
    if start < 0:
        return None  # An \fbox is found, and then not opened.
    depth = 0
    for brace in re.compile("[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if brace[0] == "}" and depth == 0:
            whole = text[start : brace.end()]
            return whole[len(_BOX) : -1] if whole.startswith(_BOX) else None
    return None


def _rewritten(text: str) -> str:
    for old, new in (
        ("\n", ""),
        ("\\!", ""),
        ("\\\\", "\\"),
        ("tfrac", "frac"),
        ("dfrac", "frac"),
        ("\\left", ""),
        ("\\right", ""),
        ("^{\\circ}", ""),
        ("^\\circ", ""),
        ("\\$", ""),
    ):
        text = text.replace(old, new)
    text = _without_unit(text).replace("\\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = _braced_fractions(_braced_roots(text).replace(" ", ""))
    return _slashed("\\frac{1}{2}" if text == "0.5" else text)


def _without_unit(text: str) -> str:
    parts = text.split("\\text{ ")
    if len(parts) > 2:
        raise _TwoUnitsError
    return parts[0]


def _braced_roots(text: str) -> str:
    head, *roots = text.split("\\sqrt")
    return head + "".join(
        "\\sqrt" + (root if root[0] == "{" else f"{{{root[0]}}}{root[1:]}") for root in roots
    )


def _braced_fractions(text: str) -> str:
    result, *fractions = text.split("\\frac")
    for fraction in fractions:
        if fraction[0] == "{":
            result += "\\frac" + fraction
            continue
        if len(fraction) < 2:
            return text
        below = fraction[1:] if fraction[1] == "{" else f"{{{fraction[1]}}}{fraction[2:]}"
        result += f"\\frac{{{fraction[0]}}}{below}"
    return result


def _slashed(text: str) -> str:
    parts = text.split("/")
    if len(parts) != 2:
        return text
    try:
        above, below = int(parts[0]), int(parts[1])
    except ValueError:
        return text
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text
