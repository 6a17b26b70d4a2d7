"""Reading a run directory back."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from gpg_megatron.errors import UserError

Row = dict[str, Any]
METRICS = "metrics.jsonl"


def read_metrics(output_dir: Path) -> list[Row]:
    """The rows of metrics.jsonl, one for each step, steps ascending.

    Rows of one step that follow each other are merged. Where the step falls back (the run was
    resumed, or started again), the new rows replace those that they repeat. Damaged lines are left
    out; `damage` names them.

    Raises:
        UserError: no file, or no rows.
    """
    path = output_dir / METRICS
    rows: list[Row] = []
    for row in filter(_is_metrics, _read_jsonl(path)):
        while rows and rows[-1]["step"] > row["step"]:
            rows.pop()
        if rows and rows[-1]["step"] == row["step"]:
            rows[-1] = rows[-1] | row
        else:
            rows.append(row)
    if not rows:
        raise UserError(f"{path} has no rows: the run ended before its first step")
    return rows


def damage(output_dir: Path) -> str | None:
    """One line about the lines of metrics.jsonl that are no rows, as a machine that lost its power
    leaves them; None: there are none. Raises UserError: no file."""
    path = output_dir / METRICS
    numbers = [n for n, row in enumerate(_read_jsonl(path), start=1) if not _is_metrics(row)]
    if not numbers:
        return None
    some = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
    return f"{path}: damaged and left out: line{'s' if len(numbers) > 1 else ''} {some}"


def read_rollouts(output_dir: Path) -> dict[int, list[Row]]:
    """Step -> rows of rollouts/step_N.jsonl, for the first and the last step that has them."""
    paths = {
        int(found[1]): path
        for path in (output_dir / "rollouts").glob("step_*.jsonl")
        if (found := re.fullmatch(r"step_(\d+)", path.stem))
    }
    ends = sorted({min(paths), max(paths)}) if paths else []
    return {step: [row for row in _read_jsonl(paths[step]) if _is_row(row)] for step in ends}


def _read_jsonl(path: Path) -> list[Any]:
    """What each line holds; None: it is no JSON. Raises UserError: no file."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected the output_dir of a run")
    # Not splitlines: JSON strings may hold other line breaks than "\n". What follows the last
    # one is a line that is still being written.
    return [_parsed(line) for line in path.read_bytes().split(b"\n")[:-1]]


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # no JSON or no text; too many digits; too deep
        return None


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and type(row.get("step")) is int


def _is_metrics(row: Any) -> bool:
    """A row whose values are null or finite numbers, as the logger writes them."""
    most = sys.float_info.max
    return _is_row(row) and all(
        x is None or (isinstance(x, int | float) and abs(x) <= most) for x in row.values()
    )
