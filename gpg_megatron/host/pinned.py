"""Host memory that a GPU copies into without a detour: pinned, in pieces of 1 GiB.

torch's allocator rounds each pinned allocation up to a power of two, so that many tensors of any
size take up to twice their bytes. Packed one behind the other into pieces that are powers of two
themselves, only the last piece is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpg_megatron.host.device import Device

PIECE_BYTES = 1 << 30


def piece_sizes(n_bytes: int) -> list[int]:
    """The pieces that hold so many bytes."""
    whole, rest = divmod(n_bytes, PIECE_BYTES)
    return [PIECE_BYTES] * whole + [rest] * (rest > 0)


def pinned_bytes(n_bytes: int) -> int:
    """What pinning the pieces takes of the host's memory."""
    return sum(1 << (size - 1).bit_length() for size in piece_sizes(n_bytes))


def host_piece(n_bytes: int, device: Device) -> torch.Tensor:
    """Uninitialised, uint8 [n_bytes]; pinned where there is a GPU to copy from."""
    return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=device == "cuda")


class HostBuffer:
    """So many bytes in pieces."""

    def __init__(self, n_bytes: int, device: Device) -> None:
        self.n_bytes = n_bytes
        self._pieces = [host_piece(size, device) for size in piece_sizes(n_bytes)]

    def views(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """The bytes [start, stop), piece by piece."""
        while start < stop:
            number, offset = divmod(start, PIECE_BYTES)
            view = self._pieces[number][offset : offset + stop - start]
            yield view
            start += len(view)
