"""What a person is told: the error that the user can mend, and the exit codes of commands."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol


class UserError(ValueError):
    """Bad input or configuration.

    The message is a single line that says what is wrong, where, and what would be right.
    Commands print it without a traceback and exit with code 2.
    """


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A disk that is full, or takes no file there, is one line. Raises UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


class RunError(RuntimeError):
    """A run cannot go on. The message says why: it is the last thing that is printed."""

    everywhere = False
    """Whether every rank raises one, so that rank 0 alone says it."""


def torchrun_rank() -> int | None:
    """The rank of this process among those that torchrun started; None: it is none of them.

    Some platforms set RANK and WORLD_SIZE for every process; torchrun also leaves its own mark.
    """
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


class Main(Protocol):
    """A command: its arguments, or those of the process -> its exit code."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def exit_codes(main: Main) -> Main:
    """Wrap a command: a UserError is printed as one line on stderr (by rank 0) and returns 2,
    Ctrl-C returns 130."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except UserError as error:
            if not torchrun_rank():
                print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("stopped by SIGINT", file=sys.stderr)
            return 130

    return run
