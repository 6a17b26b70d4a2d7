"""The row schema, and reading and writing files of it.

A row is one problem:

    {"data_source": str,                      chooses the scorer
     "prompt": [{"role": str, "content": str}, ...],
     "ability": str,
     "reward_model": {"style": str, "ground_truth": str},
     "extra_info": {...}}                     anything; for reward functions of users

Files of this schema in parquet or jsonl are read as they are; further columns are ignored. Other
formats need a class of the user's that yields such rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gpg_megatron.data.records import Located, numbered, read_file
from gpg_megatron.errors import UserError, users_mistake
from gpg_megatron.plugins import load_object

Row = Mapping[str, Any]
_COLUMNS = ("data_source", "prompt", "reward_model")
EXACT = 2**53
"""Below it a float holds every whole number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One checked row and where it stands."""

    data_source: str
    messages: tuple[Mapping[str, str], ...]
    """Chat messages, each exactly {role, content}."""
    ground_truth: str
    extra_info: Any
    """As it stands in the row; {} where there is none."""
    location: str
    """For messages: "<file>:<line>" for jsonl, "<file>: row <n>" for parquet, from 1."""


def make_row(
    *,
    data_source: str,
    content: str,
    ability: str,
    ground_truth: str,
    extra_info: Mapping[str, Any],
    style: str = "rule",
) -> dict[str, Any]:
    """A row whose prompt is one user message."""
    return {
        "data_source": data_source,
        "prompt": [{"role": "user", "content": content}],
        "ability": ability,
        "reward_model": {"style": style, "ground_truth": ground_truth},
        "extra_info": dict(extra_info),
    }


def read_problems(path: str | Path, custom_class: str | None = None) -> list[Problem]:
    """Read and check a file of the row schema.

    Args:
        path: parquet or jsonl.
        custom_class: FILE.py:CLASS. CLASS(path) is iterated instead, whatever the file is.

    Raises:
        UserError: the file is missing, empty, unreadable or of another type, or a row does
            not follow the schema; the message names the file and the line or row.
    """
    rows = _custom(path, custom_class) if custom_class else read_file(Path(path), _COLUMNS)
    problems = [parse_row(row, location) for location, row in rows]
    if not problems:
        raise UserError(f"{path}: the file has no rows; expected at least one problem")
    return problems


def parse_row(row: Any, location: str) -> Problem:
    """Check one row. Raises UserError that begins with location."""
    if not isinstance(row, Mapping):
        raise UserError(f"{location}: expected an object, found {type(row).__name__}")
    truth = _ground_truth(_field(row, "reward_model", Mapping, location), location)
    return Problem(
        data_source=_field(row, "data_source", str, location),
        messages=_messages(row, location),
        ground_truth=truth,
        extra_info={} if (extra := row.get("extra_info")) is None else extra,
        location=location,
    )


def write_parquets(files: Mapping[Path, Sequence[Row]]) -> None:
    """Write files of rows; none gets its name before all of them are complete on disk.

    Raises:
        UserError: a folder cannot be written.
    """
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    try:
        for path, rows in files.items():
            assert rows, f"no rows for {path}"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), parts[path])
        for path, part in parts.items():
            os.replace(part, path)
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot write: {error.strerror}") from None
    finally:
        for part in parts.values():
            if part.exists():
                part.unlink()


def _custom(path: str | Path, spec: str) -> Located:
    kind = load_object(spec, "data.custom_class")
    with users_mistake(f"data.custom_class: {spec} on {path}", Exception):
        rows = list(kind(str(path)))
    return numbered(rows, f"{path}:")


def _ground_truth(reward_model: Mapping[str, Any], location: str) -> str:
    """A number of a column of floats may be a whole one: 56.0 is 56."""
    truth, key = reward_model.get("ground_truth"), "reward_model.ground_truth"
    if isinstance(truth, bool) or not isinstance(truth, (str, int, float)):
        raise UserError(f"{location}: {key} is {_kind(truth)}; expected a string")
    if isinstance(truth, str):
        return _text(truth, key, location)
    if isinstance(truth, float):
        if not math.isfinite(truth):
            raise UserError(f"{location}: {key} is {truth}; expected a string or a finite number")
        return str(int(truth) if truth.is_integer() and abs(truth) < EXACT else truth)
    with users_mistake(f"{location}: {key}", ValueError):  # of too many digits
        return str(truth)


def _messages(row: Row, location: str) -> tuple[Mapping[str, str], ...]:
    prompt = row.get("prompt")
    if not isinstance(prompt, Sequence) or isinstance(prompt, str) or not prompt:
        raise UserError(
            f"{location}: prompt is {_kind(prompt)}; "
            "expected a list of messages with role and content"
        )
    messages = []
    for index, message in enumerate(prompt):
        where = f"{location}: prompt[{index}]"
        if not isinstance(message, Mapping):
            raise UserError(f"{where} is {_kind(message)}; expected role and content")
        role, content = (_field(message, key, str, where) for key in ("role", "content"))
        messages.append({"role": role, "content": content})
    return tuple(messages)


def _field(row: Row, key: str, kind: type, location: str) -> Any:
    value = row.get(key)
    if not isinstance(value, kind):
        expected = "a string" if kind is str else "an object"
        raise UserError(f"{location}: {key} is {_kind(value)}; expected {expected}")
    return _text(str(value), key, location) if kind is str else value


def _text(text: str, key: str, location: str) -> str:
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(
            f"{location}: {key} holds a lone surrogate (\\ud800 to \\udfff), which is no text"
        )
    return text


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, (list, tuple)) and not value:
        return "an empty list"
    return {str: "a string", list: "a list", dict: "an object", bool: "a boolean"}.get(
        type(value), f"a {type(value).__name__}"
    )
