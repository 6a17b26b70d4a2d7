"""Which way the bytes of each pair of policy rank and engine worker take: a pure table.

    distance   who holds the rectangle        bridge.transport=auto takes
    GPU        a rank on the worker's GPU     cuda_ipc
    PEER       one on a GPU that the          cuda_ipc, through peer access
               worker's GPU can read
    HOST       another one of the host        shm
    NETWORK    one of another host            nccl where both have a GPU for themselves, else gloo

Of the ranks that hold a rectangle the nearest send it. Without GPUs auto means shm on one host and
gloo between hosts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Literal

Way = Literal["shm", "gloo", "nccl", "cuda_ipc"]
Transport = Literal["auto", "shm", "gloo", "nccl", "cuda_ipc"]
Nearest = Callable[[tuple[int, ...], int, int], Sequence[int]]
"""(ranks, engine, worker) -> the positions among the ranks of those that may serve the worker."""


class Distance(IntEnum):
    """From a policy rank to an engine worker; the smaller the nearer."""

    GPU = 0
    PEER = 1
    HOST = 2
    NETWORK = 3


REACH = {"cuda_ipc": Distance.PEER, "shm": Distance.HOST}
"""How far a way goes; the others go everywhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where a policy rank or an engine worker computes."""

    host: str
    """Equal for processes that share memory."""
    gpu: str | None = None
    """UUID; None: on the CPU."""
    peers: frozenset[str] = frozenset()
    """Other GPUs whose memory this one may read, as far as its process sees them."""


def everyone(ranks: tuple[int, ...], engine: int, worker: int) -> Sequence[int]:
    """Nearest where all are equally near."""
    return range(len(ranks))


@dataclass(frozen=True, kw_only=True)
class Links:
    """The ways between all ranks and all workers. Every rank and every worker has the same."""

    transport: Transport
    ranks: tuple[Seat, ...]
    workers: tuple[Seat, ...]
    """Worker w of engine e is receiver e * n_workers + w."""
    n_workers: int
    """Of one engine."""

    def distance(self, rank: int, receiver: int) -> Distance:
        """Of a pair."""
        a, b = self.ranks[rank], self.workers[receiver]
        if a.host != b.host:
            return Distance.NETWORK
        if a.gpu is None or b.gpu is None:
            return Distance.HOST
        if a.gpu == b.gpu:
            return Distance.GPU
        return Distance.PEER if a.gpu in b.peers else Distance.HOST

    def way(self, rank: int, receiver: int, distance: Distance | None = None) -> Way:
        """Of a pair. distance: theirs, where it is known."""
        if self.transport != "auto":
            return self.transport
        if distance is None:
            distance = self.distance(rank, receiver)
        if distance <= Distance.PEER:
            return "cuda_ipc"
        if distance == Distance.HOST:
            return "shm"
        # NCCL's kernels of two processes on one GPU would wait for each other's time slices.
        a, b = self.ranks[rank].gpu, self.workers[receiver].gpu
        alone = None not in (a, b) and not {a, b} & self._shared
        return "nccl" if alone else "gloo"

    def nearest(self, ranks: tuple[int, ...], engine: int, worker: int) -> tuple[int, ...]:
        """The positions of those ranks to which no other is nearer."""
        receiver = engine * self.n_workers + worker
        by_host = self._by_host
        if ranks not in by_host:
            found: dict[str, list[int]] = defaultdict(list)
            for i, rank in enumerate(ranks):
                found[self.ranks[rank].host].append(i)
            by_host[ranks] = {host: tuple(positions) for host, positions in found.items()}
        # Those on its host are nearer than all others, of whom there may be a thousand.
        here = by_host[ranks].get(self.workers[receiver].host)
        if here is None:
            return tuple(range(len(ranks)))
        distances = [self.distance(ranks[i], receiver) for i in here]
        least = min(distances)
        return tuple(i for i, distance in zip(here, distances, strict=True) if distance == least)

    def unreachable(self, pairs: Iterable[tuple[int, int]]) -> str | None:
        """Why the configured transport cannot serve these (rank, receiver); None: it can."""
        reach = REACH.get(self.transport, Distance.NETWORK)
        for rank, receiver in pairs:
            if self.distance(rank, receiver) > reach:
                engine, worker = divmod(receiver, self.n_workers)
                what = "GPU" if reach == Distance.PEER else "host"
                return (
                    f"bridge.transport={self.transport}: policy rank {rank} and worker {worker} of "
                    f"engine {engine} have no {what} in common; expected auto"
                )
        return None

    @cached_property
    def _by_host(self) -> dict[tuple[int, ...], dict[str, tuple[int, ...]]]:
        """Ranks -> host -> positions among them."""
        return {}

    @cached_property
    def _shared(self) -> set[str | None]:
        """GPUs that have both a rank and a worker."""
        return {seat.gpu for seat in self.ranks} & {seat.gpu for seat in self.workers}
