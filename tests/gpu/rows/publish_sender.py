"""A policy rank that publishes into the worker of publish_worker.py.

python -m tests.gpu.rows.publish_sender JOB
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpg_megatron.bridge.bridge import PolicySide, WeightBridge
from gpg_megatron.bridge.plan import bucket_elements
from gpg_megatron.bridge.transports.base import TransferError
from gpg_megatron.config.bridge import BridgeConfig
from gpg_megatron.host.reaper import new_run_id
from gpg_megatron.layout.boxes import Shard
from gpg_megatron.layout.families import pieces_of
from gpg_megatron.layout.topology import hf_shapes, policy_grid
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.shapes import ModelShape
from tests.gpu.rows.publish_worker import checksum
from tests.gpu.rows.sized import sized_policy
from tests.gpu.rows.world import one_rank

CONNECT_S = 60.0
N_TIMED = 3


class OneWorker:
    """An engine of one worker in another process; see bridge.protocol.Engines."""

    num_engines = 1

    def __init__(self, socket: str) -> None:
        self._reply: tuple[bool, Any] | None = None
        end = time.monotonic() + CONNECT_S
        while True:
            try:
                self._pipe = Client(socket, "AF_UNIX")
                return
            except (FileNotFoundError, ConnectionRefusedError):
                assert time.monotonic() < end, "the worker did not start"
                time.sleep(0.1)

    def ask(self, name: str, *arguments: Any, timeout_s: float = CONNECT_S) -> Any:
        """Call and wait for the answer."""
        self._pipe.send((name, *arguments))
        return self.answer(timeout_s)

    def answer(self, timeout_s: float) -> Any:
        """Of the call that was sent last."""
        self._look(timeout_s)
        if self._reply is None:
            raise TransferError(f"the worker did not answer within {timeout_s:g} s")
        (done, result), self._reply = self._reply, None
        if not done:
            raise TransferError(result)
        return result

    def _look(self, timeout_s: float) -> None:
        """Take the answer, if it comes in time."""
        if self._reply is None and self._pipe.poll(timeout_s):
            self._reply = self._pipe.recv()

    def renew(self) -> int:
        """It is always the same."""
        return 0

    def call_workers(
        self, method: str, args_per_engine: Sequence[tuple[Any, ...]], *, timeout_s: float
    ) -> list[list[Any]]:
        """Only the layout is asked for."""
        assert method == "bridge_layout"
        return [[self.ask("layout", *args_per_engine[0], timeout_s=timeout_s)]]

    def connect(self, payload: bytes, *, timeout_s: float) -> None:
        """The pickled Connection."""
        self.ask("connect", payload, timeout_s=timeout_s)

    def begin_update(self) -> None:
        """Nothing generates."""

    def receive(self, payload: bytes) -> OneWorker:
        """Let the worker receive; the call that is pending is this object."""
        self._pipe.send(("receive", payload))
        return self

    def failure(self) -> TransferError | None:
        """What it has answered instead of receiving."""
        self._look(0.0)
        return None if self._reply is None or self._reply[0] else TransferError(self._reply[1])

    def settle(self, timeout_s: float) -> None:
        """Until it has answered, whatever."""
        self._look(timeout_s)

    def wait(self, timeout_s: float) -> None:
        """Until it has received everything."""
        self.answer(timeout_s)

    def commit(self, version: int) -> None:
        """Nothing generates."""


def main() -> None:
    job = json.loads(sys.argv[1])
    said: dict[str, Any] = {}
    try:
        with one_rank(job["device"]):
            said = publish(job)
    except Exception as error:  # the row tells it, whatever it is
        said["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        Path(job["sender_out"]).write_text(json.dumps(said))


def publish(job: Mapping[str, Any]) -> dict[str, Any]:
    """Once with checksums; compared; and a few times against the clock."""
    policy, _, config = sized_policy(job["device"], Path(job["folder"]))
    shape = load_model_shape(job["folder"], need_weights=False)
    shards = policy.named_shards()
    side = PolicySide(shards=shards, model=shape, grid=policy_grid(config.policy, shape), rank=0)
    worker = OneWorker(job["socket"])
    world = dist.group.WORLD
    assert world is not None
    settings = BridgeConfig(transport=job["way"], timeout_s=int(job["timeout_s"]), bucket_mb=16)
    if job["device"] == "cpu":
        settings = BridgeConfig(transport=job["way"], timeout_s=int(job["timeout_s"]), bucket_mb=1)
    bridge = WeightBridge(
        side, worker, settings, wire_dtype=torch.bfloat16, run_id=new_run_id(), group=world
    )
    if "dies_at" in job:
        _die_at(bridge, job["dies_at"])
    bridge.publish(1)
    found, right = worker.ask("checksums"), expected(shards, shape)
    wrong = [name for name in right if found[name] != right[name]]
    assert found.keys() == right.keys() and not wrong, f"{len(wrong)} differ, first {wrong[:1]}"
    took = []
    for version in range(2, 2 + N_TIMED):
        begin = time.perf_counter()
        bridge.publish(version)
        took.append(time.perf_counter() - begin)
    n_bytes = 2 * sum(bucket_elements(message.bucket) for message in bridge.messages)
    ways = sorted({message.way for message in bridge.messages})
    bridge.close()
    return {"bytes": n_bytes, "seconds": min(took), "ways": ways, "tensors": len(right)}


def expected(shards: Mapping[str, torch.Tensor], shape: ModelShape) -> dict[str, int]:
    """Hugging Face name -> CRC-32, from the shards of one rank that has all of the model."""
    whole = {n: torch.zeros(s, dtype=torch.bfloat16) for n, s in hf_shapes(shape).items()}
    for name, tensor in shards.items():
        for piece in pieces_of(name, Shard(tuple(tensor.shape), 0, 1), shape):
            whole[piece.hf_name][piece.hf.slices] = tensor[piece.local.slices].cpu()
    return {name: checksum(tensor) for name, tensor in whole.items()}


def _die_at(bridge: Any, number: int) -> None:
    """The process ends by SIGKILL when it is about to post this bucket."""
    for outbox in bridge._sender._outboxes.values():
        posted, post = [0], outbox.post

        def counted(receiver: int, n_bytes: int, posted: Any = posted, post: Any = post) -> None:
            posted[0] += 1
            if posted[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            post(receiver, n_bytes)

        outbox.post = counted


if __name__ == "__main__":
    main()
