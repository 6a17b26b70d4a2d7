"""The point-to-point transport over gloo: a sender and its receivers in one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from gpg_megatron.bridge.transports.base import Expected, Patience, TransferError
from gpg_megatron.bridge.transports.p2p import P2PInbox, P2POutbox

BYTES = 64
RECEIVERS = (5, 2)
SENDER = 3


@pytest.fixture
def ends() -> Iterator[tuple[P2POutbox, dict[int, P2PInbox]]]:
    outbox = P2POutbox(BYTES, RECEIVERS, backend="gloo", timeout_s=30)
    inboxes: dict[int, P2PInbox] = {}

    def attach(receiver: int) -> None:
        inboxes[receiver] = P2PInbox({SENDER: outbox.address()}, receiver, BYTES)

    threads = [threading.Thread(target=attach, args=(r,)) for r in RECEIVERS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert set(inboxes) == set(RECEIVERS)
    yield outbox, inboxes
    outbox.close()
    for inbox in inboxes.values():
        inbox.close()


def soon(poll: Callable[[], object]) -> object:
    return Patience(20.0).until(poll, "the other end")


def send(outbox: P2POutbox, receiver: int, value: int, n_bytes: int) -> None:
    slot = soon(outbox.slot)
    assert isinstance(slot, torch.Tensor) and slot.shape == (BYTES,)
    slot.fill_(value)
    outbox.post(receiver, n_bytes)


def receive(inbox: P2PInbox) -> list[int]:
    sender, data = Patience(20.0).until(inbox.poll, "a message")
    assert sender == SENDER
    values = data.tolist()
    inbox.done()
    return values


def test_messages_reach_their_receivers_in_order(
    ends: tuple[P2POutbox, dict[int, P2PInbox]],
) -> None:
    outbox, inboxes = ends
    plan = [(5, 1, 8), (2, 2, 64), (5, 3, 3), (5, 4, 64), (2, 5, 1)]

    def send_all() -> None:
        for message in plan:
            send(outbox, *message)

    for receiver, inbox in inboxes.items():
        inbox.start([Expected(SENDER, n) for to, _, n in plan if to == receiver])
    thread = threading.Thread(target=send_all)
    thread.start()
    for receiver, value, n_bytes in plan:
        assert receive(inboxes[receiver]) == [value] * n_bytes
    thread.join(timeout=20)
    soon(outbox.idle)
    outbox.reset()
    inboxes[2].start([Expected(SENDER, 4)])
    send(outbox, 2, 9, 4)
    assert receive(inboxes[2]) == [9] * 4


def test_nothing_arrives_before_it_is_posted(ends: tuple[P2POutbox, dict[int, P2PInbox]]) -> None:
    outbox, inboxes = ends
    inboxes[5].start([Expected(SENDER, 2)])
    assert inboxes[5].poll() is None
    time.sleep(0.2)
    assert inboxes[5].poll() is None
    send(outbox, 5, 7, 2)
    assert receive(inboxes[5]) == [7, 7]


def test_a_group_is_not_used_after_an_interrupted_update(
    ends: tuple[P2POutbox, dict[int, P2PInbox]],
) -> None:
    """The next message would be taken for one of the update that was given up."""
    _, inboxes = ends
    inboxes[5].start([Expected(SENDER, 2)])
    with pytest.raises(TransferError, match="an update was interrupted"):
        inboxes[5].start([Expected(SENDER, 2)])


def test_a_sender_without_its_receivers_gives_up() -> None:
    outbox = P2POutbox(BYTES, RECEIVERS, backend="gloo", timeout_s=1)
    with pytest.raises(TransferError, match="sending to the engine workers failed"):
        Patience(30.0).until(lambda: outbox.slot() is None, "the failure")
    outbox.close()
