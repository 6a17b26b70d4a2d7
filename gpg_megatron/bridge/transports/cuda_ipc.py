"""Transport between processes on one GPU, or on GPUs that read each other's memory.

The sender's slots are CUDA memory that the worker's process maps (an inter-process handle); headers
stay in the small shared file of shm.py. The worker copies whole buckets into a lane of its own, so
that the sender goes on at once and a neighbour's memory is read in one piece.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor

from gpg_megatron.bridge.seats import gpu_uuid
from gpg_megatron.bridge.transports.base import SLOTS
from gpg_megatron.bridge.transports.lane import Event, Lane
from gpg_megatron.bridge.transports.shm import ShmAddress, ShmInbox, ShmOutbox

_EXPANDABLE = re.compile(r"(expandable_segments\s*:\s*)true", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaAddress:
    """The headers' file, and how to open the slots."""

    headers: ShmAddress
    gpu: str
    """UUID of the slots' GPU: every process counts the GPUs that it sees from 0."""
    rebuild: Callable[..., torch.Tensor]
    arguments: tuple[Any, ...]


class CudaOutbox(ShmOutbox):
    """See transports.base.Outbox."""

    def __init__(self, name: str, bucket_bytes: int, device: torch.device) -> None:
        super().__init__(name, 0)
        self._device = device
        with plain_segments():
            self._slots = torch.empty(SLOTS, bucket_bytes, dtype=torch.uint8, device=device)

    def address(self) -> Any:
        rebuild, arguments = reduce_tensor(self._slots)
        return CudaAddress(
            headers=super().address(),
            gpu=gpu_uuid(self._device),
            rebuild=rebuild,
            arguments=arguments,
        )

    def _leave(self, index: int, n_bytes: int) -> Event:
        return torch.cuda.current_stream(self._device).record_event()


class CudaInbox(ShmInbox):
    """See transports.base.Inbox."""

    def __init__(self, addresses: Mapping[int, CudaAddress], receiver: int, lane: Lane) -> None:
        headers = {sender: address.headers for sender, address in addresses.items()}
        super().__init__(headers, receiver, lane)
        device = lane.slots.device
        for number, address in addresses.items():
            self._senders[number].slots = opened(address, device)


def opened(address: CudaAddress, device: torch.device) -> torch.Tensor:
    """A sender's slots in the memory of this process's GPU.

    Memory of another GPU is mapped into this one's too, by peer access: so no context is made
    there, which would cost hundreds of MiB for each pair.
    """
    names = inspect.signature(address.rebuild).parameters
    arguments = dict(zip(names, address.arguments, strict=True))
    arguments["storage_device"] = device.index
    # The headers say when a slot may be read.
    arguments["event_sync_required"] = False
    return address.rebuild(**arguments)


@contextmanager
def plain_segments() -> Iterator[None]:
    """Within, memory is allocated as inter-process handles need it: not in expandable segments, of
    which other processes would have to be given file descriptors."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    settings = next(filter(None, map(os.environ.get, names)), "")
    plain = _EXPANDABLE.sub(r"\1False", settings)
    if plain == settings:
        yield
        return
    change: Callable[[str], None] = torch._C._accelerator_setAllocatorSettings
    change(plain)
    try:
        yield
    finally:
        change(settings)
