"""Publish the policy's weights to the engines. Every policy rank calls; rank 0 also controls.

set-up:   workers record their loaders -> every rank plans (plan.py) -> workers connect
publish:  prepare, pause | send and receive | verify | commit(version), resume

policy rank:  shard --pack--> slot --transport--> engine worker --> parameter
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from gpg_megatron.bridge.links import Links, Seat, Way
from gpg_megatron.bridge.plan import Destination, Route, fingerprint, make_routes, outgoing
from gpg_megatron.bridge.protocol import Connection, Engines, Pending, Update
from gpg_megatron.bridge.seats import own_seat
from gpg_megatron.bridge.sender import Message, Sender, messages_of
from gpg_megatron.bridge.transports.base import Patience, TransferError
from gpg_megatron.config.bridge import BridgeConfig
from gpg_megatron.errors import UserError
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
        device = next(iter(shards.values())).device if shards else torch.device("cpu")
        seats: list[Seat] = self._gather(own_seat(device))
        destinations, workers = on_rank0(lambda: self._ask_layouts(model), self._group)
        self.links = Links(
            transport=config.transport,
            ranks=tuple(seats),
            workers=tuple(workers),
            n_workers=len(destinations),
        )
        routes = make_routes(held_by_policy(model, grid), destinations)
        digests = self._gather(fingerprint(routes))
        if len(set(digests)) > 1:
            raise ValueError(f"the policy ranks made different transfer plans: {digests}")
        limit = config.bucket_mb * 2**20 // wire_dtype.itemsize
        self.messages = self._plan(routes, limit)
        self._connect(run_id, routes, limit)

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
        self._sender.reset()
        # Receivers look into the outboxes only after all of them are reset, and nothing is put
        # there while a receiver may still be busy with an update that was given up.
        dist.barrier(self._group)
        on_rank0(lambda: self._begin(verify), self._group)
        problem = None
        patience = Patience(self._config.timeout_s, self._abort_reason)
        try:
            self._sender.send(patience, verify=verify)
        except TransferError as error:
            problem = f"policy rank {self._rank}: {error}"
        problems = self._gather(problem)
        on_rank0(lambda: self._commit(problems, version), self._group)
        self._verified = True

    def close(self) -> None:
        """Release the outboxes."""
        self._sender.close()

    @property
    def _control(self) -> Engines:
        """On rank 0."""
        assert self._engines is not None
        return self._engines

    # ---- set-up -------------------------------------------------------------------------

    def _ask_layouts(self, model: ModelShape) -> tuple[list[Sequence[Destination]], list[Seat]]:
        """The destinations of one engine's workers, and the seats of all; all engines must be
        alike."""
        request = (pickle.dumps((hf_shapes(model),)),)
        engines = self._control.call_workers(
            "bridge_layout",
            [request] * self._control.num_engines,
            timeout_s=self._config.timeout_s,
        )
        answers = [[pickle.loads(answer) for answer in engine] for engine in engines]
        wanted = [[destinations for destinations, _ in engine] for engine in answers]
        for engine, other in enumerate(wanted):
            if other != wanted[0]:
                raise ValueError(f"engine {engine} lays out its parameters unlike engine 0")
        return wanted[0], [seat for engine in answers for _, seat in engine]

    def _plan(self, routes: Sequence[Route], limit: int) -> list[Message]:
        """What this rank sends.

        Raises:
            UserError: the configured transport does not reach a worker that it sends to.
        """
        links, rank = self.links, self._rank
        n_receivers = len(links.workers)
        n_engines = n_receivers // links.n_workers
        buckets = outgoing(routes, rank, n_engines, limit, cache(links.nearest))
        pairs = {engine * links.n_workers + w: part for (engine, w), part in buckets.items()}
        problem = links.unreachable((rank, receiver) for receiver in pairs)
        for reason in filter(None, self._gather(problem)):
            raise UserError(reason)
        ways = {receiver: links.way(rank, receiver) for receiver in pairs}
        return messages_of(rank, pairs, ways, n_receivers)

    def _connect(self, run_id: str, routes: Sequence[Route], limit: int) -> None:
        """Open this rank's outboxes and have every worker attach to those that it hears from."""
        limit_s, n_workers = self._config.timeout_s, self.links.n_workers
        self._sender = Sender(
            self._shards,
            self.messages,
            self._dtype,
            name=f"gpg_{run_id}_{self._rank}",
            timeout_s=limit_s,
        )
        try:
            addresses: dict[Way, dict[int, Any]] = {}
            for rank, ways in enumerate(self._gather(self._sender.addresses)):
                for way, address in ways.items():
                    addresses.setdefault(way, {})[rank] = address
            connection = Connection(
                links=self.links,
                routes=[[r for r in routes if r.worker == w] for w in range(n_workers)],
                addresses=addresses,
                dtype=str(self._dtype).removeprefix("torch."),
                bucket_elements=limit,
                timeout_s=limit_s,
            )
            on_rank0(
                lambda: self._control.connect(pickle.dumps(connection), timeout_s=limit_s),
                self._group,
            )
        finally:
            self._sender.settle()

    # ---- one publish --------------------------------------------------------------------

    def _begin(self, verify: bool) -> None:
        """Rank 0: the engines stop, and begin to receive."""
        self._control.begin_update()
        self._pending = self._control.receive(pickle.dumps(Update(verify=verify)))

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
