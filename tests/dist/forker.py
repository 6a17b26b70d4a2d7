"""Forks ranks from a process that has imported what they import: that takes seconds of a core, and
a rank's first save, which starts a process of its own, imports its main module once more.

    python -m tests.dist.forker

Reads a job a line from its input and answers each with a line, the exit codes of the ranks.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

IMPORTED = ("tests.dist.layout_worker", "tests.dist.checkpoint_run", "gpg_megatron.bridge.bridge")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Ranks that call the function main of a module."""

    module: str
    arguments: tuple[str, ...]
    world_size: int
    environment: dict[str, str]
    log: str
    """What the ranks print is written to its end."""
    limit_s: float

    @property
    def line(self) -> str:
        """As the forker reads it."""
        return json.dumps(asdict(self)) + "\n"


def main() -> None:
    from gpg_megatron.host.network import free_port
    from gpg_megatron.policy.on_cpu import quiet_megatron

    quiet_megatron()
    for module in IMPORTED:
        import_module(module)
    for line in sys.stdin:
        print(json.dumps(_run(Job(**json.loads(line)), free_port())), flush=True)


def _run(job: Job, port: int) -> list[int | None]:
    """The ranks' exit codes; when one has failed or time is up, the others are killed."""
    context = multiprocessing.get_context("fork")
    ranks: list[BaseProcess] = [
        context.Process(target=_live, args=(job, rank, port)) for rank in range(job.world_size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + job.limit_s
    while running := [process for process in ranks if process.exitcode is None]:
        left = deadline - time.monotonic()
        if left < 0.0 or any(process.exitcode for process in ranks):
            for process in running:
                with suppress(ProcessLookupError):
                    os.kill(process.pid or 0, signal.SIGKILL)
        wait([process.sentinel for process in running], timeout=max(left, 1.0))
    return [process.exitcode for process in ranks]


def _live(job: Job, rank: int, port: int) -> None:
    """One rank, in an environment as torchrun makes it. What ends the group of the tests' processes
    ends it too."""
    log = os.open(job.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for output in (1, 2):
        os.dup2(log, output)
    world = {"RANK": rank, "WORLD_SIZE": job.world_size, "MASTER_ADDR": "127.0.0.1"}
    local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": job.world_size, "MASTER_PORT": port}
    os.environ.clear()
    os.environ.update(job.environment | {name: str(x) for name, x in (world | local).items()})
    sys.argv = [job.module, *job.arguments]
    import_module(job.module).main()


if __name__ == "__main__":
    main()
