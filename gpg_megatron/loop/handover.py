"""Doing what placement.py decides: engines on rank 0's word, the policy on every rank."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from gpg_megatron.host.collectives import OnRank0
from gpg_megatron.observe.watchdog import Watchdog
from gpg_megatron.placement.states import Action, Load, Offload, Sleep, Wake
from gpg_megatron.policy.policy import Policy
from gpg_megatron.rollout.fleet import Fleet


class Handover:
    """Does one action after the other. Calls are collective over the policy ranks."""

    def __init__(
        self,
        fleet: Fleet | None,
        policy: Callable[[], Policy],
        on_rank0: OnRank0,
        group: dist.ProcessGroup,
        watchdog: Watchdog,
    ) -> None:
        """
        Args:
            fleet: on rank 0; None elsewhere.
            policy: this rank's, asked for when it is needed: it is built in between.
            group: of all policy ranks, on the host.
        """
        self._fleet = fleet
        self._policy = policy
        self._on_rank0 = on_rank0
        self._group = group
        self._watchdog = watchdog

    def __call__(self, action: Action) -> None:
        """Returns when the action is done on every rank and in every engine."""
        with self._watchdog.phase("placement"):
            if isinstance(action, Offload):
                self._policy().offload(action.parts)
            elif isinstance(action, Load):
                self._policy().load(action.parts)
            else:
                self._on_rank0(lambda: self._tell_engines(action))
            # An engine's worker shares its GPU with some rank, not with rank 0.
            dist.barrier(group=self._group)

    def _tell_engines(self, action: Sleep | Wake) -> None:
        assert self._fleet is not None
        if isinstance(action, Sleep):
            self._fleet.sleep(action.level)
        else:
            self._fleet.wake(action.parts)
