"""The scoring process: receives chunks of answers, sends one verdict for each answer.

    pool.py  -- Setup ------------------>  worker
             -- ("prepare", [scorer]) -->             imports what these scorers need
             <------- "ready" -----------
             -- ("score", [Question]) -->
             <--- Verdict or its error --             once per answer, in order

It runs as `python -m gpg_megatron.reward.worker FD` with a socket on FD and imports neither
torch nor Ray, so that killing and restarting one is cheap. Where a scorer raises, what it said is
sent in the place of the verdict; the pool counts that as a crash of one answer.
"""

from __future__ import annotations

import fcntl
import functools
import importlib
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable
from fractions import Fraction
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from gpg_megatron.errors import reason_of
from gpg_megatron.plugins import load_object
from gpg_megatron.reward import custom

OUT_OF_MEMORY = 77
"""Exit code of a process whose scorer met the memory limit."""
MAX_ANSWER = 200
"""Characters of Verdict.answer that are sent back."""


class Setup(NamedTuple):
    """What a process is told first."""

    sys_path: list[str]
    scorers_module: str
    custom_function: str | None
    """FILE.py:NAME."""
    memory_bytes: int | None
    tolerance: float
    """For the scorers of the module's TOLERANT."""


class Question(NamedTuple):
    """One answer to be judged."""

    scorer: str
    response: str
    ground_truth: str
    data_source: str
    extra_info: Any
    """The row's own; for custom functions."""


Judge = Callable[[Question], tuple[Any, ...]]


def main(connection_fd: int) -> None:
    """Serve until the other end closes."""
    _end_with_parent(lifeline_fd=0)
    # Ctrl-C reaches the whole process group; the parent decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Connection(connection_fd) as connection:
        setup = Setup(*connection.recv())
        sys.path[:] = setup.sys_path
        module = importlib.import_module(setup.scorers_module)
        limit_memory(setup.memory_bytes)
        _serve(connection, module, setup)


def _serve(connection: Connection[Any, Any], module: Any, setup: Setup) -> None:
    judges: dict[str, Judge] = {}
    while True:
        try:
            kind, content = connection.recv()
        except EOFError:
            return
        if kind == "prepare":
            for name in content:
                judges[name] = _judge(name, module, setup)
            connection.send("ready")
            continue
        for question in content:
            connection.send(_verdict(judges, Question(*question)))


def _judge(name: str, module: Any, setup: Setup) -> Judge:
    if name == "custom":
        assert setup.custom_function is not None, "checked when the configuration was loaded"
        return custom.judge(load_object(setup.custom_function, "reward.custom_function"))
    prepare = getattr(module, "PREPARE", {}).get(name)
    if prepare is not None:
        prepare()
    scorer = module.SCORERS[name]
    if setup.tolerance and name in getattr(module, "TOLERANT", ()):
        # As it was written: 0.1 is a tenth.
        scorer = functools.partial(scorer, tolerance=Fraction(repr(setup.tolerance)))
    return lambda question: scorer(question.response, question.ground_truth)


def _verdict(judges: dict[str, Judge], question: Question) -> tuple[Any, ...] | str:
    """The verdict, or the error of a scorer that raised."""
    try:
        score, accuracy, parts, answer = judges[question.scorer](question)
    except RecursionError:
        # A parser met an expression that is nested too deeply to be anybody's answer.
        return (0.0, 0.0, {"too_deep": 1.0}, None)
    except MemoryError:
        # The heap may be in any state; a new process costs less than finding out.
        os._exit(OUT_OF_MEMORY)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f" ({frame.filename}:{frame.lineno})" if frame.filename != custom.__file__ else ""
        return f"{reason_of(error)}{place}"
    return (score, accuracy, parts, None if answer is None else answer[:MAX_ANSWER])


def limit_memory(n_bytes: int | None) -> None:
    """Let allocations beyond n_bytes fail. Counted is private writable memory, not libraries."""
    if n_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))


def _end_with_parent(lifeline_fd: int) -> None:
    """Have the kernel end this process when the parent's end of the pipe closes.

    A scorer stuck in one C call (a regular expression, for example) never gives up the
    interpreter lock: no Python thread or handler could notice that the parent is gone.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(lifeline_fd, fcntl.F_GETFL)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, flags | os.O_ASYNC)
    if select.select([lifeline_fd], [], [], 0)[0]:
        sys.exit("the parent was gone before the scoring process started")


if __name__ == "__main__":
    main(int(sys.argv[1]))
