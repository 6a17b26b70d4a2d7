"""Which way the bytes of each pair take, by hand; and an order of messages in which nobody waits in
a circle."""

from __future__ import annotations

import pickle
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.large_layouts import QWEN2_7B
from gpg_megatron.bridge.engine_layout import Engine
from gpg_megatron.bridge.forecast import forecast
from gpg_megatron.bridge.links import Distance, Links, Seat, Transport
from gpg_megatron.bridge.plan import agreed_order
from gpg_megatron.bridge.seats import own_seat
from gpg_megatron.layout.topology import PolicyGrid

N_PARAMETERS = 7_615_616_512
NORMS = (2 * 28 + 1) * 3584
"""Elements that both workers of an engine have; everything else is in one of them."""
ENGINE = N_PARAMETERS + NORMS
"""Elements that the two workers of one engine need."""


def gpu(number: int, *, per_host: int = 8, peers: tuple[int, ...] = ()) -> Seat:
    return Seat(
        host=f"h{number // per_host}", gpu=f"G{number}", peers=frozenset(f"G{p}" for p in peers)
    )


def links(n_ranks: int, first: int, *, transport: Transport = "auto", n_engines: int = 4) -> Links:
    """Rank r on GPU r, engines of two workers that see each other from GPU `first` on."""
    workers = range(first, first + 2 * n_engines)
    return Links(
        transport=transport,
        ranks=tuple(gpu(rank) for rank in range(n_ranks)),
        workers=tuple(gpu(number, peers=(number ^ 1,)) for number in workers),
        n_workers=2,
    )


# ---- a table ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "worker", "distance", "way"),
    [
        (gpu(0), gpu(0), Distance.GPU, "cuda_ipc"),
        (gpu(1), gpu(0, peers=(1,)), Distance.PEER, "cuda_ipc"),
        (gpu(1, peers=(0,)), gpu(0), Distance.HOST, "shm"),  # the worker cannot read it
        (gpu(1), gpu(0), Distance.HOST, "shm"),
        (gpu(1), gpu(9), Distance.NETWORK, "nccl"),
        (gpu(1), Seat(host="h0"), Distance.HOST, "shm"),
        (Seat(host="a"), Seat(host="a"), Distance.HOST, "shm"),
        (Seat(host="a"), Seat(host="b"), Distance.NETWORK, "gloo"),
        (gpu(1), Seat(host="b"), Distance.NETWORK, "gloo"),
        # Two hosts that call their first GPU alike do not share it.
        (Seat(host="a", gpu="G"), Seat(host="b", gpu="G"), Distance.NETWORK, "gloo"),
    ],
)
def test_the_way_of_a_pair(rank: Seat, worker: Seat, distance: Distance, way: str) -> None:
    pair = Links(transport="auto", ranks=(rank,), workers=(worker,), n_workers=1)
    assert (pair.distance(0, 0), pair.way(0, 0)) == (distance, way)


def test_nccl_is_not_used_on_a_gpu_that_two_processes_share() -> None:
    """Ranks on GPUs 0 and 8, a worker beside the first."""
    seats = Links(transport="auto", ranks=(gpu(0), gpu(8)), workers=(gpu(0), gpu(9)), n_workers=1)
    ways = {(r, w): seats.way(r, w) for r in range(2) for w in range(2)}
    assert ways == {(0, 0): "cuda_ipc", (0, 1): "gloo", (1, 0): "gloo", (1, 1): "shm"}


def test_the_nearest_holders_serve_and_equals_take_turns() -> None:
    two = links(4, first=0, n_engines=2)
    assert two.nearest((0, 2), 0, 0) == (0,)  # its own GPU
    assert two.nearest((1, 3), 0, 0) == (0,)  # its neighbour's
    assert two.nearest((2, 3), 0, 0) == (0, 1)  # through host memory
    assert pickle.loads(pickle.dumps(two)) == two


@pytest.mark.parametrize(
    ("transport", "pair", "what"),
    [("cuda_ipc", (2, 0), "GPU"), ("shm", (0, 8), "host")],
)
def test_a_transport_that_does_not_reach_is_named(
    transport: Transport, pair: tuple[int, int], what: str
) -> None:
    seats = links(8, first=0, transport=transport, n_engines=5)
    assert seats.unreachable([(0, 0)]) is None
    assert seats.unreachable([(0, 0), pair]) == (
        f"bridge.transport={transport}: policy rank {pair[0]} and worker 0 of engine "
        f"{pair[1] // 2} have no {what} in common; expected auto"
    )
    everywhere = links(8, first=0, transport="gloo", n_engines=5)
    assert everywhere.unreachable([pair]) is None and everywhere.way(*pair) == "gloo"


# ---- bytes of the 7B layouts ------------------------------------------------------------


def grid(*, tp: int, pp: int, dp: int) -> PolicyGrid:
    stages = tuple(layer * pp // 28 for layer in range(28))
    return PolicyGrid(tp_size=tp, dp_size=dp, pp_size=pp, ep_size=1, stage_of_layer=stages)


@pytest.mark.parametrize(
    ("layout", "first", "expected"),
    [
        # Ranks 0-3 hold the first half of the layers and the embedding, ranks 4-7 the rest, which
        # is as large: each worker has one of the halves on its own GPU.
        (
            {"tp": 2, "pp": 2, "dp": 2},
            0,
            {(Distance.GPU, "cuda_ipc"): 2 * ENGINE, (Distance.HOST, "shm"): 2 * ENGINE},
        ),
        # Every rank holds everything.
        ({"tp": 1, "pp": 1, "dp": 8}, 0, {(Distance.GPU, "cuda_ipc"): 4 * ENGINE}),
        # TP 4: a worker's half lies on two ranks in each of two copies.
        (
            {"tp": 4, "pp": 1, "dp": 2},
            0,
            {
                (Distance.GPU, "cuda_ipc"): N_PARAMETERS,
                (Distance.PEER, "cuda_ipc"): N_PARAMETERS,
                (Distance.HOST, "shm"): 2 * N_PARAMETERS,
            },
        ),
        ({"tp": 2, "pp": 2, "dp": 2}, 8, {(Distance.NETWORK, "nccl"): 4 * ENGINE}),
    ],
    ids=["tp2-pp2-dp2", "dp8", "tp4-dp2", "two hosts"],
)
def test_bytes_of_a_7b_publish_by_way(
    layout: dict[str, int], first: int, expected: Mapping[tuple[Distance, str], int]
) -> None:
    engine = Engine(model=QWEN2_7B, tp_size=2)
    found = forecast(grid(**layout), engine, links(8, first))
    assert found.sent == found.bound == 4 * ENGINE
    assert found.most_sent < 1.05 * found.share
    assert found.by_way.keys() == expected.keys()
    for way, n in found.by_way.items():
        assert n == pytest.approx(expected[way], rel=2e-4), way
    if layout["tp"] < 4:
        assert found.by_way == expected


# ---- an order ---------------------------------------------------------------------------

COUNTS = st.dictionaries(
    st.tuples(st.integers(0, 5), st.integers(0, 4)), st.integers(1, 6), min_size=1
)


@given(COUNTS)
def test_ends_that_keep_the_agreed_order_never_wait_in_a_circle(
    counts: dict[tuple[int, int], int],
) -> None:
    """Every end knows its own pairs alone, does one message at a time, and begins the next when the
    other end has taken part."""
    ends: dict[Any, deque[tuple[int, int, int]]] = {}
    for side in (0, 1):
        for own in {pair[side] for pair in counts}:
            part = {pair: n for pair, n in counts.items() if pair[side] == own}
            ends[side, own] = deque(agreed_order(part, 5))
    done: Counter[tuple[int, int]] = Counter()
    while any(ends.values()):
        heads = [queue[0] for queue in ends.values() if queue]
        met = [m for m in heads if heads.count(m) == 2]
        assert met, "every end waits for another"
        sender, receiver, number = met[0]
        assert number == done[sender, receiver], "messages of a pair keep their order"
        done[sender, receiver] += 1
        ends[0, sender].popleft()
        ends[1, receiver].popleft()
    assert done == counts


def test_senders_begin_with_different_receivers_and_pairs_advance_together() -> None:
    order = agreed_order({(s, r): 2 for s in range(2) for r in range(2)}, 2)
    first_half = [(0, 0, 0), (1, 1, 0), (0, 1, 0), (1, 0, 0)]
    assert order == first_half + [(s, r, 1) for s, r, _ in first_half]
    # The second pair has twice as much to say in the same time.
    assert agreed_order({(0, 0): 1, (1, 0): 2}, 1) == [(1, 0, 0), (0, 0, 0), (1, 0, 1)]


# ---- this process -----------------------------------------------------------------------


def test_processes_of_this_host_share_memory() -> None:
    seat = own_seat(torch.device("cpu"))
    assert seat == own_seat(torch.device("cpu")) and seat.gpu is None


def test_a_worker_names_the_gpus_that_it_can_read_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees three, as number 0 to 2; of the third it cannot read."""

    class Properties:
        def __init__(self, device: torch.device) -> None:
            self.uuid = f"uuid-{device.index}"

    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda _, other: other != 2)
    seat = own_seat(torch.device("cuda", 1))
    assert (seat.gpu, seat.peers) == ("uuid-1", frozenset({"uuid-0"}))
