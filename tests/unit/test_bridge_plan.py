"""Plans of generated models and layouts, executed with numpy.

Hugging Face tensors --policy_layout--> shards --outgoing, incoming--> workers
                    `------------------engine_layout, cut directly------^  the same
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpg_megatron.bridge import engine_layout
from gpg_megatron.bridge.engine_layout import Engine
from gpg_megatron.bridge.forecast import forecast
from gpg_megatron.bridge.links import Distance, Links, Seat, Way
from gpg_megatron.bridge.plan import (
    Bucket,
    Destination,
    Route,
    View,
    bucket_elements,
    fingerprint,
    incoming,
    make_routes,
    outgoing,
)
from gpg_megatron.layout.boxes import Box
from gpg_megatron.layout.topology import Held, PolicyGrid, held_by_policy, hf_shapes
from gpg_megatron.shapes import DeltaShape, GroupRouting, ModelShape, MoEShape
from tests.unit import policy_layout
from tests.unit.engine_weights import PADDING, weights

REPOSITORY = Path(__file__).resolve().parents[2]
assert PADDING == policy_layout.PADDING


@dataclass(frozen=True, kw_only=True)
class Case:
    """A policy, some engines, and the largest bucket."""

    grid: PolicyGrid
    engine: Engine
    n_engines: int
    limit: int

    @property
    def model(self) -> ModelShape:
        return self.engine.model

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return hf_shapes(self.model)

    @cached_property
    def destinations(self) -> list[list[Destination]]:
        workers = range(self.engine.tp_size)
        return [engine_layout.destinations(self.engine, self.shapes, w) for w in workers]

    @cached_property
    def routes(self) -> list[Route]:
        return make_routes(held_by_policy(self.model, self.grid), self.destinations)

    @cached_property
    def hf(self) -> dict[str, np.ndarray]:
        """Tensors in which no two elements are equal, over all of them."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes.values()])
        parts = np.split(np.arange(float(ends[-1])), ends[:-1])
        return {
            name: part.reshape(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def sent(self) -> dict[tuple[int, int, int], list[Bucket]]:
        """(rank, engine, worker) -> buckets."""
        return {
            (rank, *to): buckets
            for rank in range(self.grid.world_size)
            for to, buckets in outgoing(self.routes, rank, self.n_engines, self.limit).items()
        }


FLAGS = (
    "qkv_bias",
    "output_bias",
    "mlp_bias",
    "qk_norm",
    "post_norms",
    "fused_gate_up",
    "output_gate",
)
ROUTINGS = (
    None,
    *(
        GroupRouting(has_bias=has_bias, n_groups=1, chosen_groups=1, scale=1.0)
        for has_bias in (True, False)
    ),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Everything that both sides accept, also tensor parallelism above the KV heads."""
    tp, engine_tp = draw(st.sampled_from([1, 2, 3, 4, 6])), draw(st.integers(1, 4))
    fit = [n for n in range(1, 7) if all(n % t == 0 or t % n == 0 for t in (tp, engine_tp))]
    kv_heads = draw(st.sampled_from(fit))
    heads = math.lcm(kv_heads, tp, engine_tp) * draw(st.integers(1, 2))
    head_dim = draw(st.sampled_from([d for d in (2, 4, 6) if 2 * kv_heads * d % tp == 0]))
    ep = draw(st.sampled_from([1, 2, 4]))
    chunks = draw(st.lists(st.integers(1, 2), min_size=1, max_size=4))
    pp = draw(st.sampled_from([n for n in range(1, 5) if len(chunks) % n == 0]))
    layers = range(sum(chunks))
    experts = MoEShape(
        num_experts=ep * draw(st.integers(1, 3)),
        experts_per_token=1,
        ffn_size=12,
        shared_ffn_size=draw(st.sampled_from([0, 24])),
        renormalised=True,
        dense_layers=tuple(
            sorted(draw(st.sets(st.sampled_from(layers))) - {draw(st.sampled_from(layers))})
        ),
        routing=draw(st.sampled_from(ROUTINGS)),
    )
    moe = draw(st.sampled_from([None, experts]))
    key_heads = math.lcm(tp, engine_tp) * draw(st.integers(1, 2))
    nets = DeltaShape(
        layers=tuple(sorted(draw(st.sets(st.sampled_from(layers), min_size=1)))),
        key_heads=key_heads,
        value_heads=key_heads * draw(st.integers(1, 2)),
        key_dim=2,
        value_dim=3,
        kernel=2,
        fused=draw(st.booleans()),
    )
    delta = draw(st.sampled_from([None, nets]))
    flags: dict[str, Any] = {flag: draw(st.booleans()) for flag in FLAGS}
    model = ModelShape(
        architecture="Any",
        num_layers=len(layers),
        hidden_size=draw(st.integers(1, 4)),
        ffn_size=draw(st.sampled_from([12, 24])),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        # vLLM's 64 * n rows must be divisible.
        vocab_size=draw(st.integers(129, 192) if engine_tp == 3 else st.integers(1, 200)),
        tied=draw(st.booleans()),
        **flags,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        max_position_embeddings=16,
        moe=moe,
        delta=delta,
    )
    whole_experts = moe is not None and moe.num_experts % engine_tp == 0 and draw(st.booleans())
    grid = PolicyGrid(
        tp_size=tp,
        dp_size=draw(st.integers(1, 2)) * (ep if moe else 1),
        pp_size=pp,
        ep_size=ep if moe else 1,
        stage_of_layer=tuple(chunk % pp for chunk, n in enumerate(chunks) for _ in range(n)),
    )
    widest = max(model.hidden_size, heads * head_dim, 24, nets.value_width)
    return Case(
        grid=grid,
        engine=Engine(model=model, tp_size=engine_tp, expert_parallel=whole_experts),
        n_engines=draw(st.integers(1, 5)),
        limit=draw(st.integers(widest, 8 * widest)),
    )


def senders(route: Route) -> list[int]:
    """All that may send it, in the order in which engines take them."""
    return [rank for held in route.sources for rank in held.ranks]


def size(route: Route) -> int:
    return route.box.numel


# ---- what arrives -----------------------------------------------------------------------


@settings(max_examples=40)
@given(cases())
def test_every_worker_gets_exactly_its_part_of_the_tensors(case: Case) -> None:
    """Every element once, never one of Megatron's padding, no padding of the engine's."""
    shards = [
        policy_layout.weights(case.model, case.grid, case.hf, rank)
        for rank in range(case.grid.world_size)
    ]
    sent = case.sent()
    for engine in range(case.n_engines):
        for worker in range(case.engine.tp_size):
            shapes = engine_layout.parameter_shapes(case.engine, case.shapes, worker)
            values = {name: np.full(shape, PADDING) for name, shape in shapes.items()}
            writes = {name: np.zeros(shape, int) for name, shape in shapes.items()}
            for (rank, *to), buckets in sent.items():
                if to != [engine, worker]:
                    continue
                for bucket in buckets:
                    wire = packed(bucket, shards[rank])
                    assert not (wire == PADDING).any()
                    unpack(bucket, wire, values, writes)
            expected = weights(case.engine, case.hf, worker)
            assert values.keys() == expected.keys()
            for name, value in values.items():
                np.testing.assert_array_equal(value, expected[name], name)
                np.testing.assert_array_equal(writes[name], expected[name] != PADDING, name)


def packed(bucket: Bucket, shards: Mapping[str, np.ndarray]) -> np.ndarray:
    """The sender's end; what no move fills stays PADDING."""
    wire = np.full(bucket_elements(bucket), PADDING)
    for move in bucket:
        part = shards[move.parameter][move.source_box.slices]
        assert part.shape == move.source_box.shape == move.target.shape
        wire[move.offset : move.offset + move.numel] = part.ravel()
    return wire


def unpack(
    bucket: Bucket,
    wire: np.ndarray,
    values: Mapping[str, np.ndarray],
    writes: Mapping[str, np.ndarray],
) -> None:
    """The worker's end."""
    for move in bucket:
        part = wire[move.offset : move.offset + move.numel].reshape(move.target.shape)
        strided(values, move.target)[...] = part
        strided(writes, move.target)[...] += 1


def strided(parameters: Mapping[str, np.ndarray], view: View) -> np.ndarray:
    """As torch.as_strided, and within the parameter."""
    flat = parameters[view.parameter].reshape(-1)
    last = sum((n - 1) * step for n, step in zip(view.shape, view.stride, strict=True))
    assert 0 <= view.offset <= view.offset + last < flat.size
    strides = [step * flat.itemsize for step in view.stride]
    return np.lib.stride_tricks.as_strided(flat[view.offset :], view.shape, strides)


# ---- buckets ----------------------------------------------------------------------------


@settings(max_examples=40)
@given(cases())
def test_both_ends_see_the_same_buckets(case: Case) -> None:
    received = {
        (rank, engine, worker): buckets
        for engine in range(case.n_engines)
        for worker in range(case.engine.tp_size)
        for rank, buckets in incoming(
            [route for route in case.routes if route.worker == worker], engine, case.limit
        ).items()
    }
    assert case.sent() == received


@settings(max_examples=40)
@given(cases())
def test_buckets_are_full_of_needed_elements_and_no_larger_than_the_limit(case: Case) -> None:
    n_elements: Counter[tuple[int, int]] = Counter()
    for (_, engine, worker), buckets in case.sent().items():
        for bucket in buckets:
            ends = [move.offset + move.numel for move in bucket]
            assert [move.offset for move in bucket] == [0, *ends[:-1]]
            assert bucket_elements(bucket) == ends[-1] <= case.limit
            n_elements[engine, worker] += bucket_elements(bucket)
        for bucket, following in pairwise(buckets):
            assert bucket_elements(bucket) + following[0].numel > case.limit
    needed = {
        (engine, worker): int(sum((weights != PADDING).sum() for weights in parameters.values()))
        for worker in range(case.engine.tp_size)
        for parameters in [weights(case.engine, case.hf, worker)]
        for engine in range(case.n_engines)
    }
    assert n_elements == needed


def one_tensor(shape: tuple[int, ...]) -> tuple[dict[str, list[Held]], list[list[Destination]]]:
    """A tensor that one rank holds and one worker wants."""
    whole = Box.whole(shape)
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    held = {"w": [Held(whole, "p", whole, (0,))]}
    return held, [[Destination("w", whole, View("v", 0, shape, strides))]]


def test_a_rectangle_is_cut_along_its_rows() -> None:
    """7 rows of 3 in buckets of 10: 3, 3 and 1 rows."""
    routes = make_routes(*one_tensor((7, 3)))
    (buckets,) = outgoing(routes, 0, 1, 10).values()
    moves = [move for bucket in buckets for move in bucket]
    assert [move.source_box.ranges[0] for move in moves] == [(0, 3), (3, 6), (6, 7)]
    assert [move.target.offset for move in moves] == [0, 9, 18]
    assert [len(bucket) for bucket in buckets] == [1, 1, 1]


def test_a_row_that_exceeds_a_bucket_is_refused() -> None:
    with pytest.raises(AssertionError, match="a row of 11 elements exceeds a bucket of 10"):
        outgoing(make_routes(*one_tensor((2, 11))), 0, 1, 10)


# ---- who sends --------------------------------------------------------------------------


@settings(max_examples=40)
@given(cases())
def test_for_one_engine_no_sender_is_ahead_by_more_than_its_last_rectangle(case: Case) -> None:
    """Of any rectangle, the sender was given no more before it than each of the others was in
    the end. So ranks that hold the same shards differ by at most one rectangle."""
    load: Counter[int] = Counter()
    last: dict[int, Route] = {}
    for route in case.routes:
        _, rank = route.source(0)
        load[rank] += size(route)
        last[rank] = route
    for rank, route in last.items():
        assert load[rank] - size(route) <= min(load[other] for other in senders(route))


@settings(max_examples=30)
@given(cases())
def test_engines_take_the_possible_senders_in_turn(case: Case) -> None:
    for route in case.routes:
        ranks = senders(route)
        for engine in range(2 * len(ranks)):
            held, rank = route.source(engine)
            assert rank == ranks[(route.pick + engine) % len(ranks)]
            assert rank in held.ranks
            assert held.hf.intersect(route.box) == route.box


@settings(max_examples=30)
@given(cases())
def test_ranks_with_the_same_shards_send_the_same_to_enough_engines(case: Case) -> None:
    """Enough: a multiple of the number of possible senders of every rectangle."""
    n_engines = math.lcm(*(len(senders(route)) for route in case.routes))
    sent = replace(case, n_engines=n_engines).sent()
    load: Counter[int] = Counter()
    for (rank, _, _), buckets in sent.items():
        load[rank] += sum(map(bucket_elements, buckets))
    expected: Counter[int] = Counter()
    for route in case.routes:
        for rank in senders(route):
            expected[rank] += size(route) * n_engines // len(senders(route))
    assert load == expected


@settings(max_examples=30)
@given(cases(), st.data())
def test_the_nearest_of_the_holders_sends_wherever_everybody_is(
    case: Case, data: st.DataObject
) -> None:
    """Random GPUs, two to a host; both ends and the forecast count the same."""
    tp = case.engine.tp_size
    gpus = st.integers(0, 5).map(lambda n: Seat(host=f"h{n // 2}", gpu=f"G{n}"))
    links = Links(
        transport="auto",
        ranks=tuple(data.draw(gpus) for _ in range(case.grid.world_size)),
        workers=tuple(data.draw(gpus) for _ in range(case.n_engines * tp)),
        n_workers=tp,
    )
    for route in case.routes:
        for engine in range(case.n_engines):
            _, rank = route.source(engine, links.nearest)
            far = {r: links.distance(r, engine * tp + route.worker) for r in route.ranks}
            assert far[rank] == min(far.values())
    sent = {
        (rank, *to): buckets
        for rank in range(case.grid.world_size)
        for to, buckets in outgoing(
            case.routes, rank, case.n_engines, case.limit, links.nearest
        ).items()
    }
    received = {
        (rank, engine, worker): buckets
        for engine in range(case.n_engines)
        for worker in range(tp)
        for rank, buckets in incoming(
            [route for route in case.routes if route.worker == worker],
            engine, case.limit, links.nearest,
        ).items()
    }  # fmt: skip
    assert sent == received
    found = forecast(case.grid, case.engine, links)
    by_rank, by_way = Counter[int](), Counter[tuple[Distance, Way]]()
    for (rank, engine, worker), part in sent.items():
        n, receiver = sum(map(bucket_elements, part)), engine * tp + worker
        by_rank[rank] += n
        by_way[links.distance(rank, receiver), links.way(rank, receiver)] += n
    assert found.by_way == by_way and found.n_routes == len(case.routes)
    assert found.sent == found.bound == by_rank.total()
    assert (found.most_sent, found.n_senders) == (max(by_rank.values()), len(by_rank))


# ---- what is missing --------------------------------------------------------------------

FIXED = Case(
    grid=PolicyGrid(tp_size=2, dp_size=2, pp_size=2, ep_size=2, stage_of_layer=(0, 1)),
    engine=Engine(
        model=ModelShape(
            architecture="Any",
            num_layers=2,
            hidden_size=4,
            ffn_size=8,
            num_heads=4,
            num_kv_heads=2,
            head_dim=2,
            vocab_size=100,
            tied=True,
            qkv_bias=True,
            qk_norm=True,
            rope_theta=1e4,
            rms_norm_eps=1e-6,
            max_position_embeddings=16,
            moe=MoEShape(
                num_experts=2,
                experts_per_token=1,
                ffn_size=8,
                shared_ffn_size=4,
                renormalised=True,
            ),
        ),
        tp_size=2,
    ),
    n_engines=1,
    limit=64,
)


@pytest.mark.parametrize("name", hf_shapes(FIXED.model))
def test_a_tensor_that_no_rank_holds_is_named(name: str) -> None:
    held = held_by_policy(FIXED.model, FIXED.grid)
    del held[name]
    with pytest.raises(ValueError, match=f"^{name}: the policy holds 0 of the "):
        make_routes(held, FIXED.destinations)


def test_a_tensor_of_which_a_part_is_missing_is_named() -> None:
    """The second worker's columns of o_proj are those of the second tensor-parallel rank."""
    name = "model.layers.1.self_attn.o_proj.weight"
    held = held_by_policy(FIXED.model, FIXED.grid)
    held[name] = held[name][:1]
    message = rf"^{name}: the policy holds 0 of the 16 elements of box \(\(0, 4\), \(4, 8\)\)$"
    with pytest.raises(ValueError, match=message):
        make_routes(held, FIXED.destinations)


def test_a_tensor_that_the_engine_does_not_load_is_not_sent() -> None:
    wanted = [[d for d in worker if "norm" not in d.hf_name] for worker in FIXED.destinations]
    routes = make_routes(held_by_policy(FIXED.model, FIXED.grid), wanted)
    assert not any("norm" in route.target.parameter for route in routes)


# ---- fingerprint ------------------------------------------------------------------------


def changed_routes(routes: Sequence[Route]) -> Iterator[tuple[str, list[Route]]]:
    """The same routes with one thing changed in the first of them, or in their order."""
    first, *rest = routes
    (held, *more), view = first.sources, first.target
    moved = Box(tuple((start + 1, stop + 1) for start, stop in first.box.ranges))
    targets = {
        "parameter": replace(view, parameter="x"),
        "offset": replace(view, offset=view.offset + 1),
        "shape": replace(view, shape=(*view.shape, 1)),
        "stride": replace(view, stride=(*view.stride, 1)),
    }
    sources = {
        "source box": replace(held, hf=moved),
        "source parameter": replace(held, parameter="x"),
        "source place": replace(held, local=moved),
        "ranks": replace(held, ranks=(*held.ranks, 99)),
    }
    yield "worker", [replace(first, worker=first.worker + 1), *rest]
    yield "box", [replace(first, box=moved), *rest]
    yield "pick", [replace(first, pick=first.pick + 1), *rest]
    for name, target in targets.items():
        yield name, [replace(first, target=target), *rest]
    for name, source in sources.items():
        yield name, [replace(first, sources=(source, *more)), *rest]
    yield "one source fewer", [replace(first, sources=tuple(more)), *rest]
    yield "order", [*rest, first]
    yield "one route fewer", rest
    yield "one route more", [*routes, first]


def test_the_fingerprint_differs_when_anything_differs() -> None:
    variants = dict(changed_routes(FIXED.routes))
    digests = {name: fingerprint(routes) for name, routes in variants.items()}
    digests["unchanged"] = fingerprint(FIXED.routes)
    assert len(set(digests.values())) == len(digests), digests


def test_the_fingerprint_is_the_same_in_another_process() -> None:
    code = f"from tests.unit.{Path(__file__).stem} import *; print(fingerprint(FIXED.routes))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert other.stdout.strip() == fingerprint(FIXED.routes)
