"""Transport between hosts: torch.distributed point-to-point, gloo on CPUs and NCCL on GPUs.

Each sender opens a process group of its own with the workers that it sends to (rank 0 is the
sender), so that a lost worker breaks one group and not the policy's. One thread on either side
waits in send and receive, which do not poll; it does its messages in the agreed order
(plan.agreed_order), because NCCL's kernels of one GPU may run one after the other, and two ends
that begin in different orders would wait for each other for ever.

NCCL's wait() orders streams and not the host. So a thread launches on a lane's stream, after what
packed or read the slot before, and a message counts as sent or arrived once its work is completed;
when that takes too long the group is aborted, which ends the kernels.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from gpg_megatron.bridge.transports.base import SLOTS, Expected, TransferError
from gpg_megatron.bridge.transports.lane import Event, Lane
from gpg_megatron.host.network import address_towards

Backend = Literal["gloo", "nccl"]
CLOSE_S = 5.0
WATCHDOG_S = 60
"""NCCL's own watchdog ends the whole process; it comes after our limit."""
_POLL_S = 0.0002


@dataclass(frozen=True, slots=True, kw_only=True)
class P2PAddress:
    """Where a sender's rendezvous listens, and who belongs to its group."""

    host: str
    port: int
    receivers: tuple[int, ...]
    """Receiver number of each group rank from 1 on."""
    backend: Backend
    timeout_s: float


class P2POutbox:
    """See transports.base.Outbox."""

    def __init__(
        self,
        bucket_bytes: int,
        receivers: Iterable[int],
        *,
        backend: Backend,
        timeout_s: float,
        lane: Lane | None = None,
    ) -> None:
        """Open the rendezvous; the group stands when every receiver has attached.

        Args:
            lane: with NCCL, of the sender's GPU.
        """
        host = address_towards(os.environ.get("MASTER_ADDR") or socket.gethostname())
        self._store = dist.TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
        self._address = P2PAddress(
            host=host,
            port=self._store.port,
            receivers=tuple(sorted(set(receivers))),
            backend=backend,
            timeout_s=timeout_s,
        )
        self._lane = lane
        self._slots = _slots(lane, bucket_bytes)
        self._free = [threading.Event() for _ in range(SLOTS)]
        self._posted: queue.SimpleQueue[tuple[int, int, int, Event] | None] = queue.SimpleQueue()
        self._sent = 0
        self._worker = _Worker("bridge-send", self._run, [])
        self.reset()
        self._worker.start()

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
        packed = self._lane.mark() if self._lane else None
        rank = self._address.receivers.index(receiver) + 1
        self._posted.put((index, rank, n_bytes, packed))

    def idle(self) -> bool:
        self._check()
        return all(free.is_set() for free in self._free)

    def settle(self) -> None:
        """Nothing: the store lives as long as the group."""

    def close(self) -> None:
        self._posted.put(None)
        self._worker.end()

    def _run(self, groups: list[Any]) -> None:
        group = _group(self._address, self._store, rank=0)  # waits for the receivers
        groups.append(group)
        with self._lane.own() if self._lane else nullcontext():
            while (message := self._posted.get()) is not None:
                index, rank, n_bytes, packed = message
                if self._lane:
                    self._lane.wait(packed)
                work = group.send([self._slots[index, :n_bytes]], rank, 0)
                finish(work, group, self._address, f"receiver {self._address.receivers[rank - 1]}")
                self._free[index].set()

    def _check(self) -> None:
        if self._worker.failure is not None:
            raise TransferError(f"sending to the engine workers failed: {self._worker.failure}")


class P2PInbox:
    """See transports.base.Inbox."""

    def __init__(
        self,
        addresses: Mapping[int, P2PAddress],
        receiver: int,
        bucket_bytes: int,
        lane: Lane | None = None,
    ) -> None:
        """Join the senders' groups; every worker does so in the order of the senders.

        Args:
            addresses: sorted by sender.
            lane: with NCCL, of the worker's GPU.
        """
        self._addresses = dict(addresses)
        self._lane = lane
        self._slots = _slots(lane, bucket_bytes)
        self._wanted: queue.SimpleQueue[Expected | None] = queue.SimpleQueue()
        self._arrived: queue.SimpleQueue[tuple[int, torch.Tensor]] = queue.SimpleQueue()
        # What has read a slot before: the slot can be overwritten after it.
        self._read: queue.SimpleQueue[Event] = queue.SimpleQueue()
        for _ in range(SLOTS):
            self._read.put(lane.mark() if lane else None)
        self._current: tuple[int, torch.Tensor] | None = None
        self._left = 0
        self._is_closed = False
        groups = [_join(address, receiver) for address in addresses.values()]
        self._worker = _Worker("bridge-receive", self._run, groups)
        self._worker.start()

    def start(self, expected: Sequence[Expected]) -> None:
        if self._left:
            raise TransferError(
                "an update was interrupted; process groups cannot be used again after that"
            )
        self._left = len(expected)
        for message in expected:
            self._wanted.put(message)

    def poll(self) -> tuple[int, torch.Tensor] | None:
        if self._worker.failure is not None:
            raise TransferError(f"receiving from a policy rank failed: {self._worker.failure}")
        if self._current is None and not self._arrived.empty():
            self._current = self._arrived.get()
        return self._current

    def done(self) -> None:
        self._current = None
        self._left -= 1
        self._read.put(self._lane.mark() if self._lane else None)

    def close(self) -> None:
        self._is_closed = True
        self._wanted.put(None)
        self._read.put(None)
        self._worker.end()

    def lost(self) -> None:
        """Nothing: a connection that is gone fails by itself."""

    def _run(self, groups: list[Any]) -> None:
        of = dict(zip(self._addresses, groups, strict=True))
        number = 0
        with self._lane.own() if self._lane else nullcontext():
            while (message := self._wanted.get()) is not None:
                read = self._read.get()
                if self._is_closed:
                    return
                if self._lane:
                    self._lane.wait(read)
                data = self._slots[number % SLOTS, : message.n_bytes]
                group = of[message.sender]
                work = group.recv([data], 0, 0)
                address = self._addresses[message.sender]
                finish(work, group, address, f"policy rank {message.sender}")
                self._arrived.put((message.sender, data))
                number += 1


class _Worker:
    """A thread, the groups that it uses, and what it died of."""

    def __init__(self, name: str, run: Callable[[list[Any]], None], groups: list[Any]) -> None:
        self.failure: Exception | None = None
        """Raised again by whoever asks next."""
        self._run = run
        self._groups = groups
        self._thread = threading.Thread(target=self._guarded, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Wait a little for its end; then its groups are aborted, and with them what it waits
        for."""
        self._thread.join(timeout=CLOSE_S)
        if self._thread.is_alive():
            self._abort()
        # With the last reference its connections close: who waits at the other end gives up.
        self._groups.clear()

    def _guarded(self) -> None:
        try:
            self._run(self._groups)
        except Exception as error:  # whatever it is, the run ends by it
            self.failure = error
            self._abort()

    def _abort(self) -> None:
        for group in self._groups:
            if not isinstance(group, dist.ProcessGroupGloo):  # which has no need of it
                group.abort()


def finish(work: Any, group: Any, address: P2PAddress, other: str) -> None:
    """Return when a message is through.

    Raises:
        RuntimeError: the backend's own.
        TimeoutError: NCCL's kernel has not ended within the limit; the caller must abort it.
    """
    if address.backend == "gloo":
        work.wait()
        return
    limit = time.monotonic() + address.timeout_s
    while not work.is_completed():
        if time.monotonic() > limit:
            raise TimeoutError(f"{other} did not take part within {address.timeout_s:g} s")
        time.sleep(_POLL_S)
    # Also completed when NCCL has given up.
    if (error := group.get_error().name) != "SUCCESS":
        raise RuntimeError(f"NCCL: {error} with {other}")


def _slots(lane: Lane | None, bucket_bytes: int) -> torch.Tensor:
    if lane is not None:
        return lane.slots
    return torch.empty(SLOTS, bucket_bytes, dtype=torch.uint8)


def _join(address: P2PAddress, receiver: int) -> Any:
    limit = timedelta(seconds=address.timeout_s)
    store = dist.TCPStore(address.host, address.port, is_master=False, timeout=limit)
    return _group(address, store, rank=address.receivers.index(receiver) + 1)


def _group(address: P2PAddress, store: dist.Store, *, rank: int) -> Any:
    size = len(address.receivers) + 1
    limit = timedelta(seconds=address.timeout_s)
    if address.backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, limit)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit + timedelta(seconds=WATCHDOG_S)
    return dist.ProcessGroupNCCL(store, rank, size, options)
