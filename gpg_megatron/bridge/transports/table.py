"""The transport of each name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpg_megatron.bridge.transports.base import Inbox, Outbox, TransportName
from gpg_megatron.bridge.transports.cuda_ipc import CudaInbox, CudaOutbox
from gpg_megatron.bridge.transports.p2p import P2PInbox, P2POutbox
from gpg_megatron.bridge.transports.shm import ShmInbox, ShmOutbox


def open_outbox(
    transport: TransportName,
    name: str,
    bucket_bytes: int,
    receivers: Sequence[int],
    timeout_s: float,
) -> Outbox:
    """The sending end of one rank; the name is unique on the host."""
    if transport == "shm":
        return ShmOutbox(name, bucket_bytes)
    if transport == "cuda_ipc":
        return CudaOutbox(name, bucket_bytes)
    return P2POutbox(bucket_bytes, receivers, backend=transport, timeout_s=timeout_s)


def open_inbox(transport: TransportName, address: Any, receiver: int) -> Inbox:
    """The receiving end for one sender, by the sender's address."""
    if transport == "shm":
        return ShmInbox(address, receiver)
    if transport == "cuda_ipc":
        return CudaInbox(address, receiver)
    return P2PInbox(address, receiver)
