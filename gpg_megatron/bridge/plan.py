"""Who sends which rectangle to whom: a pure function of both sides' layouts.

    held (topology.py)  x  destinations (what the workers of one engine recorded)
        -> routes: the intersections in Hugging Face coordinates, each with its possible senders
        -> outgoing buckets of a rank, incoming buckets of a worker

All engines are alike, so the routes are made for one engine and hold for all: of the possible
senders that are nearest to its worker (links.py) engine e takes the e-th next. The result is the
same on every rank; nothing here communicates.
"""

from __future__ import annotations

import functools
import hashlib
import marshal
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gpg_megatron.bridge.links import Nearest, everyone
from gpg_megatron.layout.boxes import Box
from gpg_megatron.layout.topology import Held


@dataclass(frozen=True, slots=True)
class View:
    """A strided view of an engine worker's parameter, as torch.as_strided takes it."""

    parameter: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def narrowed(self, box: Box) -> View:
        """The part of the view that a box in the view's own coordinates covers."""
        if box.shape == self.shape:
            return self
        offset = self.offset
        for (start, _), stride in zip(box.ranges, self.stride, strict=True):
            offset += start * stride
        return View(self.parameter, offset, box.shape, self.stride)


@dataclass(frozen=True, slots=True)
class Destination:
    """A box of a Hugging Face tensor and the view of a worker's parameter where it lives."""

    hf_name: str
    hf: Box
    view: View


@dataclass(frozen=True, slots=True)
class Route:
    """One rectangle that one worker of every engine needs."""

    worker: int
    """Rank within the engine."""
    box: Box
    """In the coordinates of the Hugging Face tensor."""
    target: View
    sources: tuple[Held, ...]
    """Who holds it; several only where a tensor lies on two pipeline stages."""
    pick: int
    """Which of the possible senders, counted over all sources, serves engine 0, if all of them
    are equally near."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The possible senders, over all sources."""
        return _ranks_of(self.sources)

    def source(self, engine: int, nearest: Nearest = everyone) -> tuple[Held, int]:
        """What engine `engine` receives it from: the source and the sending rank."""
        index = turn(self.ranks, self.pick, engine, self.worker, nearest)
        for held in self.sources:
            if index < len(held.ranks):
                return held, held.ranks[index]
            index -= len(held.ranks)
        raise AssertionError("the index is within the sources")


@dataclass(frozen=True, slots=True)
class Move:
    """A rectangle on its way: a box of a sender's parameter into a view of a worker's."""

    parameter: str
    source_box: Box
    target: View
    offset: int
    """First element within the bucket."""
    place: int = field(compare=False)
    """Of its route among those that were given: what belongs together has neighbouring ones."""

    @property
    def numel(self) -> int:
        """Elements."""
        return self.source_box.numel


Bucket = tuple[Move, ...]


def turn(ranks: tuple[int, ...], pick: int, engine: int, worker: int, nearest: Nearest) -> int:
    """The position of the sender among the possible ones."""
    if len(ranks) == 1:
        return 0
    near = nearest(ranks, engine, worker)
    return near[(pick + engine) % len(near)]


def bucket_elements(bucket: Bucket) -> int:
    """Elements in a bucket."""
    return bucket[-1].offset + bucket[-1].numel


def make_routes(
    held: Mapping[str, Sequence[Held]], destinations: Sequence[Sequence[Destination]]
) -> list[Route]:
    """Cover every element of every destination exactly once.

    Of the ranks that hold a rectangle, the one that has been given least so far sends it.

    Args:
        held: from held_by_policy.
        destinations: for each worker of one engine, what its loaders recorded.

    Raises:
        ValueError: a destination element that no rank holds; the tensor is named.
    """
    load: defaultdict[int, int] = defaultdict(int)
    routes = []
    # Layers and experts are alike: few lists of boxes, and those are the same objects.
    alike: dict[tuple[int, ...], Overlaps] = {}
    tensors = {}
    for name, rectangles in held.items():
        key = tuple([id(x.hf) for x in rectangles])
        if key not in alike:
            alike[key] = Overlaps([x.hf for x in rectangles])
        tensors[name] = alike[key], rectangles
    nobody: tuple[Overlaps, Sequence[Held]] = Overlaps([]), ()
    for worker, wanted in enumerate(destinations):
        for destination in wanted:
            overlaps, rectangles = tensors.get(destination.hf_name, nobody)
            parts, covered = overlaps[destination.hf]
            if covered is not None:
                raise ValueError(
                    f"{destination.hf_name}: the policy holds {covered} of the "
                    f"{destination.hf.numel} elements of box {destination.hf.ranges}"
                )
            for holders, common, part, numel in parts:
                sources = tuple([rectangles[i] for i in holders])
                pick = lightest(load, _ranks_of(sources), numel)
                view = destination.view
                target = view if part is None else view.narrowed(part)
                routes.append(Route(worker, common, target, sources, pick))
    return routes


def lightest(load: defaultdict[int, int], ranks: Sequence[int], numel: int) -> int:
    """The position of the rank that has been given least so far; now it has so many more."""
    if len(ranks) == 1:
        pick = 0
    else:
        loads = [load[rank] for rank in ranks]
        pick = loads.index(min(loads))
    load[ranks[pick]] += numel
    return pick


def outgoing(
    routes: Sequence[Route], rank: int, n_engines: int, limit: int, nearest: Nearest = everyone
) -> dict[tuple[int, int], list[Bucket]]:
    """(engine, worker) -> the buckets that a policy rank sends there, in order.

    Args:
        limit: largest bucket, in elements.
    """
    result: dict[tuple[int, int], _Packer] = defaultdict(lambda: _Packer(limit))

    @functools.cache
    def served(ranks: tuple[int, ...], pick: int, worker: int) -> list[int]:
        senders = (ranks[turn(ranks, pick, e, worker, nearest)] for e in range(n_engines))
        return [engine for engine, sender in enumerate(senders) if sender == rank]

    for index, route in enumerate(routes):
        ranks = route.ranks
        for engine in served(ranks, route.pick, route.worker) if rank in ranks else ():
            held, _ = route.source(engine, nearest)
            result[engine, route.worker].add(route, held, index)
    return {pair: packer.buckets() for pair, packer in sorted(result.items())}


def incoming(
    routes: Iterable[Route], engine: int, limit: int, nearest: Nearest = everyone
) -> dict[int, list[Bucket]]:
    """Sending rank -> the buckets that arrive from it, in order.

    Args:
        routes: those of one worker.
    """
    result: dict[int, _Packer] = defaultdict(lambda: _Packer(limit))
    for index, route in enumerate(routes):
        held, sender = route.source(engine, nearest)
        result[sender].add(route, held, index)
    return {sender: packer.buckets() for sender, packer in sorted(result.items())}


def agreed_order(
    n_messages: Mapping[tuple[int, int], int], n_receivers: int
) -> list[tuple[int, int, int]]:
    """All messages as (sender, receiver, number), in the one order that every end keeps.

    Each end does its own part of it one after the other. Then nobody waits in a circle: of the
    messages that have not arrived, the first has both of its ends waiting for it alone. Pairs
    advance through the model at the same pace, and senders begin with different receivers.

    Args:
        n_messages: (sender, receiver) -> how many; an end needs only its own pairs.
        n_receivers: of all engines.
    """

    def place(message: tuple[int, int, int]) -> tuple[float, int, int]:
        sender, receiver, number = message
        progress = (2 * number + 1) / (2 * n_messages[sender, receiver])
        return progress, (receiver - sender) % n_receivers, sender

    return sorted(((*pair, i) for pair, n in n_messages.items() for i in range(n)), key=place)


def fingerprint(routes: Iterable[Route]) -> str:
    """A digest that is equal exactly when two sides have the same routes."""
    digest = hashlib.blake2b(digest_size=16)
    for route in routes:
        view = route.target
        target = (view.parameter, view.offset, view.shape, view.stride)
        sources = [(s.parameter, s.hf.ranges, s.local.ranges, s.ranks) for s in route.sources]
        line = (route.worker, route.box.ranges, target, sources, route.pick)
        # Version 2 spells equal values alike; later ones refer to objects that came before.
        digest.update(marshal.dumps(line, 2))
    return digest.hexdigest()


def _ranks_of(sources: Sequence[Held]) -> tuple[int, ...]:
    if len(sources) == 1:
        return sources[0].ranks
    return tuple(rank for held in sources for rank in held.ranks)


_Overlap = tuple[tuple[int, ...], Box, Box | None, int]
"""Positions of the rectangles that are one box, what the wanted one has in common with it, the same
within the wanted one (None: it is all of it), and its elements."""


class Overlaps(dict[Box, tuple[list[_Overlap], int | None]]):
    """Of the boxes of a tensor: wanted box -> its overlap with each different one, and how many of
    its elements are in them (None: all)."""

    def __init__(self, boxes: Sequence[Box]) -> None:
        self._holders: dict[Box, list[int]] = defaultdict(list)
        for i, box in enumerate(boxes):
            self._holders[box].append(i)

    def __missing__(self, wanted: Box) -> tuple[list[_Overlap], int | None]:
        parts: list[_Overlap] = []
        for box, holders in self._holders.items():
            if common := box.intersect(wanted):
                part = None if common == wanted else common.relative_to(wanted)
                parts.append((tuple(holders), common, part, common.numel))
        covered = sum(numel for *_, numel in parts)
        self[wanted] = found = parts, None if covered == wanted.numel else covered
        return found


class _Packer:
    """Lays rectangles end to end in buckets of at most `limit` elements, in order."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._moves: list[list[Move]] = []
        self._used = limit

    def add(self, route: Route, held: Held, place: int) -> None:
        """Append a route's rectangle, cut along its rows where a bucket is full."""
        for box in _row_runs(route.box, self._limit):
            if self._used + box.numel > self._limit:
                self._moves.append([])
                self._used = 0
            local = box.relative_to(held.hf).shifted(held.local)
            target = route.target.narrowed(box.relative_to(route.box))
            self._moves[-1].append(Move(held.parameter, local, target, self._used, place))
            self._used += box.numel

    def buckets(self) -> list[Bucket]:
        return [tuple(moves) for moves in self._moves]


def _row_runs(box: Box, limit: int) -> Iterator[Box]:
    """A box cut along its first dimension into parts of at most `limit` elements."""
    (first, stop), *rest = box.ranges
    row = box.numel // (stop - first)
    assert row <= limit, f"a row of {row} elements exceeds a bucket of {limit}"
    step = limit // row
    for start in range(first, stop, step):
        yield Box(((start, min(start + step, stop)), *rest))
