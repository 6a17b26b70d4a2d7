"""One run at a time in a directory.

The kernel holds the lock of a process, and lets it go however the process ends: nobody has to
remove the file, which stays and names its last owner.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from gpg_megatron.errors import UserError

LOCK = "lock"


@contextmanager
def locked(directory: str | Path) -> Iterator[None]:
    """Hold a directory, made when absent, while the body runs.

    Raises:
        UserError: another run holds it, or it cannot be written.
    """
    path = Path(directory) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    with file:
        _take(file, path)
        file.truncate(0)
        file.write(f"host {os.uname().nodename}, process {os.getpid()}\n")
        file.flush()
        yield


def check_free(directory: str | Path) -> None:
    """Raises UserError: a run holds the directory. Writes nothing."""
    path = Path(directory) / LOCK
    if path.exists():
        with path.open("r+", encoding="utf-8") as file:
            _take(file, path)


def _take(file: TextIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise UserError(
            f"trainer.output_dir {path.parent} is in use by {owner}; expected another directory, "
            "or to wait for its end"
        ) from None
