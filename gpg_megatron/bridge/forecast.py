"""What one publish will move, from the shapes alone: nothing is sent, no engine runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from gpg_megatron.bridge.engine_layout import Engine, destinations, parameter_shapes
from gpg_megatron.bridge.links import Distance, Links, Nearest, Way, everyone
from gpg_megatron.bridge.plan import Route, make_routes, turn
from gpg_megatron.layout.topology import PolicyGrid, held_by_policy, hf_shapes
from gpg_megatron.shapes import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Of one publish to all engines. Elements; times the wire type's size they are bytes."""

    sent: int
    """By all ranks together."""
    bound: int
    """What the engines' parameters hold of the model: fewer cannot cross."""
    most_sent: int
    """By the rank that sends most."""
    share: float
    """Of each rank, if all sent as much."""
    received: int
    """By the worker that receives most."""
    n_routes: int
    """Rectangles of one engine."""
    n_senders: int
    """Ranks that send anything."""
    by_way: Mapping[tuple[Distance, Way], int]
    """What goes how far and by which way; the nearest first."""


def forecast(grid: PolicyGrid, engine: Engine, links: Links) -> Forecast:
    """Plan as every rank does, and count."""
    n_engines = len(links.workers) // engine.tp_size
    shapes = hf_shapes(engine.model)
    workers = range(engine.tp_size)
    wanted = [destinations(engine, shapes, worker) for worker in workers]
    routes = make_routes(held_by_policy(engine.model, grid), wanted)
    pairs = sent_elements(routes, n_engines, cache(links.nearest))
    sent: Counter[int] = Counter()
    by_way: Counter[tuple[Distance, Way]] = Counter()
    for (rank, engine_number, worker), n in pairs.items():
        receiver = engine_number * engine.tp_size + worker
        sent[rank] += n
        by_way[links.distance(rank, receiver), links.way(rank, receiver)] += n
    received = [sum(d.hf.numel for d in part) for part in wanted]
    return Forecast(
        sent=sum(sent.values()),
        bound=n_engines * sum(received),
        most_sent=max(sent.values()),
        share=sum(sent.values()) / grid.world_size,
        received=max(received),
        n_routes=len(routes),
        n_senders=sum(n > 0 for n in sent.values()),
        by_way=dict(sorted(by_way.items())),
    )


def worker_parameters(model: ModelShape, tp_size: int) -> int:
    """Parameters of the worker that holds most of them."""
    engine = Engine(model=model, tp_size=tp_size)
    return max(worker_elements(engine, worker) for worker in range(tp_size))


def worker_elements(engine: Engine, worker: int) -> int:
    """Elements of all parameters of one worker, rows of padding included."""
    shapes = parameter_shapes(engine, hf_shapes(engine.model), worker)
    return sum(math.prod(shape) for shape in shapes.values())


def sent_elements(
    routes: Iterable[Route], n_engines: int, nearest: Nearest = everyone
) -> Counter[tuple[int, int, int]]:
    """(rank, engine, worker) -> elements, without making the buckets."""
    alike: Counter[tuple[tuple[int, ...], int, int]] = Counter()
    for route in routes:
        alike[route.ranks, route.pick, route.worker] += route.box.numel
    result: Counter[tuple[int, int, int]] = Counter()
    for (ranks, pick, worker), n in alike.items():
        for engine in range(n_engines):
            rank = ranks[turn(ranks, pick, engine, worker, nearest)]
            result[rank, engine, worker] += n
    return result
