"""The two ends of each way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gpg_megatron.bridge.links import Way
from gpg_megatron.bridge.transports.base import Inbox, Outbox
from gpg_megatron.bridge.transports.cuda_ipc import CudaInbox, CudaOutbox
from gpg_megatron.bridge.transports.lane import Lane, lane_on
from gpg_megatron.bridge.transports.p2p import P2PInbox, P2POutbox
from gpg_megatron.bridge.transports.shm import ShmInbox, ShmOutbox


def open_outbox(
    way: Way,
    name: str,
    bucket_bytes: int,
    receivers: Sequence[int],
    timeout_s: float,
    device: torch.device,
) -> Outbox:
    """The sending end of one rank; the name is unique on the host."""
    if way == "shm":
        return ShmOutbox(name, bucket_bytes, lane_on(device, bucket_bytes))
    if way == "cuda_ipc":
        return CudaOutbox(name, bucket_bytes, device)
    lane = Lane(bucket_bytes, device) if way == "nccl" else None
    return P2POutbox(bucket_bytes, receivers, backend=way, timeout_s=timeout_s, lane=lane)


def open_inbox(
    way: Way,
    addresses: Mapping[int, Any],
    receiver: int,
    bucket_bytes: int,
    device: torch.device,
) -> Inbox:
    """The receiving end for all senders of one way, by their addresses in the order of senders."""
    if way == "shm":
        return ShmInbox(addresses, receiver, lane_on(device, bucket_bytes))
    if way == "cuda_ipc":
        return CudaInbox(addresses, receiver, Lane(bucket_bytes, device))
    lane = Lane(bucket_bytes, device) if way == "nccl" else None
    return P2PInbox(addresses, receiver, bucket_bytes, lane)
