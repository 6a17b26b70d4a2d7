"""What one publish will move, from the shapes alone: nothing is sent, no engine runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from gpg_megatron.bridge.engine_layout import Engine, destinations, parameter_shapes
from gpg_megatron.bridge.plan import Route, make_routes
from gpg_megatron.layout.topology import PolicyGrid, held_by_policy, hf_shapes
from gpg_megatron.types import ModelShape


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


def forecast(grid: PolicyGrid, engine: Engine, n_engines: int) -> Forecast:
    """Plan as every rank does, and count."""
    shapes = hf_shapes(engine.model)
    workers = range(engine.tp_size)
    wanted = [destinations(engine, shapes, worker) for worker in workers]
    routes = make_routes(held_by_policy(engine.model, grid), wanted)
    sent = sent_elements(routes, n_engines)
    received = [sum(d.hf.numel for d in part) for part in wanted]
    return Forecast(
        sent=sum(sent.values()),
        bound=n_engines * sum(received),
        most_sent=max(sent.values()),
        share=sum(sent.values()) / grid.world_size,
        received=max(received),
        n_routes=len(routes),
        n_senders=sum(n > 0 for n in sent.values()),
    )


def worker_parameters(model: ModelShape, tp_size: int) -> int:
    """Parameters of the worker that holds most of them."""
    engine = Engine(model=model, tp_size=tp_size)
    return max(worker_elements(engine, worker) for worker in range(tp_size))


def worker_elements(engine: Engine, worker: int) -> int:
    """Elements of all parameters of one worker, rows of padding included."""
    shapes = parameter_shapes(engine, hf_shapes(engine.model), worker)
    return sum(math.prod(shape) for shape in shapes.values())


def sent_elements(routes: Iterable[Route], n_engines: int) -> Counter[int]:
    """Rank -> elements to all engines, without making the buckets."""
    first: dict[tuple[int, ...], list[int]] = {}
    for route in routes:
        ranks = tuple(rank for held in route.sources for rank in held.ranks)
        first.setdefault(ranks, [0] * len(ranks))[route.pick] += route.box.numel
    result: Counter[int] = Counter()
    for ranks, loads in first.items():
        rounds, rest = divmod(n_engines, len(ranks))
        for i, rank in enumerate(ranks):
            # Engine e takes the e-th next sender: place i has what engine 0 has at place i - e.
            result[rank] += rounds * sum(loads) + sum(loads[i - e] for e in range(rest))
    return result
