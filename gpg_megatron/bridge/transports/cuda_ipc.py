"""Transport between processes that see the same GPU: the slots are CUDA memory.

Headers stay in the small shared file of shm.py; what it hands around here are slots on the
device, opened by the other process through CUDA's inter-process handles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor

from gpg_megatron.bridge.transports.base import SLOTS
from gpg_megatron.bridge.transports.shm import ShmAddress, ShmInbox, ShmOutbox


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaAddress:
    """The headers' file, and how to open the slots."""

    headers: ShmAddress
    rebuild: Callable[..., torch.Tensor]
    arguments: tuple[Any, ...]


class CudaOutbox(ShmOutbox):
    """See transport.Outbox."""

    def __init__(self, name: str, bucket_bytes: int) -> None:
        super().__init__(name, 0)
        self._device_slots = torch.empty(SLOTS, bucket_bytes, dtype=torch.uint8, device="cuda")

    def address(self) -> Any:
        rebuild, arguments = reduce_tensor(self._device_slots)
        return CudaAddress(headers=super().address(), rebuild=rebuild, arguments=arguments)

    def slot(self) -> torch.Tensor | None:
        free = super().slot() is not None
        return self._device_slots[self._sent % SLOTS] if free else None

    def post(self, receiver: int, n_bytes: int) -> None:
        # The reader is told by the host, so the copies on the device must have ended.
        torch.cuda.synchronize()
        super().post(receiver, n_bytes)


class CudaInbox(ShmInbox):
    """See transport.Inbox."""

    def __init__(self, address: CudaAddress, receiver: int) -> None:
        super().__init__(address.headers, receiver)
        self._device_slots = address.rebuild(*address.arguments)

    def poll(self, n_bytes: int) -> torch.Tensor | None:
        if super().poll(0) is None:
            return None
        return self._device_slots[self._reading[1], :n_bytes]

    def done(self) -> None:
        torch.cuda.synchronize()
        super().done()
