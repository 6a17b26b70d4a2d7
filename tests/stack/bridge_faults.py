"""One policy rank of the fault tests: publishes that fail, and what comes after them.

    torchrun ... -m tests.stack.bridge_faults JOB.json

Rank 0 writes what it saw, in order: {"what", "seconds", "error", ...}.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpg_megatron.bridge.sender import Message
from gpg_megatron.host.device import init_process_group, set_threads
from tests.engine_processes import engine_processes
from tests.stack.bridge_ranks import COLLECTIVE_LIMIT_S, Fleets, compare, configuration

# Bucket and time limits far below the defaults: a tiny model still needs many buckets.
BRIDGE_LIMIT_S = 10
LATE_S = 1.5


class Faults:
    """The policy, the bridge and the notes of one rank."""

    def __init__(self, job: dict[str, Any], fleet: Fleets) -> None:
        from gpg_megatron.bridge.bridge import PolicySide, WeightBridge
        from gpg_megatron.layout.topology import policy_grid
        from gpg_megatron.model.shape import load_model_shape
        from gpg_megatron.policy.policy import Policy

        self.fleet = fleet
        self.job = job
        self.notes: list[dict[str, Any]] = []
        self.version = 0
        config = configuration(job, {"tensor_model_parallel_size": dist.get_world_size()})
        self.shape = load_model_shape(config.model.path)
        self.policy = Policy(config, self.shape, "cpu")
        side = PolicySide(
            shards=self.policy.named_shards(),
            model=self.shape,
            grid=policy_grid(config.policy, self.shape),
            rank=dist.get_rank(),
        )
        world = dist.group.WORLD
        assert world is not None
        self.bridge = WeightBridge(
            side,
            fleet.fleet,
            config.bridge,
            wire_dtype=torch.float32,
            run_id=job["run_id"],
            group=world,
        )

    def note(self, what: str, action: Callable[[], Any]) -> None:
        """Run on every rank; rank 0 writes down how it ended and whether the others agree."""
        begin = time.monotonic()
        error = None
        try:
            result = action()
        except (RuntimeError, TimeoutError) as failure:
            error, result = f"{type(failure).__name__}: {failure}", None
        seconds = time.monotonic() - begin
        ends: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ends, (error is not None, seconds))
        self.notes.append({"what": what, "error": error, "result": result, "ends": ends})

    def publish(self, checkpoint: int) -> None:
        from gpg_megatron.layout.hf_io import load_hf

        load_hf(
            self.job["checkpoints"][checkpoint],
            self.policy.named_shards(),
            self.shape,
            self.policy.position,
        )
        self.version += 1
        self.bridge.publish(self.version)

    def gap(self) -> dict[str, Any]:
        result = compare("fault", self.version, self.policy, self.shape, self.fleet, 0, 0)
        return {"gap": result.gap, "versions": result.versions, "published": self.version}

    def ask(self, method: str, *arguments: Any) -> None:
        """Call the faulty receiver."""
        if self.fleet.fleet is not None:
            self.fleet.fleet.call_workers(method, [arguments], timeout_s=60)
        dist.barrier()

    @contextmanager
    def late(self) -> Iterator[None]:
        """The last rank holds its last bucket back until the others have nothing more to send."""
        sender = self.bridge._sender
        assert sender is not None
        pack = sender._pack

        def late(message: Message, slot: torch.Tensor, *, verify: bool) -> int:
            if message is sender._messages[-1]:
                time.sleep(LATE_S)
            return pack(message, slot, verify=verify)

        if dist.get_rank() == dist.get_world_size() - 1:
            sender._pack = late  # type: ignore[method-assign]
        yield
        sender._pack = pack  # type: ignore[method-assign]

    def kill_soon(self, delay_s: float) -> None:
        """End the engine's processes while the receiver sleeps in the middle of an update."""
        if self.fleet.fleet is None:
            return
        processes = engine_processes()
        threading.Timer(delay_s, lambda: [p.kill() for p in processes]).start()


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    set_threads(1)
    init_process_group("cpu", COLLECTIVE_LIMIT_S)
    fleet = Fleets(job)
    try:
        faults = Faults(job, fleet)
        faults.note("first", lambda: faults.publish(1))
        faults.note("first works", faults.gap)
        for kind in ("raise", "damage", "last"):
            faults.ask("fault", kind)
            with faults.late() if kind == "last" else nullcontext():
                faults.note(kind, lambda: faults.publish(0))
            faults.note(f"{kind} refuses", faults.gap)
            faults.ask("heal")
            faults.note(f"{kind} again", lambda: faults.publish(0))
            faults.note(f"{kind} mended", faults.gap)
        faults.ask("fault", "sleep", BRIDGE_LIMIT_S + 4.0)
        faults.note("sleep", lambda: faults.publish(1))
        faults.ask("heal")
        faults.note("sleep again", lambda: faults.publish(1))
        faults.note("sleep mended", faults.gap)
        faults.ask("fault", "sleep", 60.0)
        faults.kill_soon(2.0)
        faults.note("kill", lambda: faults.publish(0))
        faults.note("kill mended", faults.gap)
    finally:
        fleet.close()
    if dist.get_rank() == 0:
        Path(job["out"]).write_text(json.dumps(faults.notes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
