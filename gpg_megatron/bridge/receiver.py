"""The receiving end of one engine worker; knows no engine.

    receive: buckets from all senders, in any order of senders
        --> each rectangle into its strided view of a parameter (Target)

What is written and how it takes effect is the target's business: install.py for vLLM's models.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Protocol

import torch

from gpg_megatron.bridge.copies import copy_all
from gpg_megatron.bridge.links import Way
from gpg_megatron.bridge.plan import Bucket, Move, agreed_order, bucket_elements, incoming
from gpg_megatron.bridge.protocol import (
    CHECKSUM_BYTES,
    Connection,
    Update,
    checksum_place,
    slot_bytes,
)
from gpg_megatron.bridge.transports.base import Expected, Inbox, Patience, TransferError
from gpg_megatron.bridge.transports.table import open_inbox


class Target(Protocol):
    """What an update is written into."""

    @property
    def device(self) -> torch.device:
        """Of all parameters; with an index, if it is a GPU."""

    def target(self, name: str) -> torch.Tensor:
        """The tensor to write for a parameter. Valid until all of it has been written."""

    def in_place(self, name: str) -> bool:
        """Whether that is the parameter itself, and no memory is taken for the update."""

    def wrote(self, name: str, n_elements: int) -> None:
        """So many more elements of a parameter stand in its target."""


@dataclass(slots=True)
class Source:
    """One sender, as a worker sees it."""

    rank: int
    buckets: list[Bucket]
    n_read: int = 0
    """Buckets of the present update that have arrived."""


class Receiver:
    """Receives whole updates over the planned routes."""

    def __init__(self, target: Target, worker: int) -> None:
        """worker: rank within the engine."""
        self._target = target
        self._worker = worker
        self._sources: dict[int, Source] = {}
        self._inboxes: dict[Way, Inbox] = {}
        self._expected: dict[Way, list[Expected]] = {}
        self._dtype = torch.float32
        self._widths: Mapping[str, int] = {}
        self._timeout_s = 0.0

    def connect(self, connection: Connection, engine: int) -> None:
        """Attach to every sender that this worker of an engine hears from."""
        self.close()
        links = connection.links
        receiver = engine * links.n_workers + self._worker
        routes, limit = connection.routes[self._worker], connection.bucket_elements
        buckets = incoming(routes, engine, limit, cache(links.nearest))
        self._dtype = getattr(torch, connection.dtype)
        self._widths = connection.widths
        self._timeout_s = connection.timeout_s
        self._sources = {rank: Source(rank, parts) for rank, parts in buckets.items()}
        counts = {(rank, receiver): len(parts) for rank, parts in buckets.items()}
        self._expected = defaultdict(list)
        for rank, _, number in agreed_order(counts, len(links.workers)):
            size = checksum_place(self._n_bytes(buckets[rank][number])) + CHECKSUM_BYTES
            self._expected[links.way(rank, receiver)].append(Expected(rank, size))
        # Every worker opens them in the same order: a process group waits for all of its members.
        for way, expected in sorted(self._expected.items()):
            senders = sorted({message.sender for message in expected})
            addresses = {rank: connection.addresses[way][rank] for rank in senders}
            size = slot_bytes(max(message.n_bytes for message in expected))
            self._inboxes[way] = open_inbox(way, addresses, receiver, size, self._target.device)

    @torch.no_grad()
    def receive(self, update: Update) -> None:
        """Returns when everything stands in the target.

        Raises:
            TransferError: a sender is gone, has given up or is late, or with verify a bucket is
                damaged.
        """
        for source in self._sources.values():
            source.n_read = 0
        for way, inbox in self._inboxes.items():
            inbox.start(self._expected[way])
        patience = Patience(self._timeout_s, self._lost_sender)
        while waiting := [s for s in self._sources.values() if s.n_read < len(s.buckets)]:
            ranks = ", ".join(str(source.rank) for source in waiting)
            inbox, rank, data = patience.until(
                self._next_message,
                f"weights from policy ranks {ranks} (engine worker {self._worker})",
            )
            source = self._sources[rank]
            self._install(source, data, verify=update.verify)
            inbox.done()
            source.n_read += 1
        if self._target.device.type == "cuda":
            torch.cuda.synchronize(self._target.device)

    def close(self) -> None:
        """Leave the senders."""
        for inbox in self._inboxes.values():
            inbox.close()
        self._inboxes.clear()

    def _lost_sender(self) -> str | None:
        """Why no more can come, within a second or two of a sender's death."""
        for inbox in self._inboxes.values():
            if (rank := inbox.lost()) is not None:
                return f"policy rank {rank} is gone"
        return None

    def _next_message(self) -> tuple[Inbox, int, torch.Tensor] | None:
        for inbox in self._inboxes.values():
            if message := inbox.poll():
                return inbox, *message
        return None

    def _n_bytes(self, bucket: Bucket) -> int:
        return bucket_elements(bucket) * self._dtype.itemsize

    def _install(self, source: Source, data: torch.Tensor, *, verify: bool) -> None:
        """Copy the rectangles of a bucket; with verify, from what then stands in the parameters
        the sender's checksum must come out."""
        bucket = source.buckets[source.n_read]
        n_bytes = self._n_bytes(bucket)
        # What came through host memory goes to a GPU in one piece.
        flat = data[:n_bytes].view(self._dtype).to(self._target.device)
        checksum = source.n_read
        for moves in self._batches(bucket):
            views = [self._view(move) for move in moves]
            parts = [flat[m.offset : m.offset + m.numel].view(m.target.shape) for m in moves]
            copy_all(views, parts)
            for move, view in zip(moves, views, strict=True):
                if verify:
                    # Some CPU kernels keep biases in fp32.
                    checksum = zlib.crc32(_bytes_of(view.to(self._dtype)), checksum)
                name = move.target.parameter
                self._target.wrote(name, move.numel // self._widths.get(name, 1))
        if verify and checksum != int(data[checksum_place(n_bytes) :].view(torch.int64)):
            raise TransferError(
                f"bucket {source.n_read} of policy rank {source.rank} arrived damaged: its first "
                f"parameter is {bucket[0].target.parameter}"
            )

    def _batches(self, bucket: Bucket) -> Iterator[Sequence[Move]]:
        """What is copied at once: as much as there is in place; alone where memory is taken until
        a module is complete."""

        def at_once(move: Move) -> bool:
            return self._target.in_place(move.target.parameter)

        for together, moves in groupby(bucket, key=at_once):
            if together:
                yield list(moves)
            else:
                for move in moves:
                    yield [move]

    def _view(self, move: Move) -> torch.Tensor:
        to = move.target
        tensor = self._target.target(to.parameter)
        if to.parameter in self._widths:
            tensor = tensor.view(self._dtype)
        return tensor.as_strided(to.shape, to.stride, to.offset)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    contiguous = tensor.contiguous().cpu()
    return contiguous.reshape(-1).view(torch.uint8).numpy().data
