"""Transport on one host: two slots in shared memory for each sender, and a header.

The file's name exists only until every reader has attached; after that the memory lives as
long as the processes that map it, so nothing is left behind whatever dies.

    header of slot i (64 bytes):  | message number | receiver |  (sender)  | number read | (reader)
    byte 1024:                    | resets so far |              (sender)
    slots (from byte 4096):       | slot 0 ........ | slot 1 ........ |

On a GPU the slots are page-locked and a lane (lane.py) carries whole buckets between them and the
device: the sender posts a message when it has come down, the worker reads it when it is up.
"""

from __future__ import annotations

import fcntl
import os
import sys
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gpg_megatron.bridge.transports.base import SLOTS, Expected, TransferError
from gpg_megatron.bridge.transports.lane import Event, Lane, register, unregister
from gpg_megatron.host.reaper import SHARED_MEMORY

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

    def __init__(self, path: Path, bucket_bytes: int, *, locked: bool) -> None:
        size = _DATA + SLOTS * bucket_bytes
        self._memory = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        self.slots = self._memory[_DATA:].view(SLOTS, bucket_bytes)
        self._file = os.open(path, os.O_RDWR)
        self._unlock: weakref.finalize[..., _Segment] | None = None
        if locked and bucket_bytes > 0 and register(self._memory):
            # Also of a segment that nobody closes: the next that the kernel maps to these
            # addresses would be copied from pages that are gone.
            self._unlock = weakref.finalize(self, unregister, self._memory.data_ptr())
            self._unlock.atexit = False  # the driver does it

    def get(self, field: int, slot: int = 0) -> int:
        return int.from_bytes(os.pread(self._file, 8, slot * _HEADER + field), sys.byteorder)

    def set(self, value: int, field: int, slot: int = 0) -> None:
        os.pwrite(self._file, value.to_bytes(8, sys.byteorder), slot * _HEADER + field)

    def hold(self) -> None:
        """Until this process ends, however it does, is_held is true for others."""
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def is_held(self) -> bool:
        """Whether the process lives that holds it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._file, fcntl.LOCK_UN)
        return False

    def close(self) -> None:
        if self._unlock is not None:
            self._unlock()
        os.close(self._file)


@dataclass(frozen=True, slots=True)
class _Post:
    """A message of which the bytes are on their way to the slot."""

    index: int
    number: int
    receiver: int
    ready: Event
    """None: they are there."""


class ShmOutbox:
    """See transports.base.Outbox."""

    def __init__(self, name: str, bucket_bytes: int, lane: Lane | None = None) -> None:
        """Make /dev/shm/<name>.

        Args:
            lane: of the sender's GPU; None: on the CPU.
        """
        self._address = ShmAddress(name, bucket_bytes)
        self._path = SHARED_MEMORY / name
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
        self._segment = _Segment(self._path, bucket_bytes, locked=lane is not None)
        self._segment.hold()
        self._lane = lane
        self._slots = self._segment.slots if lane is None else lane.slots
        self._posts: deque[_Post] = deque()
        self._sent = 0

    def address(self) -> ShmAddress:
        return self._address

    def reset(self) -> None:
        self._posts.clear()
        self._segment.set(self._segment.get(_RESETS) + 1, _RESETS)
        for slot in range(SLOTS):
            for field in (_RECEIVER, _NUMBER, _READ):
                self._segment.set(0, field, slot)
        self._sent = 0

    def slot(self) -> torch.Tensor | None:
        index = self._sent % SLOTS
        return self._slots[index] if self._is_read(index) else None

    def post(self, receiver: int, n_bytes: int) -> None:
        index = self._sent % SLOTS
        self._sent += 1
        self._posts.append(_Post(index, self._sent, receiver, self._leave(index, n_bytes)))
        self._flush()

    def idle(self) -> bool:
        return all(self._is_read(slot) for slot in range(SLOTS))

    def settle(self) -> None:
        # The mappings stay valid without the name.
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        # Whoever still reads gives up.
        self._segment.set(self._segment.get(_RESETS) + 1, _RESETS)
        self.settle()
        self._segment.close()

    def _leave(self, index: int, n_bytes: int) -> Event:
        """Bring a filled slot to where the worker reads it; returns when it will be there."""
        if self._lane is None:
            return None
        slot = self._lane.slots[index, :n_bytes]
        return self._lane.copy(self._segment.slots[index, :n_bytes], slot)

    def _flush(self) -> None:
        while self._posts and (self._posts[0].ready is None or self._posts[0].ready.query()):
            post = self._posts.popleft()
            # The receiver first: whoever sees the new number sees the new receiver.
            self._segment.set(post.receiver, _RECEIVER, post.index)
            self._segment.set(post.number, _NUMBER, post.index)

    def _is_read(self, slot: int) -> bool:
        self._flush()
        return self._segment.get(_NUMBER, slot) == self._segment.get(_READ, slot) and not any(
            post.index == slot for post in self._posts
        )


@dataclass(slots=True)
class _Sender:
    """A sender, as a worker sees it."""

    segment: _Segment
    slots: torch.Tensor
    """uint8 [SLOTS, bucket bytes]."""
    expected: deque[tuple[int, int]]
    """Place in the agreed order and bytes of the messages that have not been taken."""
    resets: int = 0
    taken: int = 0
    """Highest message number that has been taken."""


@dataclass(frozen=True, slots=True)
class _Message:
    """One that was taken from a sender and not read to its end."""

    sender: int
    number: int
    slot: int
    data: torch.Tensor
    ready: Event
    """None: it can be read."""


class ShmInbox:
    """See transports.base.Inbox."""

    def __init__(
        self, addresses: Mapping[int, ShmAddress], receiver: int, lane: Lane | None = None
    ) -> None:
        """Attach to the senders' segments.

        Raises:
            RuntimeError: one is not on this host.
        """
        self._receiver = receiver
        self._lane = lane
        self._senders = {
            sender: self._attach(address, locked=lane is not None)
            for sender, address in addresses.items()
        }
        self._messages: deque[_Message] = deque()
        self._n_taken = 0

    @staticmethod
    def _attach(address: ShmAddress, *, locked: bool) -> _Sender:
        path = SHARED_MEMORY / address.name
        if not path.exists():
            raise RuntimeError(
                f"shared-memory segment {path} is not on this host; with bridge.transport=shm "
                f"engines must run on the host of the policy ranks"
            )
        segment = _Segment(path, address.bucket_bytes, locked=locked)
        return _Sender(segment, segment.slots, deque())

    def start(self, expected: Sequence[Expected]) -> None:
        self._messages.clear()
        for sender in self._senders.values():
            sender.resets = sender.segment.get(_RESETS)
            sender.expected.clear()
            sender.taken = 0
        for place, message in enumerate(expected):
            self._senders[message.sender].expected.append((place, message.n_bytes))

    def poll(self) -> tuple[int, torch.Tensor] | None:
        for sender in self._senders.values():
            if sender.segment.get(_RESETS) != sender.resets:
                raise TransferError("the sender has given up this update")
        room = 1 if self._lane is None else SLOTS
        while len(self._messages) < room and (message := self._take()):
            self._messages.append(message)
        if not self._messages:
            return None
        first = self._messages[0]
        if first.ready is not None and not first.ready.query():
            return None
        return first.sender, first.data

    def lost(self) -> int | None:
        gone = (number for number, s in self._senders.items() if not s.segment.is_held())
        return next(gone, None)

    def done(self) -> None:
        message = self._messages.popleft()
        self._senders[message.sender].segment.set(message.number, _READ, message.slot)

    def close(self) -> None:
        for sender in self._senders.values():
            sender.segment.close()

    def _take(self) -> _Message | None:
        """Of the messages that are there, the one that stands first in the agreed order."""
        waited_for = (item for item in self._senders.items() if item[1].expected)
        for number, sender in sorted(waited_for, key=lambda item: item[1].expected[0]):
            # Looks twice: while the slots are looked at in turn two messages may come, and the
            # later one be seen alone. Whatever was posted before it is there at the second look.
            waiting = self._waiting(sender) and self._waiting(sender)
            if waiting:
                return self._carry(number, *min(waiting))
        return None

    def _waiting(self, sender: _Sender) -> list[tuple[int, int]]:
        """(message number, slot) of what this receiver has not taken."""
        waiting = []
        for slot in range(SLOTS):
            number, receiver, read = (
                sender.segment.get(f, slot) for f in (_NUMBER, _RECEIVER, _READ)
            )
            if receiver == self._receiver and number > max(read, sender.taken):
                waiting.append((number, slot))
        return waiting

    def _carry(self, number: int, message: int, slot: int) -> _Message:
        sender = self._senders[number]
        sender.taken = message
        _, n_bytes = sender.expected.popleft()
        data, ready = sender.slots[slot, :n_bytes], None
        if self._lane is not None:
            place = self._lane.slots[self._n_taken % SLOTS, :n_bytes]
            data, ready = place, self._lane.copy(place, data)
        self._n_taken += 1
        return _Message(number, message, slot, data, ready)
