"""The scoring process: receives chunks of answers, sends one verdict for each answer.

    pool.py  -- (sys.path, scorer module) -->  worker
             <------------ "ready" -----------
             -- [(scorer, response, truth)] ->
             <------------ Verdict -----------     once per answer, in order

It runs as `python -m gpg_megatron.reward.worker FD` with a socket on FD and imports neither
torch nor Ray, so that killing and restarting one is cheap. A scorer that raises ends the
process with its traceback on stderr; the pool counts that as a crash of one answer.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import select
import signal
import sys
from multiprocessing.connection import Connection


def main(connection_fd: int) -> None:
    """Serve until the other end closes."""
    _end_with_parent(lifeline_fd=0)
    # Ctrl-C reaches the whole process group; the parent decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Connection(connection_fd) as connection:
        sys.path[:], module = connection.recv()
        scorers = importlib.import_module(module).SCORERS
        connection.send("ready")
        while True:
            try:
                chunk = connection.recv()
            except EOFError:
                return
            for scorer, response, ground_truth in chunk:
                connection.send(tuple(scorers[scorer](response, ground_truth)))


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
