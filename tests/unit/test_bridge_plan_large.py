"""Plans of public models on up to 1,024 ranks and 64 engines: bytes, balance, both ends alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest

from benchmarks.large_layouts import CASES, LIMIT, LargeCase, Planned, buckets_of, plan
from gpg_megatron.bridge.plan import bucket_elements, outgoing
from gpg_megatron.layout.topology import hf_shapes

# Structure is tested here, not speed: benchmarks/plan.py has the seconds.
SLOWEST_S = 60


# A minute for the largest; uneven stages of the same model are harder.
EACH = [
    pytest.param(
        case, id=case.name, marks=[pytest.mark.slow] if case.name == "qwen3-235b-a22b" else []
    )
    for case in CASES
]


@pytest.fixture(scope="module", params=EACH)
def planned(request: pytest.FixtureRequest) -> Iterator[Planned]:
    yield plan(request.param)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_shapes_are_those_of_the_public_model(case: LargeCase) -> None:
    shapes = hf_shapes(case.engine.model)
    assert sum(map(math.prod, shapes.values())) == case.n_parameters


def test_no_byte_crosses_that_no_worker_needs(planned: Planned) -> None:
    assert sum(planned.sent.values()) == planned.needed
    assert set(planned.sent) <= set(range(planned.case.grid.world_size))


def test_both_ends_have_the_same_buckets(planned: Planned) -> None:
    """A few ranks and a few workers."""
    case = planned.case
    world, workers, engines = case.grid.world_size, case.engine.tp_size, case.n_engines
    ranks = (0, world // 3, world - 1)
    pairs = ((0, 0), (engines // 2, workers // 2), (engines - 1, workers - 1))
    received = {pair: buckets_of(planned.routes, engine=pair[0], worker=pair[1]) for pair in pairs}
    for rank in ranks:
        sent = outgoing(planned.routes, rank, engines, LIMIT)
        buckets = [bucket for part in sent.values() for bucket in part]
        assert sum(map(bucket_elements, buckets)) == planned.sent[rank]
        assert max(map(bucket_elements, buckets)) <= LIMIT
        for pair in pairs:
            assert sent.get(pair) == received[pair].get(rank)
    # The workers of an engine need equal parts, all of them without padding here.
    for senders in received.values():
        total = sum(bucket_elements(bucket) for part in senders.values() for bucket in part)
        assert total == planned.needed // (engines * workers)


def test_the_work_is_shared(
    planned: Planned, record_property: Callable[[str, object], None]
) -> None:
    """The rank that sends most is ahead of an equal share by less than one largest rectangle for
    each engine, and by little for many engines."""
    share = planned.needed / planned.case.grid.world_size
    largest = max(route.box.numel for route in planned.routes)
    most = max(planned.sent.values())
    assert most - share <= largest * planned.case.n_engines
    assert planned.over_share < 1.2
    record_property("over_share", planned.over_share)


def test_planning_takes_seconds(
    planned: Planned, record_property: Callable[[str, object], None]
) -> None:
    record_property("seconds", planned.seconds)
    assert sum(planned.seconds.values()) < SLOWEST_S
