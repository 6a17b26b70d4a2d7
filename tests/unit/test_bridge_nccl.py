"""The point-to-point transport over a stand-in for NCCL, whose kernels behave as on a GPU: they run
after they were launched and, on one GPU, one after the other; a send and a receive meet or wait;
Work.wait() does not wait for them. Stand-in streams run beside the thread that launches."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from gpg_megatron.bridge.plan import agreed_order
from gpg_megatron.bridge.transports import p2p
from gpg_megatron.bridge.transports.base import SLOTS, Expected, Patience, TransferError
from gpg_megatron.bridge.transports.p2p import P2PAddress, P2PInbox, P2POutbox

BYTES = 8
DELAY_S = 0.03
LIMIT_S = 1.0
Wire = tuple["queue.SimpleQueue[Any]", "queue.SimpleQueue[Any]"]
"""Of one pair: data, and the answer to it."""


class Stream:
    """Runs what it is given, in order, in a thread of its own."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def launch(self, kernel: Callable[[], object]) -> None:
        self._work.put(kernel)

    def ends_within(self, seconds: float) -> bool:
        end = threading.Event()
        self.launch(end.set)
        return end.wait(seconds)

    def _run(self) -> None:
        while True:
            self._work.get()()


class Gpu:
    """Of one process: the stream of its own kernels, and the one of all NCCL kernels."""

    def __init__(self) -> None:
        self.main, self.nccl = Stream(), Stream()


class FakeLane:
    """Stands in for lane.Lane."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.slots = torch.zeros(SLOTS, BYTES, dtype=torch.uint8)

    def mark(self) -> threading.Event:
        event = threading.Event()
        self.gpu.main.launch(event.set)
        return event

    def wait(self, event: threading.Event) -> None:
        self.gpu.nccl.launch(event.wait)

    def own(self) -> AbstractContextManager[None]:
        return nullcontext()


class Work:
    def __init__(self) -> None:
        self.end = threading.Event()

    def wait(self) -> bool:
        return True

    def is_completed(self) -> bool:
        return self.end.is_set()


class FakeNccl:
    """A process group, as one of its members sees it."""

    wires: ClassVar[dict[tuple[int, int], Wire]] = {}

    def __init__(self, gpu: Gpu, port: int, rank: int) -> None:
        self._gpu, self._port, self._rank = gpu, port, rank
        self.is_aborted = threading.Event()

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> Work:
        data, answer = self._wire(rank)
        return self._launch(lambda: data.put(tensors[0].clone()), lambda: self._meet(answer))

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> Work:
        data, answer = self._wire(self._rank)

        def copy() -> None:
            arrived = self._meet(data)
            time.sleep(DELAY_S)
            if arrived is not None:
                tensors[0].copy_(arrived)

        return self._launch(copy, lambda: answer.put(True))

    def abort(self) -> None:
        self.is_aborted.set()

    def get_error(self) -> SimpleNamespace:
        return SimpleNamespace(name="SUCCESS")

    def _wire(self, rank: int) -> Wire:
        return self.wires.setdefault((self._port, rank), (queue.SimpleQueue(), queue.SimpleQueue()))

    def _launch(self, *steps: Callable[[], object]) -> Work:
        work = Work()

        def kernel() -> None:
            for step in steps:
                step()
            work.end.set()

        self._gpu.nccl.launch(kernel)
        return work

    def _meet(self, other: queue.SimpleQueue[Any]) -> Any:
        """Spin until the other end is there, or the group is aborted."""
        while not self.is_aborted.is_set():
            try:
                return other.get(timeout=0.005)
            except queue.Empty:
                pass
        return None


class World:
    """Senders and workers, each with a GPU of its own; all of them in this process."""

    def __init__(self, n_senders: int, n_workers: int) -> None:
        self._gpus: dict[tuple[str, int], Gpu] = {}
        self.groups: list[FakeNccl] = []
        workers = range(n_workers)
        self.outboxes = [
            P2POutbox(BYTES, workers, backend="nccl", timeout_s=LIMIT_S, lane=self.lane("rank", s))
            for s in range(n_senders)
        ]
        addresses = {s: outbox.address() for s, outbox in enumerate(self.outboxes)}
        self._senders = {address.port: s for s, address in addresses.items()}
        self.inboxes = [P2PInbox(addresses, w, BYTES, self.lane("worker", w)) for w in workers]

    def gpu(self, side: str, number: int) -> Gpu:
        return self._gpus.setdefault((side, number), Gpu())

    def lane(self, side: str, number: int) -> Any:
        return FakeLane(self.gpu(side, number))

    def group(self, address: P2PAddress, store: object, *, rank: int) -> FakeNccl:
        if rank:
            gpu = self.gpu("worker", address.receivers[rank - 1])
        else:
            # The sender's thread may come before its address is noted.
            while not hasattr(self, "_senders"):
                time.sleep(0.001)
            gpu = self.gpu("rank", self._senders[address.port])
        self.groups.append(FakeNccl(gpu, address.port, rank))
        return self.groups[-1]

    def close(self) -> None:
        for outbox in self.outboxes:
            outbox.close()
        for inbox in self.inboxes:
            inbox.close()

    def send(self, sender: int, receiver: int, value: int, pack_s: float = 0.0) -> None:
        outbox = self.outboxes[sender]
        slot = Patience(10.0).until(outbox.slot, "a slot")

        def pack() -> None:
            time.sleep(pack_s)
            slot.fill_(value)

        self.gpu("rank", sender).main.launch(pack)
        outbox.post(receiver, BYTES)

    def receive(self, receiver: int, found: list[tuple[int, int]], read_s: float = 0.0) -> None:
        """A kernel on the worker's own stream reads the message; nobody waits for it."""
        inbox = self.inboxes[receiver]
        sender, data = Patience(10.0).until(inbox.poll, "a message")

        def read() -> None:
            time.sleep(read_s)
            (value,) = set(data.tolist())
            found.append((sender, value))

        self.gpu("worker", receiver).main.launch(read)
        inbox.done()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], World]]:
    made: list[World] = []

    def make(n_senders: int, n_workers: int) -> World:
        world = World.__new__(World)
        monkeypatch.setattr(p2p, "_group", world.group)
        monkeypatch.setattr(p2p, "CLOSE_S", 0.2)
        World.__init__(world, n_senders, n_workers)
        made.append(world)
        return world

    yield make
    for world in made:
        world.close()
    FakeNccl.wires.clear()


Make = Callable[[int, int], World]


def test_a_message_is_handed_out_when_it_has_arrived(world: Make) -> None:
    one = world(1, 1)
    one.inboxes[0].start([Expected(0, BYTES)])
    one.send(0, 0, 7)
    _, data = Patience(10.0).until(one.inboxes[0].poll, "a message")
    assert data.tolist() == [7] * BYTES


def test_a_slot_is_overwritten_after_the_kernels_that_read_it(world: Make) -> None:
    one, n = world(1, 1), 8
    one.inboxes[0].start([Expected(0, BYTES)] * n)
    found: list[tuple[int, int]] = []

    def send() -> None:
        for value in range(n):
            one.send(0, 0, value)

    sender = threading.Thread(target=send)
    sender.start()
    for _ in range(n):
        one.receive(0, found, read_s=3 * DELAY_S)
    sender.join()
    assert one.gpu("worker", 0).main.ends_within(10)
    assert found == [(0, value) for value in range(n)]


def test_a_message_is_sent_after_the_kernels_that_pack_it(world: Make) -> None:
    one = world(1, 1)
    one.inboxes[0].start([Expected(0, BYTES)])
    found: list[tuple[int, int]] = []
    one.send(0, 0, 5, pack_s=3 * DELAY_S)
    one.receive(0, found)
    assert one.gpu("worker", 0).main.ends_within(10)
    assert found == [(0, 5)]


def exchange(world: World, orders: Sequence[Sequence[Expected]], n_messages: int) -> list[Any]:
    """Two senders send to two workers, each in the agreed order."""
    counts = {(s, r): n_messages for s in range(2) for r in range(2)}
    found: list[list[tuple[int, int]]] = [[], []]
    for inbox, order in zip(world.inboxes, orders, strict=True):
        inbox.start(order)

    def send(sender: int) -> None:
        part = {pair: n for pair, n in counts.items() if pair[0] == sender}
        for _, receiver, number in agreed_order(part, 2):
            world.send(sender, receiver, 10 * receiver + number)

    threads = [threading.Thread(target=send, args=(s,), daemon=True) for s in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(2 * n_messages):
        for receiver in range(2):
            world.receive(receiver, found[receiver])
    for receiver in range(2):
        assert world.gpu("worker", receiver).main.ends_within(10)
    return found


def test_two_senders_and_two_workers_in_the_agreed_order(world: Make) -> None:
    n = 4
    counts = {(s, r): n for s in range(2) for r in range(2)}
    order = agreed_order(counts, 2)
    orders = [[Expected(s, BYTES) for s, to, _ in order if to == r] for r in range(2)]
    found = exchange(world(2, 2), orders, n)
    for receiver, messages in enumerate(found):
        expected = [(s, 10 * receiver + i) for s, to, i in order if to == receiver]
        assert messages == expected


def test_a_circle_is_found_out_and_its_kernels_end(world: Make) -> None:
    """Orders that workers might choose for themselves: each waits for the other's sender first."""
    two = world(2, 2)
    crossed = [[Expected(1 - r, BYTES), Expected(r, BYTES)] for r in range(2)]
    begin = time.monotonic()
    with pytest.raises(TransferError, match="did not take part within 1 s"):
        exchange(two, crossed, 1)
    assert time.monotonic() - begin < LIMIT_S + 2
    two.close()
    for side in ("rank", "worker"):
        for number in range(2):
            assert two.gpu(side, number).nccl.ends_within(2), "a kernel spins for ever"


def test_a_sender_that_is_gone_ends_the_wait_and_the_kernel(world: Make) -> None:
    one = world(1, 1)
    one.inboxes[0].start([Expected(0, BYTES)])
    with pytest.raises(TransferError, match="policy rank 0 did not take part within 1 s"):
        Patience(10.0).until(one.inboxes[0].poll, "a message")
    assert one.gpu("worker", 0).nccl.ends_within(2)
    assert any(group.is_aborted.is_set() for group in one.groups)
