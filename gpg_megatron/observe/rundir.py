"""Reading a run directory back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gpg_megatron.errors import UserError

Row = dict[str, Any]


def read_metrics(output_dir: Path) -> list[Row]:
    """The rows of metrics.jsonl, one for each step, steps ascending.

    Rows of one step that follow each other are merged. Where the step falls back (the run was
    resumed, or started again), the new rows replace those that they repeat.

    Raises:
        UserError: no file, no rows, or a malformed line (file and line number are named).
    """
    path = output_dir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected the output_dir of a run")
    rows: list[Row] = []
    for row in _read_jsonl(path):
        while rows and rows[-1]["step"] > row["step"]:
            rows.pop()
        if rows and rows[-1]["step"] == row["step"]:
            rows[-1] = rows[-1] | row
        else:
            rows.append(row)
    if not rows:
        raise UserError(f"{path} has no rows: the run ended before its first step")
    return rows


def read_rollouts(output_dir: Path) -> dict[int, list[Row]]:
    """Step -> rows of rollouts/step_N.jsonl, for the first and the last step that has them."""
    paths = {
        int(found[1]): path
        for path in (output_dir / "rollouts").glob("step_*.jsonl")
        if (found := re.fullmatch(r"step_(\d+)", path.stem))
    }
    ends = sorted({min(paths), max(paths)}) if paths else []
    return {step: _read_jsonl(paths[step]) for step in ends}


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    # Not splitlines: JSON strings may hold other line breaks than "\n". What follows the last
    # one is a line that is still being written.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON: {error.msg}") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f'{path}:{number}: expected an object with an integer "step"')
        rows.append(row)
    return rows
