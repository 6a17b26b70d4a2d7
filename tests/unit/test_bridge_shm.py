"""Messages through shared memory: between two objects, and between two processes."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import pickle
import re
import secrets
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpg_megatron.bridge.transports import base as transport
from gpg_megatron.bridge.transports.base import Expected, Patience, TransferError
from gpg_megatron.bridge.transports.shm import _RECEIVER, ShmAddress, ShmInbox, ShmOutbox
from gpg_megatron.bridge.transports.table import open_inbox, open_outbox

BUCKET = 256
SENDER = 3
SHM = Path("/dev/shm")


@pytest.fixture
def name() -> Iterator[str]:
    """Of a segment; it must be gone in the end."""
    name = f"gpg_test_{secrets.token_hex(8)}"
    yield name
    assert not (SHM / name).exists()


@pytest.fixture
def outbox(name: str) -> Iterator[ShmOutbox]:
    outbox = ShmOutbox(name, BUCKET)
    yield outbox
    outbox.close()


@pytest.fixture
def inboxes(outbox: ShmOutbox) -> Iterator[tuple[ShmInbox, ShmInbox]]:
    """Receivers 0 and 1."""
    inboxes = attach(outbox.address(), 0), attach(outbox.address(), 1)
    yield inboxes
    for inbox in inboxes:
        inbox.close()


def test_a_sender_that_is_gone_is_named(
    outbox: ShmOutbox, inboxes: tuple[ShmInbox, ShmInbox]
) -> None:
    assert [inbox.lost() for inbox in inboxes] == [None, None]
    fcntl.flock(outbox._segment._file, fcntl.LOCK_UN)  # as the kernel does for a dead process
    assert [inbox.lost() for inbox in inboxes] == [SENDER, SENDER]


def attach(address: ShmAddress, receiver: int, sizes: Sequence[int] = (BUCKET,) * 99) -> ShmInbox:
    """Of one sender, and in the middle of an update."""
    inbox = ShmInbox({SENDER: address}, receiver)
    inbox.start([Expected(SENDER, n) for n in sizes])
    return inbox


def send(outbox: ShmOutbox, receiver: int, value: int, n_bytes: int = BUCKET) -> None:
    slot = outbox.slot()
    assert slot is not None
    slot[:n_bytes] = value
    outbox.post(receiver, n_bytes)


def take(inbox: ShmInbox) -> int | None:
    """The value that the next message is full of; None: there is no message."""
    message = inbox.poll()
    if message is None:
        return None
    assert message[0] == SENDER
    values: set[int] = set(message[1].tolist())
    (value,) = values
    inbox.done()
    return value


# ---- one process ------------------------------------------------------------------------


def test_a_new_outbox_is_idle_and_has_a_slot(
    outbox: ShmOutbox, inboxes: tuple[ShmInbox, ShmInbox]
) -> None:
    assert outbox.idle()
    slot = outbox.slot()
    assert slot is not None
    assert (slot.dtype, slot.shape) == (torch.uint8, (BUCKET,))
    assert take(inboxes[0]) is None


def test_a_message_is_the_posted_bytes_until_it_is_done(
    outbox: ShmOutbox, inboxes: tuple[ShmInbox, ShmInbox]
) -> None:
    sent = torch.arange(100, dtype=torch.uint8)
    slot = outbox.slot()
    assert slot is not None
    slot[:100] = sent
    inboxes[1].start([Expected(SENDER, 100)])
    outbox.post(1, 100)
    for _ in range(2):
        message = inboxes[1].poll()
        assert message is not None and torch.equal(message[1], sent)
    assert not outbox.idle()
    inboxes[1].done()
    assert inboxes[1].poll() is None
    assert outbox.idle()


def test_messages_keep_their_order_through_both_slots(
    outbox: ShmOutbox, inboxes: tuple[ShmInbox, ShmInbox]
) -> None:
    """Also where the older message is in the second slot."""
    send(outbox, 0, 1)
    send(outbox, 0, 2)
    for value in range(3, 9):
        assert take(inboxes[0]) == value - 2
        send(outbox, 0, value)
    assert [take(inboxes[0]) for _ in range(3)] == [7, 8, None]


def test_order_when_two_messages_arrive_during_a_poll(
    outbox: ShmOutbox, inboxes: tuple[ShmInbox, ShmInbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first slot is looked at, then both are filled, then the second is looked at."""
    segment = inboxes[0]._senders[SENDER].segment
    look = segment.get

    def look_and_send(field: int, slot: int = 0) -> int:
        seen: int = look(field, slot)
        if field == _RECEIVER and not sent:
            sent.extend([1, 2])
            send(outbox, 0, 1)
            send(outbox, 0, 2)
        return seen

    sent: list[int] = []
    monkeypatch.setattr(segment, "get", look_and_send)
    received = [take(inboxes[0]) for _ in range(4)]
    assert [value for value in received if value is not None] == [1, 2]


def test_one_slot_is_filled_while_the_other_is_read(
    outbox: ShmOutbox, inboxes: tuple[ShmInbox, ShmInbox]
) -> None:
    first = outbox.slot()
    send(outbox, 0, 1)
    second = outbox.slot()
    assert first is not None and second is not None
    assert second.data_ptr() != first.data_ptr()
    send(outbox, 0, 2)
    assert outbox.slot() is None
    message = inboxes[0].poll()
    assert outbox.slot() is None and message is not None
    assert set(message[1].tolist()) == {1}
    inboxes[0].done()
    third = outbox.slot()
    assert third is not None and third.data_ptr() == first.data_ptr()
    assert not outbox.idle()


def test_a_message_to_another_receiver_is_not_taken(
    outbox: ShmOutbox, inboxes: tuple[ShmInbox, ShmInbox]
) -> None:
    """Nor does it hold up the one behind it."""
    send(outbox, 1, 11)
    assert take(inboxes[0]) is None
    send(outbox, 0, 22)
    assert take(inboxes[0]) == 22
    assert take(inboxes[0]) is None
    # The next slot is the one that receiver 1 has not read.
    assert outbox.slot() is None
    assert not outbox.idle()
    assert take(inboxes[1]) == 11
    assert outbox.idle()


def test_receivers_may_take_turns(outbox: ShmOutbox, inboxes: tuple[ShmInbox, ShmInbox]) -> None:
    for value in range(20):
        receiver = value // 3 % 2
        send(outbox, receiver, value)
        assert take(inboxes[1 - receiver]) is None
        assert take(inboxes[receiver]) == value


@pytest.mark.parametrize("n_read", [0, 1, 2])
@pytest.mark.parametrize("n_sent", [1, 2, 3])
def test_reset_forgets_what_was_not_read(
    outbox: ShmOutbox, inboxes: tuple[ShmInbox, ShmInbox], n_sent: int, n_read: int
) -> None:
    inbox = inboxes[0]
    for value in range(n_sent):
        if outbox.slot() is None:
            take(inbox)
        send(outbox, 0, value)
    for _ in range(n_read):
        take(inbox)
    outbox.reset()
    inbox.start([Expected(SENDER, BUCKET)] * 3)
    assert outbox.idle()
    assert take(inbox) is None
    for value in (101, 102):
        send(outbox, 0, value)
    assert outbox.slot() is None
    assert [take(inbox) for _ in range(3)] == [101, 102, None]


def test_a_receiver_that_still_polls_hears_of_the_reset(
    outbox: ShmOutbox, inboxes: tuple[ShmInbox, ShmInbox]
) -> None:
    send(outbox, 0, 1)
    outbox.reset()
    with pytest.raises(TransferError, match="^the sender has given up this update$"):
        inboxes[0].poll()
    late = attach(outbox.address(), 1)
    send(outbox, 1, 2)
    assert take(late) == 2
    late.close()


# ---- the name ---------------------------------------------------------------------------


def test_settle_takes_the_name_away_and_leaves_the_memory(
    name: str, outbox: ShmOutbox, inboxes: tuple[ShmInbox, ShmInbox]
) -> None:
    assert (SHM / name).stat().st_mode & 0o777 == 0o600
    outbox.settle()
    assert not (SHM / name).exists()
    outbox.settle()
    send(outbox, 0, 5)
    assert take(inboxes[0]) == 5
    assert outbox.idle()


def test_a_missing_segment_is_an_error_that_says_what_to_do(name: str, outbox: ShmOutbox) -> None:
    outbox.settle()
    message = (
        f"shared-memory segment /dev/shm/{name} is not on this host; with bridge.transport=shm "
        f"engines must run on the host of the policy ranks"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        ShmInbox({SENDER: outbox.address()}, 0)


def test_a_name_in_use_is_refused_and_kept(
    name: str, outbox: ShmOutbox, inboxes: tuple[ShmInbox, ShmInbox]
) -> None:
    with pytest.raises(FileExistsError):
        ShmOutbox(name, BUCKET)
    send(outbox, 0, 5)
    assert take(inboxes[0]) == 5
    assert (SHM / name).exists()


def test_a_full_shared_memory_is_an_error_that_leaves_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="No space left"):
        ShmOutbox(name, BUCKET)


def test_close_releases_the_files(name: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    outbox = ShmOutbox(name, BUCKET)
    inbox = ShmInbox({SENDER: outbox.address()}, 0)
    inbox.close()
    outbox.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_both_ends_open_by_the_name_of_the_transport(name: str) -> None:
    cpu = torch.device("cpu")
    outbox = open_outbox("shm", name, BUCKET, [0], 1.0, cpu)
    address = pickle.loads(pickle.dumps(outbox.address()))
    assert address == ShmAddress(name, BUCKET)
    inbox = open_inbox("shm", {SENDER: address}, 0, BUCKET, cpu)
    assert (type(outbox), type(inbox)) == (ShmOutbox, ShmInbox)
    inbox.close()
    outbox.close()


# ---- two processes ----------------------------------------------------------------------

N_MESSAGES = 400


def receive(pipe: Connection, address: ShmAddress, sizes: Sequence[Sequence[int]]) -> None:
    """A process with a receiver for each list of message sizes; answers what they received."""
    inboxes = [attach(address, receiver, part) for receiver, part in enumerate(sizes)]
    received: list[list[bytes]] = [[] for _ in sizes]
    pipe.send("attached")

    def poll() -> tuple[int, torch.Tensor] | None:
        for receiver, inbox in enumerate(inboxes):
            if message := inbox.poll():
                return receiver, message[1]
        return None

    for _ in range(sum(map(len, sizes))):
        receiver, data = Patience(60).until(poll, "a message")
        received[receiver].append(bytes(data.tolist()))
        inboxes[receiver].done()
    pipe.send(received)


def test_two_processes(name: str, outbox: ShmOutbox) -> None:
    """400 messages of random sizes to two receivers, after the name is gone."""
    random = torch.Generator().manual_seed(0)
    messages: list[list[bytes]] = [[], []]
    order = []
    for _ in range(N_MESSAGES):
        receiver, n = (int(torch.randint(high, (), generator=random)) for high in (2, BUCKET))
        data = torch.randint(256, (n + 1,), generator=random, dtype=torch.uint8)
        messages[receiver].append(bytes(data.tolist()))
        order.append((receiver, data))
    ours, theirs = multiprocessing.Pipe()
    sizes = [[len(message) for message in part] for part in messages]
    process = multiprocessing.get_context("spawn").Process(
        target=receive, args=(theirs, outbox.address(), sizes), daemon=True
    )
    process.start()
    try:
        assert ours.poll(120)
        assert ours.recv() == "attached"
        outbox.settle()
        for receiver, data in order:
            slot = Patience(60).until(outbox.slot, "a slot")
            slot[: len(data)] = data
            outbox.post(receiver, len(data))
        Patience(60).until(outbox.idle, "the last message to be read")
        assert ours.poll(60)
        assert ours.recv() == messages
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()


# ---- waiting ----------------------------------------------------------------------------


class Clock(SimpleNamespace):
    """Stands in for the time module; a look at it takes 0.1 ms."""

    now: float = 0.0

    def monotonic(self) -> float:
        self.now += 1e-4
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(transport, "time", clock)
    return clock


def never() -> None:
    return None


def test_patience_returns_what_is_there_at_once() -> None:
    assert Patience(0).until(lambda: "here", "x") == "here"
    assert Patience(0).until(lambda: 0, "x") == 0


def _popped(answers: list[bool | None]) -> object:
    return answers.pop() if answers else "late"


@pytest.mark.parametrize("absent", [None, False])
def test_patience_waits_for_a_result(clock: SimpleNamespace, absent: bool | None) -> None:
    answers = [absent] * 500
    assert Patience(5).until(partial(_popped, answers), "x") == "late"
    assert 0.4 < clock.now < 1


def test_patience_ends_with_the_name_of_what_it_waited_for(clock: SimpleNamespace) -> None:
    with pytest.raises(TransferError, match=r"^waited 2\.5 s for the last bucket$"):
        Patience(2.5).until(never, "the last bucket")
    assert 2.5 < clock.now < 2.6


def test_patience_asks_about_once_a_second_whether_to_give_up(clock: SimpleNamespace) -> None:
    asked = []

    def aborted() -> str | None:
        asked.append(clock.now)
        return "engine 1 died" if len(asked) == 3 else None

    with pytest.raises(TransferError, match="^while waiting for a slot: engine 1 died$"):
        Patience(60, aborted).until(never, "a slot")
    assert asked == pytest.approx([1, 2, 3], abs=0.1)


def test_patience_does_not_ask_while_it_has_results(clock: SimpleNamespace) -> None:
    def aborted() -> str:
        raise AssertionError("asked")

    patience = Patience(60, aborted)
    for _ in range(5):
        answers: list[bool | None] = [None] * 300
        patience.until(partial(_popped, answers), "x")
    assert clock.now > 1
