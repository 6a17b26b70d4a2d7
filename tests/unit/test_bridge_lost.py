"""A bridge of one policy rank, and engines of one worker that are lost in the middle of it."""

from __future__ import annotations

import pickle
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist

from gpg_megatron.bridge.bridge import PolicySide, WeightBridge
from gpg_megatron.bridge.engine_layout import Engine, destinations, parameter_shapes
from gpg_megatron.bridge.plan import Destination
from gpg_megatron.bridge.receiver import Receiver
from gpg_megatron.bridge.seats import own_seat
from gpg_megatron.config.bridge import BridgeConfig
from gpg_megatron.errors import EngineLost, RunError
from gpg_megatron.layout.topology import PolicyGrid
from tests.unit import policy_layout
from tests.unit.engine_weights import weights
from tests.unit.test_bridge_ends import MODEL, Parameters, hf_tensors

GRID = PolicyGrid(tp_size=1, dp_size=1, pp_size=1, ep_size=1, stage_of_layer=(0, 0))
LAYOUT = Engine(model=MODEL, tp_size=1)


class Dying(Parameters):
    """Its process ends after so many writes."""

    left = 10**9

    def wrote(self, name: str, n_elements: int) -> None:
        self.left -= 1
        if not self.left:
            raise SystemExit
        super().wrote(name, n_elements)


class One:
    """An engine, and the call to it that is pending."""

    def __init__(self, id_: int, left: int) -> None:
        shapes = parameter_shapes(LAYOUT, {n: tuple(t.shape) for n, t in hf_tensors(0).items()}, 0)
        self.id = id_
        self.target = Dying(shapes)
        self.target.left = left
        self.version: int | None = None
        self.error: BaseException | None = None
        self.begin(lambda: None)
        self.fresh()

    def fresh(self) -> None:
        self.receiver = Receiver(self.target, 0)

    def begin(self, action: Any) -> None:
        self.error = None

        def run() -> None:
            try:
                action()
            except BaseException as error:
                self.error = error
                if isinstance(error, SystemExit):  # the kernel closes what it had open
                    self.receiver.close()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()


class Engines:
    """See bridge.protocol.Engines. Who takes the place of a lost one comes at once when none is
    left."""

    def __init__(self, lives: Sequence[int]) -> None:
        """lives: writes until each engine's end."""
        self.members = [One(i, left) for i, left in enumerate(lives)]
        self.coming: list[One] = []
        self.changes = 1
        self.attached = 0
        self.lost: EngineLost | None = None
        """Of the call that is pending."""

    @property
    def num_engines(self) -> int:
        return len(self.members)

    def renew(self) -> int:
        if self.coming and not self.members:
            self.members = self.coming
            self.coming = []
            self.changes += 1
        return self.changes

    def come(self) -> None:
        self.members += self.coming
        self.coming = []
        self.changes += 1

    def lose(self) -> EngineLost | None:
        for one in list(self.members):
            if isinstance(one.error, SystemExit):
                self.members.remove(one)
                self.coming.append(One(one.id + 100, 10**9))
                self.changes += 1
                self.lost = EngineLost(f"engine {one.id} died")
        return self.lost

    def call_workers(
        self, method: str, args_per_engine: Sequence[tuple[Any, ...]], *, timeout_s: float
    ) -> list[list[Any]]:
        assert method == "bridge_layout" and len(args_per_engine) == self.num_engines
        self.attached += 1
        layouts = []
        for one, (request,) in zip(self.members, args_per_engine, strict=True):
            one.receiver.close()
            one.fresh()
            (shapes,) = pickle.loads(request)
            wanted: list[Destination] = destinations(LAYOUT, shapes, 0)
            layouts.append([pickle.dumps((wanted, own_seat(one.target.device)))])
        return layouts

    def connect(self, payload: bytes, *, timeout_s: float) -> None:
        self.lost = None
        for place, one in enumerate(self.members):
            one.begin(partial(one.receiver.connect, pickle.loads(payload), place))
        self.wait(timeout_s)

    def begin_update(self) -> None: ...

    def receive(self, payload: bytes) -> Engines:
        self.lost = None
        for one in self.members:
            one.version = None
            one.begin(partial(one.receiver.receive, pickle.loads(payload)))
        return self

    def failure(self) -> RunError | None:
        errors = [one.error for one in self.members if isinstance(one.error, RunError)]
        return self.lose() or next(iter(errors), None)

    def wait(self, timeout_s: float) -> None:
        for one in self.members:
            one.thread.join(timeout_s)
            assert not one.thread.is_alive()
        if reason := self.failure():
            raise reason

    def settle(self, timeout_s: float) -> None:
        for one in self.members:
            one.thread.join(timeout_s)
            assert not one.thread.is_alive(), "still busy with an update that was given up"

    def commit(self, version: int) -> None:
        for one in self.members:
            one.version = version


@pytest.fixture(scope="module")
def world() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def shards(seed: int) -> dict[str, torch.Tensor]:
    hf = {name: tensor.numpy() for name, tensor in hf_tensors(seed).items()}
    arrays = policy_layout.weights(MODEL, GRID, hf, 0)
    return {name: torch.from_numpy(array.copy()).float() for name, array in arrays.items()}


def right(seed: int) -> dict[str, torch.Tensor]:
    """What an engine's parameters are then."""
    hf = {name: tensor.numpy() for name, tensor in hf_tensors(seed).items()}
    return {k: torch.from_numpy(v).float() for k, v in weights(LAYOUT, hf, 0).items()}


@pytest.mark.parametrize("transport", ["shm", "gloo"])
@pytest.mark.parametrize("n_engines", [1, 3])
def test_engines_are_lost_in_the_middle_and_come_back(
    world: dist.ProcessGroup,
    monkeypatch: pytest.MonkeyPatch,
    transport: Literal["shm", "gloo"],
    n_engines: int,
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    engines = Engines([10**9] * n_engines)
    own = shards(0)
    side = PolicySide(shards=own, model=MODEL, grid=GRID, rank=0)
    bridge = WeightBridge(
        side,
        engines,
        BridgeConfig(transport=transport, timeout_s=20, verify="always"),
        wire_dtype=torch.float32,
        run_id=secrets.token_hex(4),
        group=world,
    )
    # The first publish is whole; in the second engine 0 dies.
    n_moves = sum(len(message.bucket) for message in bridge.messages) // n_engines
    engines.members[0].target.left = n_moves + n_moves // 3
    for version, seed in enumerate((1, 2, 3)):
        for name, value in shards(seed).items():
            own[name].copy_(value)
        if version == 2 and n_engines > 1:
            assert len(engines.members) == n_engines - 1, "the others had the second"
            engines.come()
        begin = time.monotonic()
        bridge.publish(version)
        assert time.monotonic() - begin < 15
        assert [one.version for one in engines.members] == [version] * len(engines.members)
        for one in engines.members:
            for name, value in right(seed).items():
                assert torch.equal(one.target.values[name], value), (version, one.id, name)
    ids = {one.id for one in engines.members}
    assert ids == {100, *range(1, n_engines)} and engines.attached == (2 if n_engines == 1 else 3)
    bridge.close()
    with suppress(RuntimeError):
        for one in engines.members:
            one.receiver.close()
