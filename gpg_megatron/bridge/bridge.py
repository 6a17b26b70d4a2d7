"""Publish the policy's weights to the engines. Every policy rank calls; rank 0 also controls.

attach:   workers record their loaders -> every rank plans (plan.py) -> workers connect
publish:  prepare, pause | send and receive | verify | commit(version), resume

When an engine is lost meanwhile, all attach to those that are left and publish again; the one that
replaces it comes in at a later publish. The routes are made once: all engines are alike.

policy rank:  shard --pack--> slot --transport--> engine worker --> parameter
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gpg_megatron.bridge.links import Links, Seat, Way
from gpg_megatron.bridge.plan import Destination, Route, fingerprint, make_routes, outgoing
from gpg_megatron.bridge.protocol import Connection, Engines, Pending, Update
from gpg_megatron.bridge.seats import own_seat
from gpg_megatron.bridge.sender import Message, Sender, messages_of
from gpg_megatron.bridge.state import StateTensors
from gpg_megatron.bridge.transports.base import Patience, TransferError
from gpg_megatron.config.bridge import BridgeConfig
from gpg_megatron.errors import EngineLost, UserError
from gpg_megatron.host.collectives import on_rank0
from gpg_megatron.layout.topology import (
    PolicyGrid,
    check_shards,
    held_by_policy,
    hf_shapes,
    state_names,
)
from gpg_megatron.shapes import ModelShape

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySide:
    """What one policy rank brings."""

    shards: Mapping[str, torch.Tensor]
    """Global Megatron name -> local parameter; read at every publish."""
    model: ModelShape
    grid: PolicyGrid
    rank: int


LOSS_NOTICE_S = 3.0
"""A rank may fail to send before rank 0 hears that the engine has gone."""
SETTLE_S = 10.0
"""For engines to give up an update that its senders gave up."""


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
        held = held_by_policy(model, grid)
        self._state = StateTensors(state_names(model), wire_dtype)
        self._shards = self._state.shards(shards, held)
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
        self._name = f"gpg_{run_id}_{rank}"
        self._held = self._state.held(held)
        self._hf_shapes = hf_shapes(model)
        self._limit = config.bucket_mb * 2**20 // wire_dtype.itemsize
        self._destinations: list[Sequence[Destination]] | None = None
        self._routes: list[Route] = []
        self._widths: Mapping[str, int] = {}
        self._sender: Sender | None = None
        check_shards({n: tuple(t.shape) for n, t in shards.items()}, model, grid, rank)
        device = next(iter(shards.values())).device if shards else torch.device("cpu")
        self._seats: list[Seat] = self._gather(own_seat(device))
        self._present = self._attached = -1
        """Which engines there are, and those that this rank is attached to, as renew tells them."""
        while not self._attach():
            pass

    def publish(self, version: int) -> None:
        """Write the current shards into every engine worker. Collective. An engine that is lost
        meanwhile is left out.

        Raises:
            TransferError, or an engine's own error: on rank 0, when any part of it failed. The
                engines refuse to generate until a later publish has succeeded.
            Rank0Failed: on the other ranks, with the same text.
        """
        while not self._publish(version):
            pass

    def close(self) -> None:
        """Release the outboxes."""
        if self._sender is not None:
            self._sender.close()
        self._sender = None

    def _ask(self, action: Callable[[], T]) -> tuple[T] | None:
        """What rank 0 hears from the engines; None: one of them was lost, and they are others now.
        Collective."""

        def unless_lost() -> tuple[T] | None:
            try:
                return (action(),)
            except EngineLost:
                if self._control.renew() == self._present:
                    raise  # nothing replaces it
                return None

        return on_rank0(unless_lost, self._group)

    # ---- attaching ------------------------------------------------------------------------

    def _attach(self) -> bool:
        """Connect to the engines that are there now; False: one of them was lost."""
        self._present = on_rank0(lambda: self._control.renew(), self._group)
        if self._present == self._attached:
            return True
        if self._sender is not None:
            self.close()
            dist.barrier(self._group)
            on_rank0(self._settle, self._group)
        answer = self._ask(self._ask_layouts)
        if answer is None:
            return False
        destinations, workers = answer[0]
        if not self._routes:
            self._make_routes(destinations)
        self.links = Links(
            transport=self._config.transport,
            ranks=tuple(self._seats),
            workers=tuple(workers),
            n_workers=len(destinations),
        )
        self.messages = self._plan()
        self._verified = False
        if not self._connect():
            return False
        self._attached = self._present
        return True

    def _settle(self) -> None:
        """Rank 0: no engine is busy any more with an update that was given up."""
        if self._pending is not None:
            self._pending.settle(SETTLE_S)
        self._pending = None

    def _ask_layouts(self) -> tuple[list[Sequence[Destination]], list[Seat]]:
        """The destinations of one engine's workers, and the seats of all; all engines must be
        alike, those that came later too. Of the destinations only their number is sent again."""
        request = (pickle.dumps((self._hf_shapes,)),)
        engines = self._control.call_workers(
            "bridge_layout",
            [request] * self._control.num_engines,
            timeout_s=self._config.timeout_s,
        )
        answers = [[pickle.loads(answer) for answer in engine] for engine in engines]
        wanted = [[destinations for destinations, _ in engine] for engine in answers]
        is_first = self._destinations is None
        self._destinations = self._destinations or wanted[0]
        for engine, other in enumerate(wanted):
            if other != self._destinations:
                raise ValueError(f"engine {engine} lays out its parameters unlike engine 0")
        seats = [seat for engine in answers for _, seat in engine]
        return self._destinations if is_first else [()] * len(wanted[0]), seats

    def _make_routes(self, destinations: Sequence[Sequence[Destination]]) -> None:
        wanted = [self._state.destinations(part) for part in destinations]
        self._widths = self._state.widths(destinations[0])
        self._routes = make_routes(self._held, wanted)
        digests = self._gather(fingerprint(self._routes))
        if len(set(digests)) > 1:
            raise ValueError(f"the policy ranks made different transfer plans: {digests}")

    def _plan(self) -> list[Message]:
        """What this rank sends.

        Raises:
            UserError: the configured transport does not reach a worker that it sends to.
        """
        links, rank = self.links, self._rank
        n_receivers = len(links.workers)
        n_engines = n_receivers // links.n_workers
        buckets = outgoing(self._routes, rank, n_engines, self._limit, cache(links.nearest))
        pairs = {engine * links.n_workers + w: part for (engine, w), part in buckets.items()}
        problem = links.unreachable((rank, receiver) for receiver in pairs)
        for reason in filter(None, self._gather(problem)):
            raise UserError(reason)
        ways = {receiver: links.way(rank, receiver) for receiver in pairs}
        return messages_of(rank, pairs, ways, n_receivers)

    def _connect(self) -> bool:
        """Open this rank's outboxes and have every worker attach to those that it hears from."""
        limit_s, n_workers = self._config.timeout_s, self.links.n_workers
        self._sender = sender = Sender(
            self._shards, self.messages, self._dtype, name=self._name, timeout_s=limit_s
        )
        try:
            addresses: dict[Way, dict[int, Any]] = {}
            for rank, ways in enumerate(self._gather(sender.addresses)):
                for way, address in ways.items():
                    addresses.setdefault(way, {})[rank] = address
            routes = self._routes
            connection = Connection(
                links=self.links,
                routes=[[r for r in routes if r.worker == w] for w in range(n_workers)],
                addresses=addresses,
                dtype=str(self._dtype).removeprefix("torch."),
                widths=self._widths,
                bucket_elements=self._limit,
                timeout_s=limit_s,
            )
            connected = self._ask(
                lambda: self._control.connect(pickle.dumps(connection), timeout_s=limit_s)
            )
        finally:
            sender.settle()
        return connected is not None

    # ---- one publish --------------------------------------------------------------------

    def _publish(self, version: int) -> bool:
        """Whether all engines that are there have the version now; False: one was lost."""
        if not self._attach():
            return False
        assert self._sender is not None
        self._publishes += 1
        verify = self._config.verify == "always" or (
            self._config.verify == "first" and not self._verified
        )
        self._sender.reset()
        # Receivers look into the outboxes only after all of them are reset, and nothing is put
        # there while a receiver may still be busy with an update that was given up.
        dist.barrier(self._group)
        problem = None
        if self._ask(lambda: self._begin(verify)) is None:
            return False
        patience = Patience(self._config.timeout_s, self._abort_reason)
        try:
            self._sender.send(patience, verify=verify)
            self._wait_for_all(patience)
        except TransferError as error:
            problem = f"policy rank {self._rank}: {error}"
            self._store.set(str(self._publishes), problem)
        problems = self._gather(problem)
        if self._ask(lambda: self._commit(problems, version)) is None:
            return False
        self._verified = True
        return True

    def _begin(self, verify: bool) -> None:
        """Rank 0: the engines stop, and begin to receive."""
        self._control.begin_update()
        self._pending = self._control.receive(pickle.dumps(Update(verify=verify)))

    def _commit(self, problems: Sequence[str | None], version: int) -> None:
        """Rank 0: the engines' answers, then the new version; or the first thing that failed."""
        assert self._pending is not None
        deadline = time.monotonic() + LOSS_NOTICE_S * any(problems)
        while (reason := self._pending.failure()) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if isinstance(reason, EngineLost):
            raise reason
        for problem in filter(None, (reason, *problems)):
            raise TransferError(f"publishing version {version} failed: {problem}")
        self._pending.wait(self._config.timeout_s)
        self._control.commit(version)

    def _wait_for_all(self, patience: Patience) -> None:
        """This rank has sent everything. Rank 0, which alone hears from the engines, goes on
        listening until the others have; raises TransferError when that is in vain."""
        key = f"{self._publishes} sent"
        self._store.add(key, 1)
        if self._rank == 0:
            size = dist.get_world_size(self._group)
            patience.until(
                lambda: self._store.add(key, 0) == size, "the other policy ranks to send"
            )
            self._store.delete_key(key)

    def _abort_reason(self) -> str | None:
        """Why this publish cannot succeed any more; rank 0 tells the others what it hears."""
        key = str(self._publishes)
        if self._pending is not None and (reason := self._pending.failure()):
            self._store.set(key, str(reason))
            return str(reason)
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _gather(self, value: object) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values

    @property
    def _control(self) -> Engines:
        """On rank 0."""
        assert self._engines is not None
        return self._engines
