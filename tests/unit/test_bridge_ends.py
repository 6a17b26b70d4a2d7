"""A whole publish without an engine: senders and receivers of a plan, pairs on different ways; and
what that needs to be installed."""

from __future__ import annotations

import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpg_megatron.bridge.copies import copy_all
from gpg_megatron.bridge.engine_layout import Engine, destinations, parameter_shapes
from gpg_megatron.bridge.links import Links, Seat, Way
from gpg_megatron.bridge.plan import make_routes, outgoing
from gpg_megatron.bridge.protocol import Connection, Update
from gpg_megatron.bridge.receiver import Receiver
from gpg_megatron.bridge.sender import Sender, messages_of
from gpg_megatron.bridge.state import StateTensors
from gpg_megatron.bridge.transports.base import Patience
from gpg_megatron.layout.topology import PolicyGrid, held_by_policy, hf_shapes, state_names
from gpg_megatron.shapes import GroupRouting, ModelShape, MoEShape
from tests.unit import policy_layout
from tests.unit.engine_weights import PADDING, weights

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = ModelShape(
    architecture="Any", num_layers=2, hidden_size=7, ffn_size=16, num_heads=4, num_kv_heads=2,
    head_dim=4, vocab_size=128, tied=False, qkv_bias=True, qk_norm=False, rope_theta=1e4,
    rms_norm_eps=1e-6, max_position_embeddings=16, moe=MoEShape(
        num_experts=4, experts_per_token=2, ffn_size=8, shared_ffn_size=8, renormalised=True,
        dense_layers=(0,),
        routing=GroupRouting(has_bias=True, n_groups=1, chosen_groups=1, scale=1.0),
    ),
)  # fmt: skip
GRID = PolicyGrid(tp_size=2, dp_size=1, pp_size=2, ep_size=1, stage_of_layer=(0, 1))
ENGINE = Engine(model=MODEL, tp_size=2)
LIMIT = 160
"""Elements of a bucket: each pair needs several."""
LATE_S = 20.0


class Parameters:
    """The simplest receiver.Target; some of its parameters take memory for an update."""

    device = torch.device("cpu")

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.values = {name: torch.full(shape, float(PADDING)) for name, shape in shapes.items()}
        self.written = dict.fromkeys(shapes, 0)

    def target(self, name: str) -> torch.Tensor:
        return self.values[name]

    def in_place(self, name: str) -> bool:
        return "o_proj" not in name

    def wrote(self, name: str, n_elements: int) -> None:
        self.written[name] += n_elements


def hf_tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) for name, shape in hf_shapes(MODEL).items()
    }


class Publish:
    """Four ranks and two workers in this process. The ranks of the second stage are elsewhere, so
    that each worker hears from two ranks over shared memory and from two over the network."""

    def __init__(self, dtype: torch.dtype) -> None:
        shapes = hf_shapes(MODEL)
        state = StateTensors(state_names(MODEL), dtype)
        wanted = [destinations(ENGINE, shapes, worker) for worker in range(2)]
        held = held_by_policy(MODEL, GRID)
        routes = make_routes(state.held(held), [state.destinations(part) for part in wanted])
        here, there = Seat(host="a"), Seat(host="b")
        links = Links(
            transport="auto", ranks=(here, here, there, there), workers=(here, here), n_workers=2
        )
        self.shards = [self._shards(rank, seed=0) for rank in range(4)]
        name = secrets.token_hex(6)
        self.senders = []
        for rank in range(4):
            pairs = {w: part for (_, w), part in outgoing(routes, rank, 1, LIMIT).items()}
            ways = {worker: links.way(rank, worker) for worker in pairs}
            assert set(ways.values()) == {"shm" if rank < 2 else "gloo"}
            messages = messages_of(rank, pairs, ways, 2)
            shards, own = state.shards(self.shards[rank], held), f"gpg_test_{name}_{rank}"
            sender = Sender(shards, messages, dtype, name=own, timeout_s=LATE_S)
            self.senders.append(sender)
        addresses: dict[Way, dict[int, object]] = {"shm": {}, "gloo": {}}
        for rank, sender in enumerate(self.senders):
            for way, address in sender.addresses.items():
                addresses[way][rank] = address
        connection = Connection(
            links=links,
            routes=[[r for r in routes if r.worker == w] for w in range(2)],
            addresses=addresses,
            dtype=str(dtype).removeprefix("torch."),
            widths=state.widths(wanted[0]),
            bucket_elements=LIMIT,
            timeout_s=LATE_S,
        )
        self.targets = [Parameters(parameter_shapes(ENGINE, shapes, w)) for w in range(2)]
        self.receivers = [Receiver(target, w) for w, target in enumerate(self.targets)]
        together([partial(receiver.connect, connection, 0) for receiver in self.receivers])
        for sender in self.senders:
            sender.settle()

    def _shards(self, rank: int, seed: int) -> dict[str, torch.Tensor]:
        hf = {name: tensor.numpy() for name, tensor in hf_tensors(seed).items()}
        shards = policy_layout.weights(MODEL, GRID, hf, rank)
        return {name: torch.from_numpy(array.copy()).float() for name, array in shards.items()}

    def load(self, seed: int) -> None:
        for rank, shards in enumerate(self.shards):
            for name, value in self._shards(rank, seed).items():
                shards[name].copy_(value)

    def run(self, *, verify: bool) -> None:
        for sender in self.senders:
            sender.reset()
        patience = Patience(LATE_S)
        update = Update(verify=verify)
        receive = [partial(receiver.receive, update) for receiver in self.receivers]
        send = [partial(sender.send, patience, verify=verify) for sender in self.senders]
        together([*receive, *send])

    def close(self) -> None:
        for sender in self.senders:
            sender.close()
        for receiver in self.receivers:
            receiver.close()


def together(actions: Sequence[Callable[[], None]]) -> None:
    """Each in a thread; the first failure is raised."""
    failures: list[Exception] = []

    def guarded(action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(a,), daemon=True) for a in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * LATE_S)
    for failure in failures:
        raise failure


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_pair_takes_its_own_way_and_all_elements_arrive(dtype: torch.dtype) -> None:
    publish = Publish(dtype)
    try:
        for seed, verify in ((0, True), (1, False), (2, True)):
            publish.load(seed)
            publish.run(verify=verify)
            hf = {name: tensor.numpy() for name, tensor in hf_tensors(seed).items()}
            for worker, target in enumerate(publish.targets):
                for name, expected in weights(ENGINE, hf, worker).items():
                    # A model's state arrives bit by bit.
                    on_way = torch.float32 if name.endswith("correction_bias") else dtype
                    wire = torch.from_numpy(expected).to(on_way).float()
                    assert torch.equal(target.values[name], wire), name
    finally:
        publish.close()


class Recorded(TorchDispatchMode):
    """The names of the operations that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_copies_are_the_same_in_one_call() -> None:
    """Contiguous and strided pairs, of several shapes and types."""
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(6, 8, generator=generator) for _ in range(3)]
    sources = [whole[0][1:4], whole[1][:, 2:5], whole[2].reshape(-1)[3:9], whole[0].t()]
    targets = [
        torch.zeros(9, 8)[2:5],
        torch.zeros(6, 3),
        torch.zeros(6).bfloat16(),
        torch.zeros(8, 6),
    ]
    with Recorded() as calls:
        copy_all(targets, sources)
    assert calls.names == ["aten._foreach_copy_.default"] * 2  # contiguous pairs, strided ones
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target, source.to(target.dtype))
    copy_all([], [])


BLOCKED = ("vllm", "ray", "pyarrow", "transformer_engine")
NEEDED = (
    "bridge.receiver", "bridge.sender", "bridge.bridge", "bridge.install", "bridge.forecast",
    "batching.updates", "policy.policy", "policy.on_cpu", "policy.checkpoint", "layout.hf_io",
    "host.device",
)  # fmt: skip


def test_policy_batches_and_bridge_need_no_engine() -> None:
    """On a bare machine with a GPU they are tried without what serves and stores."""
    code = f"""
import sys
for name in {BLOCKED}:
    sys.modules[name] = None
from gpg_megatron.policy.on_cpu import quiet_megatron
quiet_megatron()
for name in {NEEDED}:
    __import__("gpg_megatron." + name)
print("imported")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.endswith("imported\n"), done.stderr[-2000:]
