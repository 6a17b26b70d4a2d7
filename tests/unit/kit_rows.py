"""Rows for the tests of the kit: some end well, some do not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

CHILD = "import sys, time; print('child of', *sys.argv[1:], flush=True); time.sleep(300)"


def fine(device: str, folder: Path) -> str:
    """Says where it ran."""
    return f"on {device},\nin {folder.name} | {len(list(folder.iterdir()))} files"


def fails(device: str, folder: Path) -> str:
    """Raises, after it has printed."""
    print("before")
    raise ValueError("the last line\nand one more")


def dies(device: str, folder: Path) -> str:
    """Is killed, and says nothing any more."""
    print("the last that it said\n\n", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    return ""


def hangs(device: str, folder: Path) -> str:
    """Starts a child in a session of its own; none of them ends."""
    mark = os.environ["GPG_KIT_TEST"]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, mark], start_new_session=True, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    print(child.stdout.readline().decode(), flush=True)
    time.sleep(300)
    return ""
