"""Leaving in order: a request that rank 0 reads between two steps.

launcher (first SIGTERM, SIGUSR1 or Ctrl-C), a batch script, a person --> output_dir/stop
rank 0 between two steps: is it there, or are trainer.max_hours over? --> save and leave
"""

from __future__ import annotations

import os
import time
from pathlib import Path

STOP_FILE = "stop"
BEGAN_VARIABLE = "GPG_BEGAN"
"""Seconds since 1970 when the launcher began: restarts do not count anew."""
_HOUR_S = 3600.0


def ask_to_leave(output_dir: str | Path, reason: str) -> None:
    """Write the request."""
    path = Path(output_dir) / STOP_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{reason}\n", encoding="utf-8")


def forget_request(output_dir: str | Path) -> None:
    """A request that was met, or was made to a run before."""
    (Path(output_dir) / STOP_FILE).unlink(missing_ok=True)


class LeaveRequest:
    """What rank 0 asks between two steps."""

    def __init__(self, output_dir: str | Path, max_hours: float | None) -> None:
        """max_hours: since the launcher began, or else since now; None: no limit."""
        self._path = Path(output_dir) / STOP_FILE
        self._max_hours = max_hours
        self._began = float(os.environ.get(BEGAN_VARIABLE) or time.time())

    def __call__(self) -> str:
        """Why the run is to leave; empty: it is not."""
        if self._path.exists():
            written = self._path.read_text(encoding="utf-8", errors="replace").strip()
            return written.partition("\n")[0] or f"{self._path} is there"
        if self._max_hours is not None and time.time() - self._began > self._max_hours * _HOUR_S:
            return f"trainer.max_hours={self._max_hours:g} are over"
        return ""
