"""What a person is told: the error that the user can mend, where a library's exception becomes one,
and the exit codes of commands."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, Protocol

EXIT_STOPPED = 75
"""Of a run that left in order before its end (EX_TEMPFAIL): started again, it goes on."""
MAX_REASON = 300
"""Characters of a library's message that are quoted."""


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


def reason_of(error: BaseException) -> str:
    """A library's exception on one line: its type, and the beginning of its message."""
    text = " ".join(str(error).split())
    text = text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def users_mistake(where: str, *kinds: type[BaseException]) -> Iterator[None]:
    """A library's exception about what a user brought becomes a UserError: where, and its reason.

    Args:
        where: the file, and the row or key, that the body reads.
        kinds: the exceptions that the library raises about its input. Code and templates of
            users may raise any Exception.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{where}: {reason_of(error)}") from error


def one_line(text: str) -> str:
    """A text that quotes what a user brought, with escapes for what does not print."""
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)


class RunError(RuntimeError):
    """A run cannot go on. The message says why: it is the last thing that is printed."""

    everywhere = False
    """Whether every rank raises one, so that rank 0 alone says it."""


class EngineLost(RunError):
    """An engine has gone; where it is replaced, what was asked can be asked of the others."""


def torchrun_rank() -> int | None:
    """The rank of this process among those that torchrun started; None: it is none of them.

    Some platforms set RANK and WORLD_SIZE for every process; torchrun also leaves its own mark.
    """
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


class Interrupt(KeyboardInterrupt):
    """Ctrl-C. Where a KeyboardInterrupt of no other class has left an exec() of text, as in what
    makes a dataclass, `python -m` ends itself by SIGINT, caught or not, whatever its exit code."""


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise Interrupt


@contextmanager
def _interrupts() -> Iterator[None]:
    """Ctrl-C raises Interrupt; where it is ignored, as in a shell's background job, it stays so."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        # What has put another handler in its place has its reasons.
        if signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, handler)


class Main(Protocol):
    """A command: its arguments, or those of the process -> its exit code."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def exit_codes(main: Main) -> Main:
    """Wrap a command: a UserError is printed as one line on stderr (by rank 0) and returns 2,
    Ctrl-C returns 130."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        with _interrupts():
            try:
                return main(argv)
            except UserError as error:
                if not torchrun_rank():
                    print(f"error: {one_line(str(error))}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                print("stopped by SIGINT", file=sys.stderr)
                return 130

    return run
