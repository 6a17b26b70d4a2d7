"""How buckets get from policy ranks to engine workers: one small interface, several ways.

    Outbox (a policy rank, one way):  slot() -> fill it -> post(receiver) -> ... -> idle()
    Inbox (a worker, one way):        start(expected) -> poll() -> read it -> done() -> ...

A sender has two slots, so that it fills one while the other is being read. Neither side blocks
inside a transport: `Patience` waits, with a limit and a name for what is waited for. On a GPU
filling and reading are launches on the caller's stream; a transport waits for them by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from gpg_megatron.errors import RunError

T = TypeVar("T")
SLOTS = 2


class TransferError(RunError):
    """A transfer did not come to its end; the engines must not generate before a full one has."""


class Outbox(Protocol):
    """The sending end of one policy rank."""

    def address(self) -> object:
        """What an Inbox needs to attach; pickles."""

    def reset(self) -> None:
        """Forget what an interrupted transfer left. No receiver may be polling."""

    def slot(self) -> torch.Tensor | None:
        """uint8 [bucket bytes] to fill next; None while its last content is being read."""

    def post(self, receiver: int, n_bytes: int) -> None:
        """Hand the first n_bytes of the slot to a receiver; messages to one keep their order."""

    def idle(self) -> bool:
        """Whether the slots may be filled again: all that was posted has been read, or copied."""

    def settle(self) -> None:
        """All receivers have attached, or will not any more."""

    def close(self) -> None:
        """Release what is held."""


@dataclass(frozen=True, slots=True)
class Expected:
    """A message that will come."""

    sender: int
    n_bytes: int


class Inbox(Protocol):
    """The receiving end of one worker for all senders of one way."""

    def start(self, expected: Sequence[Expected]) -> None:
        """A transfer begins, of these messages in the agreed order; the senders have reset their
        ends."""

    def poll(self) -> tuple[int, torch.Tensor] | None:
        """A sender and its next message, uint8 [n_bytes]; None while there is none."""

    def lost(self) -> int | None:
        """A sender whose process is gone, where nothing else tells; None: there is none."""

    def done(self) -> None:
        """What reads the message that poll returned has ended, or is on the current stream."""

    def close(self) -> None:
        """Release what is held."""


@dataclass(slots=True)
class Patience:
    """Waits by polling: eagerly at first, then every millisecond."""

    limit_s: float
    """Longest wait without progress."""
    aborted: Callable[[], str | None] = lambda: None
    """Why the other side has given up; None while it has not. Asked about once a second."""

    def until(self, poll: Callable[[], T | None], what: str) -> T:
        """The first result of poll that is not None and not False.

        Raises:
            TransferError: the limit has passed, or the other side has given up.
        """
        begin = now = time.monotonic()
        asked = begin
        while True:
            result = poll()
            if result is not None and result is not False:
                return result
            now = time.monotonic()
            if now - begin > self.limit_s:
                raise TransferError(f"waited {self.limit_s:g} s for {what}")
            if now - asked > 1.0:
                asked = now
                if reason := self.aborted():
                    raise TransferError(f"while waiting for {what}: {reason}")
            time.sleep(0.0 if now - begin < 0.002 else 0.001)
