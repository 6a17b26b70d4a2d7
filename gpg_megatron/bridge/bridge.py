"""Publish the policy's weights to the engines. Every policy rank calls; rank 0 also controls.

set-up:   workers record their loaders -> every rank plans (plan.py) -> workers connect
publish:  prepare, pause | send and receive | verify | commit(version), resume

policy rank:  shard --pack--> slot --transport--> engine worker --> parameter
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import torch
import torch.distributed as dist

from gpg_megatron.bridge.plan import (
    Bucket,
    Destination,
    Route,
    bucket_elements,
    fingerprint,
    make_routes,
    outgoing,
)
from gpg_megatron.bridge.protocol import (
    CHECKSUM_BYTES,
    Connection,
    Engines,
    Pending,
    Update,
)
from gpg_megatron.bridge.transports.base import Outbox, Patience, TransferError
from gpg_megatron.bridge.transports.table import open_outbox
from gpg_megatron.config.sections import BridgeConfig
from gpg_megatron.host.collectives import on_rank0
from gpg_megatron.layout.topology import PolicyGrid, check_shards, held_by_policy, hf_shapes
from gpg_megatron.types import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySide:
    """What one policy rank brings."""

    shards: Mapping[str, torch.Tensor]
    """Global Megatron name -> local parameter; read at every publish."""
    model: ModelShape
    grid: PolicyGrid
    rank: int


@dataclass(frozen=True, slots=True)
class _Message:
    """One bucket on its way to one worker."""

    receiver: int
    number: int
    """Among the messages of this rank to the receiver."""
    bucket: Bucket


class WeightBridge:
    """One plan, made once, and the transfers that follow it."""

    def __init__(
        self,
        policy: PolicySide,
        engines: Engines | None,
        config: BridgeConfig,
        *,
        wire_dtype: torch.dtype,
        run_id: str,
        group: dist.ProcessGroup,
    ) -> None:
        """Collective over the policy ranks.

        Args:
            engines: on rank 0, the control plane; None elsewhere.
            wire_dtype: of the elements on their way; the engines' parameter type.
            run_id: unique among the runs of a host.
            group: of all policy ranks, on the host; its limit covers what engines may take.

        Raises:
            ValueError: policy, table and engine disagree about a parameter, which is named.
        """
        shards, model, grid, rank = policy.shards, policy.model, policy.grid, policy.rank
        assert (engines is not None) == (rank == 0)
        self._shards = shards
        self._rank = rank
        self._config = config
        self._dtype = wire_dtype
        self._engines = engines
        self._pending: Pending | None = None
        self._verified = False
        self._publishes = 0
        self._group = group
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"bridge/{run_id}", store)
        check_shards({n: tuple(t.shape) for n, t in shards.items()}, model, grid, rank)
        destinations, n_engines = on_rank0(lambda: self._ask_layouts(model), self._group)
        limit = config.bucket_mb * 2**20 // wire_dtype.itemsize
        routes = make_routes(held_by_policy(model, grid), destinations)
        digests = self._gather(fingerprint(routes))
        if len(set(digests)) > 1:
            raise ValueError(f"the policy ranks made different transfer plans: {digests}")
        n_workers = len(destinations)
        pairs = outgoing(routes, rank, n_engines, limit)
        self._messages = _interleaved(
            [
                [_Message(engine * n_workers + worker, i, b) for i, b in enumerate(buckets)]
                for (engine, worker), buckets in pairs.items()
            ],
            first=rank,
        )
        self._connect(run_id, routes, n_workers, limit)

    def publish(self, version: int) -> None:
        """Write the current shards into every engine worker. Collective.

        Raises:
            TransferError, or an engine's own error: on rank 0, when any part of it failed. The
                engines refuse to generate until a later publish has succeeded.
            Rank0Failed: on the other ranks, with the same text.
        """
        self._publishes += 1
        verify = self._config.verify == "always" or (
            self._config.verify == "first" and not self._verified
        )
        if self._outbox is not None:
            self._outbox.reset()
        # Receivers look into the outboxes only after all of them are reset, and nothing is put
        # there while a receiver may still be busy with an update that was given up.
        dist.barrier(self._group)
        on_rank0(lambda: self._begin(verify), self._group)
        problem = None
        try:
            self._send(verify=verify)
        except TransferError as error:
            problem = f"policy rank {self._rank}: {error}"
        problems = self._gather(problem)
        on_rank0(lambda: self._commit(problems, version), self._group)
        self._verified = True

    def close(self) -> None:
        """Release the outbox."""
        if self._outbox is not None:
            self._outbox.close()

    @property
    def _control(self) -> Engines:
        """On rank 0."""
        assert self._engines is not None
        return self._engines

    # ---- set-up -------------------------------------------------------------------------

    def _ask_layouts(self, model: ModelShape) -> tuple[list[Sequence[Destination]], int]:
        """The destinations of one engine's workers; all engines must be alike."""
        n_engines = self._control.num_engines
        request = (pickle.dumps((hf_shapes(model),)),)
        answers = self._control.call_workers(
            "bridge_layout", [request] * n_engines, timeout_s=self._config.timeout_s
        )
        wanted = [[pickle.loads(answer) for answer in engine] for engine in answers]
        for engine, other in enumerate(wanted):
            if other != wanted[0]:
                raise ValueError(f"engine {engine} lays out its parameters unlike engine 0")
        return wanted[0], n_engines

    def _connect(self, run_id: str, routes: Sequence[Route], n_workers: int, limit: int) -> None:
        """Open this rank's outbox and have every worker attach to those that it hears from."""
        limit_s = self._config.timeout_s
        largest = max((bucket_elements(m.bucket) for m in self._messages), default=0)
        self._outbox: Outbox | None = None
        if largest:
            size = largest * self._dtype.itemsize + CHECKSUM_BYTES
            size += -size % 64  # slots begin where every element type may begin
            self._outbox = open_outbox(
                self._config.transport,
                f"gpg_{run_id}_{self._rank}",
                size,
                [m.receiver for m in self._messages],
                limit_s,
            )
        try:
            address = self._outbox.address() if self._outbox else None
            addresses = {r: a for r, a in enumerate(self._gather(address)) if a is not None}
            connection = Connection(
                n_workers=n_workers,
                routes=[[r for r in routes if r.worker == w] for w in range(n_workers)],
                addresses=addresses,
                transport=self._config.transport,
                dtype=str(self._dtype).removeprefix("torch."),
                bucket_elements=limit,
                timeout_s=limit_s,
            )
            on_rank0(
                lambda: self._control.connect(pickle.dumps(connection), timeout_s=limit_s),
                self._group,
            )
        finally:
            if self._outbox is not None:
                self._outbox.settle()

    # ---- one publish --------------------------------------------------------------------

    def _begin(self, verify: bool) -> None:
        """Rank 0: the engines stop, and begin to receive."""
        self._control.begin_update()
        self._pending = self._control.receive(pickle.dumps(Update(verify=verify)))

    @torch.no_grad()
    def _send(self, *, verify: bool) -> None:
        if self._outbox is None:
            return
        patience = Patience(self._config.timeout_s, self._abort_reason)
        for message in self._messages:
            slot = patience.until(
                self._outbox.slot, f"engine worker {message.receiver} to read a bucket"
            )
            n_bytes = self._pack(message, slot, verify=verify)
            self._outbox.post(message.receiver, n_bytes)
        patience.until(self._outbox.idle, "the engine workers to read the last buckets")

    def _pack(self, message: _Message, slot: torch.Tensor, *, verify: bool) -> int:
        """Fill a slot; returns the bytes to send, checksum included."""
        n_bytes = bucket_elements(message.bucket) * self._dtype.itemsize
        flat = slot[:n_bytes].view(self._dtype)
        for move in message.bucket:
            part = flat[move.offset : move.offset + move.numel].view(move.source_box.shape)
            part.copy_(self._shards[move.parameter][move.source_box.slices])
        if verify:
            checksum = zlib.crc32(slot[:n_bytes].cpu().numpy().data, message.number)
            slot[n_bytes : n_bytes + CHECKSUM_BYTES].view(torch.int64).fill_(checksum)
        return n_bytes + CHECKSUM_BYTES

    def _commit(self, problems: Sequence[str | None], version: int) -> None:
        """Rank 0: the engines' answers, then the new version; or the first thing that failed."""
        assert self._pending is not None
        if reason := self._pending.failure():
            raise TransferError(f"publishing version {version} failed: {reason}")
        for problem in filter(None, problems):
            raise TransferError(f"publishing version {version} failed: {problem}")
        self._pending.wait(self._config.timeout_s)
        self._control.commit(version)

    def _abort_reason(self) -> str | None:
        """Why this publish cannot succeed any more; rank 0 tells the others what it hears."""
        key = str(self._publishes)
        if self._pending is not None and (reason := self._pending.failure()):
            self._store.set(key, reason)
            return reason
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _gather(self, value: object) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values


def _interleaved(queues: Sequence[Sequence[_Message]], first: int) -> list[_Message]:
    """One message of each queue in turn. Ranks begin at different queues, so that they do not
    all send to the same worker."""
    start = first % len(queues) if queues else 0
    turns = zip_longest(*queues[start:], *queues[:start])
    return [message for message in chain.from_iterable(turns) if message is not None]
