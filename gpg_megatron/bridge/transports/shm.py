"""Transport on one host: two slots in shared memory for each sender, and a header.

The file's name exists only until every reader has attached; after that the memory lives as
long as the processes that map it, so nothing is left behind whatever dies.

    header of slot i (64 bytes):  | message number | receiver |  (sender)  | number read | (reader)
    byte 1024:                    | resets so far |              (sender)
    slots (from byte 4096):       | slot 0 ........ | slot 1 ........ |
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from gpg_megatron.bridge.transports.base import SLOTS, TransferError

_ROOT = Path("/dev/shm")
_DATA = 4096
_HEADER = 64
# Fields of a header; the last one is the whole segment's.
_NUMBER, _RECEIVER, _READ, _RESETS = 0, 8, 32, 1024


@dataclass(frozen=True, slots=True)
class ShmAddress:
    """Where a sender's segment is."""

    name: str
    bucket_bytes: int


class _Segment:
    """The mapped file. Headers go through read and write calls: the kernel orders them with
    the slots' bytes on every processor, which plain stores into mapped memory do not promise."""

    def __init__(self, path: Path, bucket_bytes: int) -> None:
        size = _DATA + SLOTS * bucket_bytes
        memory = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        self.slots = memory[_DATA:].view(SLOTS, bucket_bytes)
        self._file = os.open(path, os.O_RDWR)

    def get(self, field: int, slot: int = 0) -> int:
        return int.from_bytes(os.pread(self._file, 8, slot * _HEADER + field), sys.byteorder)

    def set(self, value: int, field: int, slot: int = 0) -> None:
        os.pwrite(self._file, value.to_bytes(8, sys.byteorder), slot * _HEADER + field)

    def close(self) -> None:
        os.close(self._file)


class ShmOutbox:
    """See transport.Outbox."""

    def __init__(self, name: str, bucket_bytes: int) -> None:
        """Make /dev/shm/<name>."""
        self._address = ShmAddress(name, bucket_bytes)
        self._path = _ROOT / name
        # O_EXCL: a name of another run is an error, not a segment to share.
        descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            # Takes the memory now: a full /dev/shm is an error here and no SIGBUS later.
            os.posix_fallocate(descriptor, 0, _DATA + SLOTS * bucket_bytes)
        except OSError:
            self._path.unlink()
            raise
        finally:
            os.close(descriptor)
        self._segment = _Segment(self._path, bucket_bytes)
        self._sent = 0

    def address(self) -> ShmAddress:
        return self._address

    def reset(self) -> None:
        self._segment.set(self._segment.get(_RESETS) + 1, _RESETS)
        for slot in range(SLOTS):
            for field in (_RECEIVER, _NUMBER, _READ):
                self._segment.set(0, field, slot)
        self._sent = 0

    def slot(self) -> torch.Tensor | None:
        index = self._sent % SLOTS
        return self._segment.slots[index] if self._is_read(index) else None

    def post(self, receiver: int, n_bytes: int) -> None:
        index = self._sent % SLOTS
        self._sent += 1
        # The receiver first: whoever sees the new number sees the new receiver.
        self._segment.set(receiver, _RECEIVER, index)
        self._segment.set(self._sent, _NUMBER, index)

    def idle(self) -> bool:
        return all(self._is_read(slot) for slot in range(SLOTS))

    def settle(self) -> None:
        # The mappings stay valid without the name.
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        self.settle()
        self._segment.close()

    def _is_read(self, slot: int) -> bool:
        return self._segment.get(_NUMBER, slot) == self._segment.get(_READ, slot)


class ShmInbox:
    """See transport.Inbox."""

    def __init__(self, address: ShmAddress, receiver: int) -> None:
        """Attach to a sender's segment.

        Raises:
            RuntimeError: it is not on this host.
        """
        path = _ROOT / address.name
        if not path.exists():
            raise RuntimeError(
                f"shared-memory segment {path} is not on this host; with bridge.transport=shm "
                f"engines must run on the host of the policy ranks"
            )
        self._segment = _Segment(path, address.bucket_bytes)
        self._receiver = receiver
        self._reading = (0, 0)
        self._resets = 0

    def start(self) -> None:
        self._resets = self._segment.get(_RESETS)

    def poll(self, n_bytes: int) -> torch.Tensor | None:
        if self._segment.get(_RESETS) != self._resets:
            raise TransferError("the sender has given up this update")
        # Looks twice: while the slots are looked at in turn two messages may come, and the
        # later one be seen alone. Whatever was posted before it is there at the second look.
        waiting = self._waiting() and self._waiting()
        if not waiting:
            return None
        self._reading = min(waiting)
        return self._segment.slots[self._reading[1], :n_bytes]

    def _waiting(self) -> list[tuple[int, int]]:
        """(message number, slot) of what this receiver has not read."""
        waiting = []
        for slot in range(SLOTS):
            number, receiver = (self._segment.get(f, slot) for f in (_NUMBER, _RECEIVER))
            if receiver == self._receiver and number > self._segment.get(_READ, slot):
                waiting.append((number, slot))
        return waiting

    def done(self) -> None:
        number, slot = self._reading
        self._segment.set(number, _READ, slot)

    def close(self) -> None:
        self._segment.close()
