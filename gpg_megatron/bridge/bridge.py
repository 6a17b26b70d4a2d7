"""Publish the policy's weights to the engines. Every policy rank calls; rank 0 also controls.

    set-up:   workers record their loaders -> all ranks compute one plan -> segments attached
    publish:  for each round: pack own bucket | barrier | workers copy | barrier

The engines' control plane is a callable given by the trainer, so this room knows no engine.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from gpg_megatron.bridge.families import pieces_of
from gpg_megatron.bridge.layout import Piece, Shard
from gpg_megatron.bridge.plan import Destination, Move, Plan, Source, make_plan
from gpg_megatron.bridge.shm import Segment
from gpg_megatron.collectives import on_rank0
from gpg_megatron.config import BridgeConfig
from gpg_megatron.types import ModelShape, ParallelPosition

CallWorkers = Callable[[str, Sequence[tuple[bytes]]], list[list[bytes]]]
"""(method, pickled arguments for each engine) -> pickled result[engine][worker rank]."""

RECEIVER = "gpg_megatron.bridge.receiver.BridgeReceiver"
"""Dotted path of the worker extension that the engines must be started with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishResult:
    """What one publish moved."""

    seconds: float
    n_bytes: int
    """Over all senders and workers."""


class WeightBridge:
    """One plan, made once, and the transfers that follow it."""

    def __init__(
        self,
        *,
        shards: Mapping[str, torch.Tensor],
        model: ModelShape,
        position: ParallelPosition,
        run_id: str,
        config: BridgeConfig,
        wire_dtype: torch.dtype,
        call_workers: CallWorkers | None,
        n_engines: int,
    ) -> None:
        """Collective over the policy ranks.

        Args:
            shards: global Megatron name -> local parameter; read at every publish.
            wire_dtype: of the elements on their way; the engines' parameter type.
            call_workers: on rank 0, how to reach the engine workers; None elsewhere.
        """
        assert (call_workers is not None) == (position.rank == 0)
        self._shards = shards
        self._rank = position.rank
        self._dtype = wire_dtype
        self._call_workers = call_workers
        self._n_engines = n_engines
        self._group = dist.new_group(timeout=timedelta(seconds=config.timeout_s), backend="gloo")
        sources = self._gather_sources(shards, model, position)
        destinations = on_rank0(lambda: self._record(_hf_shapes(sources)), self._group)
        flat = [worker for engine in destinations for worker in engine]
        item = torch.empty((), dtype=wire_dtype).element_size()
        limit = config.bucket_mb * 2**20 // item
        self._plan = make_plan(sources, flat, bucket_elements=limit)
        self._attach(run_id, [len(engine) for engine in destinations], item)

    def publish(self) -> PublishResult:
        """Write the current shards into every engine worker. Collective.

        Raises:
            RuntimeError: on every rank, when a worker failed; the engines then hold a mixture
                of versions and must not be used.
        """
        start = time.perf_counter()
        own = self._plan.buckets.get(self._rank, ())
        received = 0
        for round_index in range(self._plan.n_rounds):
            if round_index < len(own):
                self._pack(own[round_index])
            dist.barrier(self._group)
            received += on_rank0(partial(self._receive, round_index), self._group)
        assert received == self._plan.n_elements, (received, self._plan.n_elements)
        n_bytes = received * torch.empty((), dtype=self._dtype).element_size()
        return PublishResult(seconds=time.perf_counter() - start, n_bytes=n_bytes)

    def _gather_sources(
        self, shards: Mapping[str, torch.Tensor], model: ModelShape, position: ParallelPosition
    ) -> list[Source]:
        own: list[tuple[str, Piece]] = [
            (name, piece)
            for name, tensor in shards.items()
            for piece in pieces_of(
                name, Shard(tuple(tensor.shape), position.tp_rank, position.tp_size), model
            )
        ]
        everyone: list[list[tuple[str, Piece]]] = [[] for _ in range(position.world_size)]
        dist.all_gather_object(everyone, own, group=self._group)
        return [
            Source(rank, name, piece)
            for rank, pieces in enumerate(everyone)
            for name, piece in pieces
        ]

    def _record(self, shapes: Mapping[str, tuple[int, ...]]) -> list[list[list[Destination]]]:
        return self._rpc("bridge_layout", [(shapes,)] * self._n_engines)

    def _attach(self, run_id: str, workers_per_engine: Sequence[int], item: int) -> None:
        """Make this rank's segment and have every worker map all of them."""
        sizes = {
            rank: max(_end(bucket) for bucket in buckets) * item
            for rank, buckets in self._plan.buckets.items()
        }
        self._segment: Segment | None = None
        if self._rank in sizes:
            self._segment = Segment(_name(run_id, self._rank), sizes[self._rank], create=True)
        try:
            dist.barrier(self._group)
            names = {rank: (_name(run_id, rank), size) for rank, size in sizes.items()}
            on_rank0(lambda: self._send_inboxes(names, workers_per_engine), self._group)
        finally:
            if self._segment is not None:
                self._segment.unlink()

    def _send_inboxes(
        self, names: Mapping[int, tuple[str, int]], workers_per_engine: Sequence[int]
    ) -> None:
        """One call for each engine; a worker picks its own inbox by its rank in the engine."""
        arguments, first = [], 0
        for count in workers_per_engine:
            inboxes = [_inbox(self._plan, first + i) for i in range(count)]
            arguments.append((names, inboxes, str(self._dtype).removeprefix("torch.")))
            first += count
        self._rpc("bridge_attach", arguments)

    def _receive(self, round_index: int) -> int:
        counts = self._rpc("bridge_receive", [(round_index,)] * self._n_engines)
        return sum(sum(engine) for engine in counts)

    @torch.no_grad()
    def _pack(self, bucket: Sequence[Move]) -> None:
        assert self._segment is not None
        flat = self._segment.data.view(self._dtype)
        for move in bucket:
            n = move.source_box.numel
            outgoing = flat[move.offset : move.offset + n].view(move.source_box.shape)
            outgoing.copy_(self._shards[move.source][move.source_box.slices])

    def _rpc(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
        assert self._call_workers is not None
        packed = [(pickle.dumps(a),) for a in arguments]
        return [[pickle.loads(r) for r in e] for e in self._call_workers(method, packed)]


def _hf_shapes(sources: Sequence[Source]) -> dict[str, tuple[int, ...]]:
    """The full shape of every Hugging Face tensor: the hull of the pieces that ranks hold."""
    shapes: dict[str, tuple[int, ...]] = {}
    for source in sources:
        stops = tuple(stop for _, stop in source.piece.hf.ranges)
        known = shapes.get(source.piece.hf_name, stops)
        shapes[source.piece.hf_name] = tuple(map(max, known, stops))
    return shapes


def _inbox(plan: Plan, worker: int) -> dict[int, list[list[Move]]]:
    """For each sender, the moves of each of its buckets that go to one worker."""
    return {
        rank: [[move for move in bucket if move.worker == worker] for bucket in buckets]
        for rank, buckets in plan.buckets.items()
    }


def _end(bucket: Sequence[Move]) -> int:
    """Elements in a bucket."""
    return bucket[-1].offset + bucket[-1].source_box.numel


def _name(run_id: str, rank: int) -> str:
    return f"gpg_{run_id}_{rank}"
