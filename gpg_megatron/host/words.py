"""The last words of a rank: why the run ends, for the launcher to print last."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

WORDS_FILE = "TORCHELASTIC_ERROR_FILE"
"""Torch's agent names one to each rank, and reads it when the rank has ended."""


def leave_words(reason: str) -> None:
    """One line."""
    if path := os.environ.get(WORDS_FILE):
        words = {"message": reason, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps(words), encoding="utf-8")


def end_with_words(reason: str) -> None:
    """From any thread, whatever the others are stuck in: this process ends at once."""
    leave_words(reason)
    os._exit(1)
