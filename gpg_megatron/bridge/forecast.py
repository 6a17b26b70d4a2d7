"""What one publish will move, from the shapes alone: nothing is sent, no engine runs."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from gpg_megatron.bridge.engine_layout import Engine, destinations, parameter_shapes
from gpg_megatron.bridge.links import Distance, Links, Nearest, Way, everyone
from gpg_megatron.bridge.plan import Overlaps, lightest, turn
from gpg_megatron.layout.topology import Alike, PolicyGrid, alike_by_policy, hf_shapes
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


_Choice = tuple[tuple[int, ...], int, int]
"""Ranks, pick and worker that routes have in common."""


def forecast(grid: PolicyGrid, engine: Engine, links: Links) -> Forecast:
    """Plan as every rank does, and count."""
    n_engines = len(links.workers) // engine.tp_size
    planned, received, n_routes = _plan(grid, engine)
    pairs = sent_elements(planned, n_engines, cache(links.nearest))
    sent: Counter[int] = Counter()
    by_way: Counter[tuple[Distance, Way]] = Counter()
    for (rank, engine_number, worker), n in pairs.items():
        receiver = engine_number * engine.tp_size + worker
        sent[rank] += n
        distance = links.distance(rank, receiver)
        by_way[distance, links.way(rank, receiver, distance)] += n
    return Forecast(
        sent=sum(sent.values()),
        bound=n_engines * sum(received),
        most_sent=max(sent.values()),
        share=sum(sent.values()) / grid.world_size,
        received=max(received),
        n_routes=n_routes,
        n_senders=sum(n > 0 for n in sent.values()),
        by_way=dict(sorted(by_way.items())),
    )


def _plan(grid: PolicyGrid, engine: Engine) -> tuple[Counter[_Choice], list[int], int]:
    """The elements of the routes, what each worker wants, and how many routes there are."""
    kinds: dict[str, _Kind] = {}
    for name, _, alike in alike_by_policy(engine.model, grid):
        kinds[name] = (*kinds.get(name, ()), alike)
    shapes = hf_shapes(engine.model)
    sequence = list(_in_order(kinds, shapes, engine))
    load: defaultdict[int, int] = defaultdict(int)
    planned: Counter[_Choice] = Counter()
    received, n_routes = [0] * engine.tp_size, 0
    for worker in range(engine.tp_size):
        cut = _Cuts(engine, worker)
        parts_of: dict[object, tuple[_Parts, int]] = {}
        for name, times in sequence:
            # A whole expert is one worker's: to engines they are not alike.
            kind = name if engine.expert_parallel else kinds[name]
            if kind not in parts_of:
                parts_of[kind] = cut.parts(name, shapes[name], kinds[name])
            parts, n_wanted = parts_of[kind]
            received[worker] += times * n_wanted
            n_routes += times * len(parts)
            for ranks, n in parts:
                planned[ranks, lightest(load, ranks, times * n), worker] += times * n
    return planned, received, n_routes


_Kind = tuple[Alike, ...]
_Parts = list[tuple[tuple[int, ...], int]]
"""Ranks and elements of routes."""


class _Cuts:
    """What one worker needs of tensors; those with the same boxes are cut once."""

    def __init__(self, engine: Engine, worker: int) -> None:
        self._engine, self._worker = engine, worker
        self._cuts: dict[object, tuple[list[tuple[tuple[int, ...], int]], int]] = {}

    def parts(self, name: str, shape: tuple[int, ...], kind: _Kind) -> tuple[_Parts, int]:
        """The routes, and the elements that the worker wants."""
        rectangles = [x for alike in kind for x in alike.rectangles]
        key = name if self._engine.expert_parallel else tuple([id(hf) for hf, *_ in rectangles])
        if key not in self._cuts:
            overlaps = Overlaps([hf for hf, *_ in rectangles])
            wanted = destinations(self._engine, {name: shape}, self._worker)
            found = [part for x in wanted for part in overlaps[x.hf][0]]
            n_wanted = sum(x.hf.numel for x in wanted)
            self._cuts[key] = [(holders, n) for holders, _, _, n in found], n_wanted
        cut, n_wanted = self._cuts[key]
        ranks = [tuple([r for i in holders for r in rectangles[i][2]]) for holders, _ in cut]
        return [(x, n) for x, (_, n) in zip(ranks, cut, strict=True)], n_wanted


def _in_order(
    kinds: Mapping[str, _Kind], shapes: Iterable[str], engine: Engine
) -> Iterator[tuple[str, int]]:
    """Tensors in their order, and how often their kind is there. Which of them has a sender that
    is not chosen does not matter until there is a choice: till then they are counted."""
    waiting: dict[_Kind, tuple[str, int]] = {}
    is_chosen = cache(lambda kind: len(kind) > 1 or any(len(x[2]) > 1 for x in kind[0].rectangles))
    for name in shapes:
        kind = kinds[name]
        if engine.expert_parallel or is_chosen(kind):
            yield from waiting.values()
            waiting.clear()
            yield name, 1
        else:
            waiting[kind] = name, waiting.get(kind, ("", 0))[1] + 1
    yield from waiting.values()


def worker_parameters(model: ModelShape, tp_size: int) -> int:
    """Parameters of each worker: with their padding they are alike."""
    return worker_elements(Engine(model=model, tp_size=tp_size), 0)


def worker_elements(engine: Engine, worker: int) -> int:
    """Elements of all parameters of one worker, rows of padding included."""
    shapes = parameter_shapes(engine, hf_shapes(engine.model), worker)
    return sum(math.prod(shape) for shape in shapes.values())


def sent_elements(
    planned: Mapping[_Choice, int],
    n_engines: int,
    nearest: Nearest = everyone,
) -> Counter[tuple[int, int, int]]:
    """(rank, engine, worker) -> elements, without making the buckets.

    planned: elements of the routes that have the same ranks, pick and worker.
    """
    result: Counter[tuple[int, int, int]] = Counter()
    for (ranks, pick, worker), n in planned.items():
        for engine in range(n_engines):
            rank = ranks[turn(ranks, pick, engine, worker, nearest)]
            result[rank, engine, worker] += n
    return result
