"""What the transports do with a GPU, told from stand-ins: copies that end later, recorded calls."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpg_megatron.bridge.transports import cuda_ipc, lane, shm
from gpg_megatron.bridge.transports.base import SLOTS, Expected
from gpg_megatron.bridge.transports.cuda_ipc import CudaAddress, opened, plain_segments
from gpg_megatron.bridge.transports.lane import Lane
from gpg_megatron.bridge.transports.shm import ShmInbox, ShmOutbox

BUCKET = 64
SENDER = 3
CUDA1 = torch.device("cuda", 1)


class Event:
    """Of a copy that ends when the test says so."""

    def __init__(self, copy: Callable[[], object]) -> None:
        self._copy = copy
        self._is_over = False

    def end(self) -> None:
        self._copy()
        self._is_over = True

    def query(self) -> bool:
        return self._is_over


class SlowLane:
    """Stands in for Lane: host memory, and copies that nobody sees before their end."""

    def __init__(self) -> None:
        self.slots = torch.zeros(SLOTS, BUCKET, dtype=torch.uint8)
        self.begun: list[Event] = []

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> Event:
        assert to.shape == source.shape
        self.begun.append(Event(lambda: to.copy_(source)))
        return self.begun[-1]


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What was page-locked and let go."""
    calls: list[tuple[str, int]] = []
    sizes: dict[int, int] = {}

    def register(memory: torch.Tensor) -> bool:
        sizes[memory.data_ptr()] = memory.nbytes
        calls.append(("lock", memory.nbytes))
        return True

    monkeypatch.setattr(shm, "register", register)
    monkeypatch.setattr(shm, "unregister", lambda address: calls.append(("free", sizes[address])))
    return calls


@pytest.fixture
def ends(locked: list[tuple[str, int]]) -> Iterator[tuple[ShmOutbox, SlowLane, ShmInbox, SlowLane]]:
    """A sender and a worker, each with a GPU."""
    down: Any = SlowLane()
    up: Any = SlowLane()
    outbox = ShmOutbox(f"gpg_test_{secrets.token_hex(8)}", BUCKET, down)
    inbox = ShmInbox({SENDER: outbox.address()}, 0, up)
    inbox.start([Expected(SENDER, BUCKET)] * 9)
    yield outbox, down, inbox, up
    outbox.close()
    inbox.close()


# ---- page-locked slots ------------------------------------------------------------------


def send(outbox: ShmOutbox, value: int) -> None:
    slot = outbox.slot()
    assert slot is not None
    slot.fill_(value)
    outbox.post(0, BUCKET)


def test_both_ends_lock_the_whole_segment(
    ends: tuple[ShmOutbox, SlowLane, ShmInbox, SlowLane], locked: list[tuple[str, int]]
) -> None:
    size = 4096 + SLOTS * BUCKET
    assert locked == [("lock", size)] * 2
    ends[2].close()
    assert locked[2:] == [("free", size)]
    ends[2].close = lambda: None  # type: ignore[method-assign]


def test_a_segment_that_nobody_closes_is_unlocked_before_its_memory_goes(
    locked: list[tuple[str, int]],
) -> None:
    lane: Any = SlowLane()
    outbox: ShmOutbox | None = ShmOutbox(f"gpg_test_{secrets.token_hex(8)}", BUCKET, lane)
    assert outbox is not None
    outbox.settle()
    outbox = None
    assert [what for what, _ in locked] == ["lock", "free"]


def test_a_message_is_there_when_both_copies_have_ended(
    ends: tuple[ShmOutbox, SlowLane, ShmInbox, SlowLane],
) -> None:
    outbox, down, inbox, up = ends
    send(outbox, 7)
    assert inbox.poll() is None and not up.begun, "it is still on its way down"
    down.begun[0].end()
    assert not outbox.idle()  # the sender looks, and tells the worker
    assert inbox.poll() is None and len(up.begun) == 1, "it is on its way up"
    assert inbox.poll() is None and len(up.begun) == 1, "once"
    assert not outbox.idle()
    up.begun[0].end()
    message = inbox.poll()
    assert message is not None and message[0] == SENDER
    assert message[1].data_ptr() == up.slots[0].data_ptr() and set(message[1].tolist()) == {7}
    inbox.done()
    assert outbox.idle() and inbox.poll() is None


def test_two_messages_are_on_their_way_at_once_and_no_slot_is_filled_too_early(
    ends: tuple[ShmOutbox, SlowLane, ShmInbox, SlowLane],
) -> None:
    outbox, down, inbox, up = ends
    send(outbox, 1)
    send(outbox, 2)
    assert outbox.slot() is None, "both slots are on their way down"
    for event in down.begun:
        event.end()
    assert outbox.slot() is None, "and wait to be read"
    assert inbox.poll() is None and len(up.begun) == 2
    found = []
    for event in up.begun:
        event.end()
        message = inbox.poll()
        assert message is not None
        found.append(set(message[1].tolist()))
        inbox.done()
        assert outbox.slot() is not None
    assert found == [{1}, {2}] and outbox.idle()


# ---- the lane itself --------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a lane asks of CUDA, in order."""
    calls: list[Any] = []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = name if isinstance(name, str) else "own"

        def wait_stream(self, other: Any) -> None:
            calls.append((self.name, "waits for", other.name))

        def wait_event(self, event: object) -> None:
            calls.append((self.name, "waits for", event))

        def record_event(self) -> str:
            calls.append((self.name, "records"))
            return f"event of {self.name}"

    @contextmanager
    def entered(what: Any) -> Iterator[None]:
        calls.append(("enter", getattr(what, "name", what)))
        yield
        calls.append("leave")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(f"caller {device}"))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "device", entered)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: empty(*size, dtype=dtype))
    return calls


def test_a_copy_begins_after_the_callers_kernels_on_a_stream_of_its_own(calls: list[Any]) -> None:
    own = Lane(BUCKET, CUDA1)
    assert calls == [("own", "waits for", "caller cuda:1")]
    calls.clear()
    source = torch.ones(BUCKET, dtype=torch.uint8)
    assert own.copy(own.slots[0], source) == "event of own"
    assert calls == [
        ("own", "waits for", "caller cuda:1"), ("enter", "own"), "leave", ("own", "records"),
    ]  # fmt: skip
    assert torch.equal(own.slots[0], source)
    calls.clear()
    own.wait(own.mark())
    with own.own():
        pass
    assert calls == [
        ("caller cuda:1", "records"), ("own", "waits for", "event of caller cuda:1"),
        ("enter", CUDA1), ("enter", "own"), "leave", "leave",
    ]  # fmt: skip


@pytest.mark.parametrize("code", [0, 801])
def test_memory_that_cannot_be_locked_is_told_and_used(
    code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def answer(pointer: int, size: int, flags: int) -> int:
        asked.append((pointer, size, flags))
        return code

    def launch(size: int, device: str) -> None:
        asked.append("launch")
        raise RuntimeError("the error of the call before")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=answer))
    monkeypatch.setattr(torch, "ones", launch)
    memory = torch.zeros(3 << 20, dtype=torch.uint8)
    assert lane.register(memory) == (code == 0)
    assert asked == [(memory.data_ptr(), 3 << 20, 0), "launch"][: 2 if code else 1]
    warning = "warning: the bridge cannot page-lock 3 MiB of shared memory (CUDA error 801)"
    assert capsys.readouterr().err.startswith(warning if code else "")


def test_addresses_that_were_freed_while_locked_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = SimpleNamespace(cudaHostRegister=lambda *_: 712)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: taken)
    with pytest.raises(RuntimeError, match="freed while it was still page-locked"):
        lane.register(torch.zeros(8))


# ---- memory of another process ----------------------------------------------------------


def rebuild(
    tensor_cls: type, storage_device: int, storage_handle: bytes, event_sync_required: bool
) -> Any:
    """As torch's, by the names of its arguments."""
    return storage_device, storage_handle, event_sync_required


def test_a_handle_is_opened_on_the_own_gpu_whatever_number_the_sender_has_for_it() -> None:
    address = CudaAddress(
        headers=shm.ShmAddress("x", 0),
        gpu="G",
        rebuild=rebuild,
        arguments=(torch.Tensor, 5, b"handle", True),
    )
    assert opened(address, CUDA1) == (1, b"handle", False)


def test_torchs_own_function_has_these_names() -> None:
    import inspect

    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    names: Mapping[str, object] = inspect.signature(rebuild_cuda_tensor).parameters
    assert {"storage_device", "event_sync_required"} <= names.keys()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, []),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, []),
        (
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512,expandable_segments:True"},
            [
                "max_split_size_mb:512,expandable_segments:False",
                "max_split_size_mb:512,expandable_segments:True",
            ],
        ),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments: true"},
            ["expandable_segments: False", "expandable_segments: true"],
        ),
    ],
)
def test_slots_are_no_expandable_segments(
    environment: dict[str, str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: list[str] = []
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", changes.append)
    with pytest.raises(RuntimeError, match="full"), plain_segments():
        assert changes == expected[:1]
        raise RuntimeError("full")
    assert changes == expected


def test_slots_on_a_gpu_are_posted_when_their_kernels_have_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The header follows the event that is recorded after the caller's kernels."""
    events: list[Event] = []

    def record() -> Event:
        events.append(Event(lambda: None))
        return events[-1]

    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=record)
    )
    monkeypatch.setattr(cuda_ipc, "gpu_uuid", lambda device: "G")
    name = f"gpg_test_{secrets.token_hex(8)}"
    outbox = cuda_ipc.CudaOutbox(name, BUCKET, torch.device("cpu"))
    up: Any = SlowLane()
    monkeypatch.setattr(shm, "register", lambda memory: False)
    monkeypatch.setattr(cuda_ipc, "opened", lambda address, device: outbox._slots)
    inbox = cuda_ipc.CudaInbox({SENDER: outbox.address()}, 0, up)
    inbox.start([Expected(SENDER, BUCKET)])
    send(outbox, 4)
    assert not outbox.idle() and inbox.poll() is None and not up.begun
    events[0].end()
    assert not outbox.idle() and inbox.poll() is None
    up.begun[0].end()
    message = inbox.poll()
    assert message is not None and set(message[1].tolist()) == {4}
    inbox.done()
    assert outbox.idle()
    outbox.close()
    inbox.close()
