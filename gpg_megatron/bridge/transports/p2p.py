"""Transport between hosts: torch.distributed point-to-point, gloo on CPUs and NCCL on GPUs.

Each sender opens a process group of its own with the workers that it sends to (rank 0 is the
sender), so that a lost worker breaks one group and not the policy's. A thread on either side
waits in send and receive, which do not poll.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from gpg_megatron.bridge.transports.base import SLOTS, TransferError
from gpg_megatron.host.network import address_towards

Backend = Literal["gloo", "nccl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class P2PAddress:
    """Where a sender's rendezvous listens, and who belongs to its group."""

    host: str
    port: int
    receivers: tuple[int, ...]
    """Receiver number of each group rank from 1 on."""
    bucket_bytes: int
    backend: Backend
    timeout_s: float


class P2POutbox:
    """See transport.Outbox."""

    def __init__(
        self, bucket_bytes: int, receivers: Sequence[int], *, backend: Backend, timeout_s: float
    ) -> None:
        """Open the rendezvous; the group stands when every receiver has attached."""
        host = address_towards(os.environ.get("MASTER_ADDR") or socket.gethostname())
        self._store = dist.TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
        self._address = P2PAddress(
            host=host,
            port=self._store.port,
            receivers=tuple(sorted(set(receivers))),
            bucket_bytes=bucket_bytes,
            backend=backend,
            timeout_s=timeout_s,
        )
        self._slots = torch.empty(SLOTS, bucket_bytes, dtype=torch.uint8, device=_device(backend))
        self._free = [threading.Event() for _ in range(SLOTS)]
        self._posted: queue.SimpleQueue[tuple[int, int, int] | None] = queue.SimpleQueue()
        self._sent = 0
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="bridge-send", daemon=True)
        self.reset()
        self._thread.start()

    def address(self) -> P2PAddress:
        return self._address

    def reset(self) -> None:
        # A group that has failed cannot be mended: the run ends, as when a rank is lost.
        self._check()
        for free in self._free:
            free.set()

    def slot(self) -> torch.Tensor | None:
        self._check()
        index = self._sent % SLOTS
        return self._slots[index] if self._free[index].is_set() else None

    def post(self, receiver: int, n_bytes: int) -> None:
        index = self._sent % SLOTS
        self._sent += 1
        self._free[index].clear()
        self._posted.put((index, self._address.receivers.index(receiver) + 1, n_bytes))

    def idle(self) -> bool:
        self._check()
        return all(free.is_set() for free in self._free)

    def settle(self) -> None:
        """Nothing: the store lives as long as the group."""

    def close(self) -> None:
        self._posted.put(None)
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        try:
            group = _group(self._address, self._store, rank=0)
            while (message := self._posted.get()) is not None:
                index, rank, n_bytes = message
                group.send([self._slots[index, :n_bytes]], rank, 0).wait()
                self._free[index].set()
        except RuntimeError as error:  # raised again by whoever asks next
            self._failure = error

    def _check(self) -> None:
        if self._failure is not None:
            raise TransferError(f"sending to the engine workers failed: {self._failure}")


class P2PInbox:
    """See transport.Inbox."""

    def __init__(self, address: P2PAddress, receiver: int) -> None:
        """Join the sender's group."""
        limit = timedelta(seconds=address.timeout_s)
        store = dist.TCPStore(address.host, address.port, is_master=False, timeout=limit)
        self._group = _group(address, store, rank=address.receivers.index(receiver) + 1)
        self._buffer = torch.empty(
            address.bucket_bytes, dtype=torch.uint8, device=_device(address.backend)
        )
        self._wanted: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._arrived = threading.Event()
        self._asked = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="bridge-receive", daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Nothing: a group in which a transfer was interrupted cannot be used again."""

    def poll(self, n_bytes: int) -> torch.Tensor | None:
        if self._failure is not None:
            raise TransferError(f"receiving from a policy rank failed: {self._failure}")
        if not self._asked:
            self._asked = True
            self._wanted.put(n_bytes)
        return self._buffer[:n_bytes] if self._arrived.is_set() else None

    def done(self) -> None:
        self._arrived.clear()
        self._asked = False

    def close(self) -> None:
        self._wanted.put(None)
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        try:
            while (n_bytes := self._wanted.get()) is not None:
                self._group.recv([self._buffer[:n_bytes]], 0, 0).wait()
                self._arrived.set()
        except RuntimeError as error:  # raised again by poll
            self._failure = error


def _group(address: P2PAddress, store: dist.Store, *, rank: int) -> Any:
    size = len(address.receivers) + 1
    limit = timedelta(seconds=address.timeout_s)
    if address.backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, limit)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    return dist.ProcessGroupNCCL(store, rank, size, options)


def _device(backend: Backend) -> str:
    return "cpu" if backend == "gloo" else "cuda"
