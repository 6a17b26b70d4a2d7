"""Which cores a process of the run may use.

launcher    all that it was given
ranks       those of their GPU's NUMA node, where the host has several and numactl
engines     all of the launcher's again: their GPUs are others than rank 0's
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NODES = Path("/sys/devices/system/node")


def can_bind(nodes: Path = NODES) -> bool:
    """Whether ranks gain from being bound, and can be: torch does it through numactl."""
    return len(list(nodes.glob("node[0-9]*"))) > 1 and shutil.which("numactl") is not None


def host_cores() -> set[int]:
    """Those of the run on this host: under torchrun its agent's, who binds its ranks alone."""
    return os.sched_getaffinity(os.getppid() if "LOCAL_RANK" in os.environ else 0)


def threads_of_rank() -> int:
    """An equal share of the host's cores among its ranks, at most what this one is bound to."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(len(host_cores()) // ranks, len(os.sched_getaffinity(0))))


@contextmanager
def on_all_cores() -> Iterator[None]:
    """Processes that this thread starts meanwhile may use all cores of the host."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, host_cores())
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)
