"""What policy ranks and engine workers say to each other besides the weights themselves.

These objects cross a process boundary as pickled bytes: vLLM's own encoding knows no
dataclasses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gpg_megatron.bridge.links import Links, Way
from gpg_megatron.bridge.plan import Route
from gpg_megatron.errors import RunError

BACKEND = "gpg"
"""Name of the weight-transfer engine that is registered in vLLM."""
RECEIVER = "gpg_megatron.bridge.vllm_worker.BridgeReceiver"
"""Dotted path of the worker extension that the engines must be started with."""
CHECKSUM_BYTES = 8
"""At the end of every message, at a multiple of 8: CRC-32 of the elements before it, begun with the
number of the message among those of its sender to its receiver; an 8-byte integer."""


def checksum_place(n_bytes: int) -> int:
    """Where the checksum stands in a message whose elements take so many bytes."""
    return n_bytes + -n_bytes % CHECKSUM_BYTES


def slot_bytes(n_bytes: int) -> int:
    """Of a slot for messages of so many bytes: the next begins where every type may begin."""
    return n_bytes + -n_bytes % 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """What the workers of all engines need to receive; each picks its own routes."""

    links: Links
    routes: Sequence[Sequence[Route]]
    """For each worker."""
    addresses: Mapping[Way, Mapping[int, Any]]
    """Of each way: sending rank -> the address of its outbox."""
    dtype: str
    """Of the elements on their way, as torch spells it."""
    widths: Mapping[str, int]
    """Engine parameters that arrive bit by bit -> elements on their way for each of theirs."""
    bucket_elements: int
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One publish, as the workers hear of it."""

    verify: bool
    """Read every bucket back from the parameters and compare its checksum."""


class Pending(Protocol):
    """A call to all engines that has been sent and not answered."""

    def failure(self) -> RunError | None:
        """Why an engine failed so far, EngineLost before others; None while none has."""

    def wait(self, timeout_s: float) -> None:
        """Return when all engines have answered. Raises what they raised."""

    def settle(self, timeout_s: float) -> None:
        """Return when all engines have answered, whatever; who does not in time is lost."""


class Engines(Protocol):
    """The control plane: what the bridge asks of the engines. Given by the trainer, so that
    the bridge knows no engine. A call may raise EngineLost: if renew then tells of other engines,
    they can be asked instead."""

    @property
    def num_engines(self) -> int: ...

    def renew(self) -> int:
        """Take in engines that replace lost ones; a number that differs when they are others than
        before."""

    def call_workers(
        self, method: str, args_per_engine: Sequence[tuple[Any, ...]], *, timeout_s: float
    ) -> list[list[Any]]:
        """Call a method of the worker extension; [engine][worker]."""

    def connect(self, payload: bytes, *, timeout_s: float) -> None:
        """Give every engine the pickled Connection and its place among them."""

    def begin_update(self) -> None:
        """Stop generation and refuse it until commit: the weights are about to be a mixture."""

    def receive(self, payload: bytes) -> Pending:
        """Let all workers receive; the pickled Update."""

    def commit(self, version: int) -> None:
        """The weights are whole and have this version; generation goes on."""
