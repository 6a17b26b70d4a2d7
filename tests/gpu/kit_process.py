"""A row of the kit in a process of its own, with a limit: whatever it does, it costs itself alone.

Row --run_row--> a process, which may start others --> Outcome
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpg_megatron.host.reaper import RUN_ID_VARIABLE, cleanup_run, new_run_id
from tests.gpu.machine import ROOT, Machine, Need, missing

LOG_LINES = 60
State = Literal["ran", "failed", "not possible here"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of docs/gpu-status.md."""

    name: str
    what: str
    """What it shows when it has run."""
    function: str
    """MODULE:FUNCTION(device, folder) -> what was seen, in one line."""
    needs: tuple[Need, ...] = ()
    limit_s: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a row."""

    state: State
    seen: str
    """In one line: what it measured, what it failed with, or why it is not possible."""
    seconds: float = 0.0
    log: tuple[str, ...] = ()
    """The last lines of what a failed row printed."""


def run_row(row: Row, machine: Machine, left_s: float) -> Outcome:
    """Run a row to its end, or to its limit.

    Args:
        left_s: seconds that all rows still have together.
    """
    reasons = [reason for need in row.needs if (reason := missing(need, machine))]
    if reasons:
        return Outcome(state="not possible here", seen="; ".join(reasons))
    limit_s = min(row.limit_s, left_s)
    if limit_s <= 0:
        return Outcome(
            state="not possible here", seen=f"no time is left; --rows {row.name} runs it alone"
        )
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpg-kit-", ignore_cleanup_errors=True) as folder:
        code, stuck = _run(row, machine, Path(folder), limit_s)
        seconds = time.monotonic() - begin
        lines = (Path(folder) / "log").read_text(errors="replace").splitlines()
        out = Path(folder) / "out.json"
        said = json.loads(out.read_text()) if out.exists() else {}
    if code == 0 and "seen" in said:
        return Outcome(state="ran", seen=_one_line(said["seen"]), seconds=seconds)
    last = said.get("error") or next(filter(str.strip, reversed(lines)), "nothing printed")
    return Outcome(
        state="failed",
        seen=_one_line(f"{_ending(code, limit_s)}{last}{stuck}"),
        seconds=seconds,
        log=tuple(lines[-LOG_LINES:]),
    )


def _run(row: Row, machine: Machine, folder: Path, limit_s: float) -> tuple[int | None, str]:
    """The exit code, None: there was no end; and what could not even be killed."""
    run_id = new_run_id()
    own = {RUN_ID_VARIABLE: run_id, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    if machine.device == "cpu":
        own["CUDA_VISIBLE_DEVICES"] = ""
    # All ranks are here, and the host's own name need not resolve.
    own["GLOO_SOCKET_IFNAME"] = "lo"
    work = folder / "work"
    work.mkdir()
    command = [sys.executable, "-m", "tests.gpu.kit_row", row.function, machine.device]
    code, stuck = None, ""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, str(work), str(folder / "out.json")],
            cwd=ROOT,
            env=os.environ | own,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(limit_s)
        finally:
            # Ranks and engines have sessions of their own: the run's mark finds them.
            try:
                cleanup_run(run_id)
                process.wait(5)
            except (TimeoutError, subprocess.TimeoutExpired) as error:
                stuck = f"; {error}"
    return code, stuck


def _ending(code: int | None, limit_s: float) -> str:
    """How a row ended that did not say what it saw."""
    if code is None:
        return f"no end within {limit_s:.0f} s; last line: "
    return f"{signal.Signals(-code).name}; last line: " if code < 0 else ""


def _one_line(text: str) -> str:
    """For a cell of a table."""
    return " ".join(text.split()).replace("|", "/")
