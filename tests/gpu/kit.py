"""Every row of docs/gpu-status.md that this machine allows, and the rows to paste there.

    python -m tests.gpu.kit [--rows NAME ...] [--device auto|cpu|cuda] [--json OUT]

Each row runs in a process of its own, with a time-out. All of them together end within 20 minutes.
OUT keeps what it holds of other rows and other machines, and is written after every row. Exit
code 1: a row failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpg_megatron.errors import UserError
from tests.gpu.kit_process import Outcome, Row, run_row
from tests.gpu.kit_table import ROWS
from tests.gpu.machine import Machine, ask_machine

TOTAL_LIMIT_S = 19 * 60.0
SHOWN_LINES = 20
"""Of the log of a row that failed."""
HEAD = ("| row | result | seconds |", "|---|---|---|")


def main(argv: Sequence[str] | None = None, rows: Sequence[Row] = ROWS) -> int:
    """The exit code."""
    try:
        options = _options(argv, rows)
        if options.json:
            read_results(options.json)
        machine = ask_machine(options.device)
    except UserError as error:
        print(f"kit: {error}", file=sys.stderr)
        return 2
    print(f"{machine.name}; {machine.versions}", flush=True)
    end = time.monotonic() + TOTAL_LIMIT_S
    outcomes: dict[str, Outcome] = {}
    for row in (row for row in rows if row.name in options.rows):
        outcome = run_row(row, machine, end - time.monotonic())
        outcomes[row.name] = outcome
        print(table_line(row.name, outcome), flush=True)
        if outcome.log:
            print("\n".join(f"    {line}" for line in outcome.log[-SHOWN_LINES:]), flush=True)
        if options.json:
            # Read again: another kit may have added to it.
            known = read_results(options.json)
            write_results(options.json, merged(known, result_of(row, outcome, machine)))
    given = " ".join(argv if argv is not None else sys.argv[1:])
    print(f"\n`python -m tests.gpu.kit {given}`, {machine.name}; {machine.versions}; {_today()}:\n")
    print("\n".join([*HEAD, *(table_line(name, x) for name, x in outcomes.items())]))
    return int(any(outcome.state == "failed" for outcome in outcomes.values()))


def _options(argv: Sequence[str] | None, rows: Sequence[Row]) -> argparse.Namespace:
    names = [row.name for row in rows]
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.kit",
        description=(__doc__ or "").partition("\n")[0],
        epilog="rows: " + "; ".join(f"{row.name}: {row.what}" for row in rows),
    )
    parser.add_argument("--rows", nargs="+", metavar="NAME", default=names, choices=names)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, metavar="OUT", help="results are added to this file")
    return parser.parse_args(argv)


def table_line(name: str, outcome: Outcome) -> str:
    """A row to paste."""
    return f"| `{name}` | {outcome.state}: {outcome.seen} | {outcome.seconds:.0f} |"


def result_of(row: Row, outcome: Outcome, machine: Machine) -> dict[str, Any]:
    """What the JSON file keeps of a row."""
    return {
        "row": row.name,
        "what": row.what,
        **asdict(outcome),
        "machine": machine.name,
        "versions": machine.versions,
        "day": _today(),
        "command": f"python -m tests.gpu.kit --rows {row.name} --device {machine.device}",
    }


def merged(
    known: Sequence[Mapping[str, Any]], result: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    """The results with a new one, which replaces that of the same row on the same machine."""

    def key(x: Mapping[str, Any]) -> tuple[object, object]:
        return x["row"], x["machine"]

    return [*(x for x in known if key(x) != key(result)), result]


def read_results(path: Path) -> list[Mapping[str, Any]]:
    """What an earlier run wrote; nothing where there is no file.

    Raises:
        UserError: the file holds something else, or its folder does not exist.
    """
    if not path.parent.is_dir():
        raise UserError(f"--json {path}: there is no folder {path.parent}")
    if not path.exists():
        return []
    try:
        results = json.loads(path.read_text())["rows"]
        assert all({"row", "machine"} <= result.keys() for result in results)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise UserError(f"--json {path}: not a file of the kit; expected one, or none") from None
    return list(results)


def write_results(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """In one step: a kit that is killed leaves a whole file."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps({"rows": list(results)}, indent=1) + "\n")
    os.replace(partial, path)


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


if __name__ == "__main__":
    sys.exit(main())
