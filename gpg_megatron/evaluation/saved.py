"""Answers that were written to generations.jsonl or eval/step_N.jsonl, read to be scored again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from gpg_megatron.data.records import read_file
from gpg_megatron.errors import UserError
from gpg_megatron.types import Completion, FinishReason, Prompt

WITHOUT_MODE = "sampled"
"""Mode of the answers of a training run, whose lines name none."""
MAX_LENGTH = 2**24
"""Tokens of one answer."""
_KINDS: Mapping[str, type] = {
    "prompt_id": str,
    "data_source": str,
    "ground_truth": str,
    "response": str,
    "index": int,
    "length": int,
    "finish_reason": str,
}


@dataclass(slots=True)
class Answered:
    """One problem with its answers."""

    prompt: Prompt
    completions: list[Completion] = field(default_factory=list)


def read_generations(path: str | Path) -> dict[str, list[tuple[Prompt, Sequence[Completion]]]]:
    """Mode -> problems with their answers, in the order of the file. Token ids are not in it:
    those of a completion are zeros, as many as it had.

    Raises:
        UserError: the file is missing, malformed or empty, or not all problems of a mode have
            the same number of answers.
    """
    modes: dict[str, dict[str, Answered]] = {}
    for location, row in read_file(Path(path)):
        if not isinstance(row, Mapping):
            raise UserError(f"{location}: expected an object, found {type(row).__name__}")
        values = {key: _value(row, key, location) for key in _KINDS}
        problems = modes.setdefault(str(row.get("mode", WITHOUT_MODE)), {})
        found = problems.setdefault(values["prompt_id"], Answered(_prompt(values, row)))
        if found.prompt.ground_truth != values["ground_truth"]:
            raise UserError(f"{location}: another ground truth of {found.prompt.id} than before")
        found.completions.append(_completion(values, location))
    if not modes:
        raise UserError(f"{path}: the file has no rows; expected at least one answer")
    for problems in modes.values():
        _check_counts(path, list(problems.values()))
    return {
        mode: [(x.prompt, x.completions) for x in problems.values()]
        for mode, problems in modes.items()
    }


def _value(row: Mapping[str, Any], key: str, location: str) -> Any:
    value, kind = row.get(key), _KINDS[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        what = "missing" if value is None else f"a {type(value).__name__}"
        raise UserError(f"{location}: {key} is {what}; expected a line that gpg-eval has written")
    return value


def _prompt(values: Mapping[str, Any], row: Mapping[str, Any]) -> Prompt:
    messages = row.get("messages")
    return Prompt(
        id=values["prompt_id"],
        token_ids=np.zeros(0, np.int32),
        messages=tuple(messages) if isinstance(messages, list) else (),
        ground_truth=values["ground_truth"],
        data_source=values["data_source"],
        extra_info=row.get("extra_info", {}),
    )


def _completion(values: Mapping[str, Any], location: str) -> Completion:
    length, reason = values["length"], values["finish_reason"]
    if not 0 <= length <= MAX_LENGTH:
        raise UserError(f"{location}: length is {length}; expected tokens of an answer")
    if reason not in get_args(FinishReason):
        raise UserError(f"{location}: finish_reason is {reason!r}; expected stop or length")
    return Completion(
        prompt_id=values["prompt_id"],
        index=values["index"],
        token_ids=np.zeros(length, np.int32),
        logprobs=np.zeros(length, np.float32),
        finish_reason=cast(FinishReason, reason),
        text=values["response"],
        versions=(),
    )


def _check_counts(path: str | Path, problems: Sequence[Answered]) -> None:
    most = max(problems, key=lambda x: len(x.completions))
    least = min(problems, key=lambda x: len(x.completions))
    if len(most.completions) != len(least.completions):
        raise UserError(
            f"{path}: {least.prompt.id} has {len(least.completions)} answers and "
            f"{most.prompt.id} has {len(most.completions)}; expected as many to each problem"
        )
