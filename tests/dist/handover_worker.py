"""One of two ranks that hand over: rank 1 is slow to offload, rank 0 speaks for the engines.

    torchrun ... -m tests.dist.handover_worker FOLDER

What happened when goes to FOLDER/rank<r>.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from gpg_megatron.host.collectives import on_rank0
from gpg_megatron.host.device import init_process_group
from gpg_megatron.observe.watchdog import Watchdog
from gpg_megatron.policy.on_cpu import quiet_megatron

SLOW_S = 1.0


def main() -> None:
    quiet_megatron()
    from gpg_megatron.loop.handover import Handover
    from gpg_megatron.placement.states import Placement, State

    init_process_group("cpu", 120)
    rank = dist.get_rank()
    notes: list[tuple[str, float, float]] = []

    def noted(name: str, slow: bool) -> Callable[[Any], None]:
        def call(_: Any) -> None:
            begin = time.monotonic()
            time.sleep(SLOW_S if slow else 0.0)
            notes.append((name, begin, time.monotonic()))

        return call

    policy: Any = SimpleNamespace(offload=noted("offload", rank == 1), load=noted("load", False))
    fleet: Any = SimpleNamespace(sleep=noted("sleep", True), wake=noted("wake", False))
    group = dist.group.WORLD
    assert group is not None
    with closing(Watchdog(rank=rank, limit_s=60)) as watchdog:
        handover = Handover(
            fleet if rank == 0 else None,
            lambda: policy,
            partial(on_rank0, group=group),
            group,
            watchdog,
        )
        placement = Placement("colocated", handover)
        for state in (State.POLICY, State.SYNC, State.ROLLOUT, State.POLICY):
            placement.enter(state)
        seconds = watchdog.pop_timings()["timing/placement_s"]
    path = Path(sys.argv[1]) / f"rank{rank}.json"
    path.write_text(json.dumps({"notes": notes, "seconds": seconds}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
