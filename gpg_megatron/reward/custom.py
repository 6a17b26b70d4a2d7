"""Users' reward functions.

    def compute_score(data_source, solution_str, ground_truth, extra_info=None): ...

That is verl's form, so functions that were written for it work as they are. extra_info is the
row's own. It returns a number, or a dictionary with "score", optionally "accuracy" (or "acc"),
"answer" (or "pred", for majority votes), and further numbers, which become parts: "style" is the
part "custom/style", so that no name can be taken for one of the pool's own. "format" stays
"format", which reward.weights may name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Number
from typing import Any


def judge(function: Callable[..., Any]) -> Callable[[Any], tuple[Any, ...]]:
    """The function as the worker calls it: Question -> the fields of a Verdict."""

    def judged(question: Any) -> tuple[Any, ...]:
        result = function(
            data_source=question.data_source,
            solution_str=question.response,
            ground_truth=question.ground_truth,
            extra_info=question.extra_info,
        )
        return to_verdict(result)

    return judged


def to_verdict(result: Any) -> tuple[float, float, dict[str, float], str | None]:
    """(score, accuracy, parts, answer). Accuracy is 1 from a score of 1 on, unless it is given.

    Raises:
        ValueError: not a number or such a dictionary, or a number is not finite.
    """
    fields = dict(result) if isinstance(result, Mapping) else {"score": result}
    if "score" not in fields:
        raise ValueError(f"reward.custom_function returned {result!r}; expected a score in it")
    score = _number(fields.pop("score"))
    given = [fields.pop(key) for key in ("accuracy", "acc") if key in fields]
    answers = [fields.pop(key) for key in ("answer", "pred") if key in fields]
    accuracy = float(_number(given[0]) >= 1.0) if given else float(score >= 1.0)
    parts = {
        name if name == "format" else f"custom/{name}": _number(value)
        for name, value in fields.items()
        if isinstance(_scalar(value), Number)
    }
    answer = next((str(a) for a in answers if a is not None), None)
    return score, accuracy, {"custom": score, **parts}, answer


def _scalar(value: Any) -> Any:
    """numpy's and torch's scalars as Python's own."""
    return value.item() if getattr(value, "shape", None) == () else value


def _number(value: Any) -> float:
    value = _scalar(value)
    if not isinstance(value, Number):
        raise ValueError(f"reward.custom_function returned {value!r}; expected a number")
    number = float(value)  # type: ignore[arg-type]
    if not math.isfinite(number):
        raise ValueError(f"reward.custom_function returned {number}; expected a finite number")
    return number
