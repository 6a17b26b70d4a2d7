"""Two slots on a GPU, and a stream beside the caller's that fills or empties them.

    sender     pack into a slot --copy--> registered host memory
    worker     registered host memory, or another process's slot --copy--> a slot, then scatter

A copy begins after what the caller's stream was given before it; the event that it returns tells
the host when it has ended. So the caller's own kernels never wait for a copy on the host.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from gpg_megatron.bridge.transports.base import SLOTS

_ALREADY_REGISTERED = 712
"""Of CUDA's error codes."""

Event = Any
"""torch.cuda.Event, which has no types."""


class Lane:
    """See the file's head. Belongs to one thread, except for own and wait."""

    def __init__(self, n_bytes: int, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)
        self.slots = torch.empty(SLOTS, n_bytes, dtype=torch.uint8, device=device)
        # Whoever had this memory before may still be using it.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> Event:
        """Begin copying between tensors of one shape; returns when it will have ended."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def mark(self) -> Event:
        """When the caller's stream will have done what it was given so far."""
        return torch.cuda.current_stream(self._device).record_event()

    def wait(self, event: Event) -> None:
        """The lane's stream goes on after an event."""
        self._stream.wait_event(event)

    @contextmanager
    def own(self) -> Iterator[None]:
        """Within, this thread launches on the lane's stream."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield


def lane_on(device: torch.device, n_bytes: int) -> Lane | None:
    """None on the CPU, which needs none."""
    return Lane(n_bytes, device) if device.type == "cuda" else None


def register(memory: torch.Tensor) -> bool:
    """Page-lock host memory, so that a GPU reads and writes it by itself while kernels run; False,
    and a warning, where the host does not allow it: then copies are right and slow.

    Raises:
        RuntimeError: CUDA still knows other memory at these addresses, and would copy that.
    """
    code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if not code:
        return True
    if code == _ALREADY_REGISTERED:
        raise RuntimeError("memory at these addresses was freed while it was still page-locked")
    print(
        f"warning: the bridge cannot page-lock {memory.nbytes >> 20} MiB of shared memory (CUDA "
        f"error {code}); publishing will be slower",
        file=sys.stderr,
    )
    # The failed call leaves its code for whoever launches next.
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")
    return False


def unregister(address: int) -> None:
    """After register has answered True, before the memory goes."""
    torch.cuda.cudart().cudaHostUnregister(address)
