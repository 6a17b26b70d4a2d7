"""Which cores a process of the run may use.

launcher    all that it was given
ranks       those of their GPU's NUMA node, where the host has several and numactl
engines     all of the launcher's again: their GPUs are others than rank 0's
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

NODES = Path("/sys/devices/system/node")
_POLICY, _SPINS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"


def can_bind(nodes: Path = NODES) -> bool:
    """Whether ranks gain from being bound, and can be: torch does it through numactl."""
    return len(list(nodes.glob("node[0-9]*"))) > 1 and shutil.which("numactl") is not None


def host_cores() -> set[int]:
    """Those of the run on this host: under torchrun its agent's, who binds its ranks alone."""
    return os.sched_getaffinity(os.getppid() if "LOCAL_RANK" in os.environ else 0)


def waiting_variables(environment: Mapping[str, str], *, by_turns: bool) -> dict[str, str]:
    """How OpenMP's threads wait for work in processes that share cores, beside the environment:
    asleep, since those that spin take the cores from others. Empty where the user says how.

    by_turns: engines generate while ranks wait, and never beside them. Then a thread looks some
    microseconds for work before it sleeps, as long as from one operation to the next.
    """
    if _POLICY in environment:
        return {}
    spins = {_SPINS: environment.get(_SPINS, "1000")} if by_turns else {}
    return {_POLICY: "passive"} | spins


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
