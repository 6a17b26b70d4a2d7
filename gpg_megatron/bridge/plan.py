"""Who sends which rectangle to whom: a pure function of both sides' layouts.

    sources (Megatron pieces of every rank)  x  destinations (what each engine worker recorded)
        -> moves (intersections in Hugging Face coordinates)
        -> buckets per sender, of bounded size

Every rank computes the same plan from the same input; nothing here communicates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpg_megatron.bridge.layout import Box, Piece


@dataclass(frozen=True, slots=True)
class Source:
    """A piece of a parameter shard on a policy rank."""

    rank: int
    parameter: str
    piece: Piece


@dataclass(frozen=True, slots=True)
class View:
    """A strided view of an engine worker's parameter, as torch.as_strided takes it."""

    parameter: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def narrowed(self, box: Box) -> View:
        """The part of the view that a box in the view's own coordinates covers."""
        offset = self.offset + sum(
            start * stride for (start, _), stride in zip(box.ranges, self.stride, strict=True)
        )
        return View(self.parameter, offset, box.shape, self.stride)


@dataclass(frozen=True, slots=True)
class Destination:
    """A box of a Hugging Face tensor and the view of a worker's parameter where it lives."""

    hf_name: str
    hf: Box
    view: View


@dataclass(frozen=True, slots=True)
class Move:
    """One rectangle on its way: a box of a sender's parameter into a view of a worker's."""

    worker: int
    """Index of the engine worker over all engines."""
    source: str
    source_box: Box
    target: View
    offset: int
    """First element within the sender's bucket."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The moves of every sender, in buckets."""

    buckets: Mapping[int, tuple[tuple[Move, ...], ...]]
    """sender rank -> its buckets, in order; ranks that send nothing are absent."""

    @property
    def n_rounds(self) -> int:
        """Buckets of the sender that has most."""
        return max((len(b) for b in self.buckets.values()), default=0)

    @property
    def n_elements(self) -> int:
        """Elements that cross, over all senders and workers."""
        return sum(
            move.source_box.numel
            for buckets in self.buckets.values()
            for bucket in buckets
            for move in bucket
        )


def make_plan(
    sources: Sequence[Source],
    destinations: Sequence[Sequence[Destination]],
    *,
    bucket_elements: int,
) -> Plan:
    """Cover every element of every destination exactly once.

    Where several ranks hold the same box (tensor- or data-parallel copies, tied embeddings),
    the one that has been given least to send so far takes it.

    Args:
        sources: all pieces of all ranks.
        destinations: for each worker, what its loaders recorded.
        bucket_elements: largest bucket; at least 1.

    Raises:
        ValueError: a destination element that no source holds, naming the tensor.
    """
    owners: dict[str, dict[Box, list[Source]]] = defaultdict(lambda: defaultdict(list))
    for source in sources:
        owners[source.piece.hf_name][source.piece.hf].append(source)
    load: dict[int, int] = defaultdict(int)
    moves: dict[int, list[Move]] = defaultdict(list)
    for worker, wanted in enumerate(destinations):
        for destination in wanted:
            covered = 0
            for candidates in owners.get(destination.hf_name, {}).values():
                common = candidates[0].piece.hf.intersect(destination.hf)
                if common is None:
                    continue
                source = min(candidates, key=lambda s: (load[s.rank], s.rank))
                load[source.rank] += common.numel
                covered += common.numel
                moves[source.rank] += _moves(source, destination, common, worker, bucket_elements)
            if covered != destination.hf.numel:
                raise ValueError(
                    f"{destination.hf_name}: {covered} of {destination.hf.numel} elements of box "
                    f"{destination.hf.ranges} are held by the policy's ranks"
                )
    return Plan({rank: _buckets(moves[rank], bucket_elements) for rank in sorted(moves)})


def _moves(
    source: Source, destination: Destination, common: Box, worker: int, limit: int
) -> list[Move]:
    """The move of one common box, cut along its first dimension where it exceeds a bucket."""
    rows = common.shape[0]
    rows_per_move = max(1, limit // max(1, common.numel // rows))
    (first, _), *rest = common.ranges
    result = []
    for start in range(0, rows, rows_per_move):
        stop = min(start + rows_per_move, rows)
        box = Box(((first + start, first + stop), *rest))
        assert box.numel <= limit, f"a single row of {destination.hf_name} exceeds a bucket"
        local = box.relative_to(source.piece.hf).shifted(source.piece.local)
        target = destination.view.narrowed(box.relative_to(destination.hf))
        result.append(Move(worker, source.parameter, local, target, 0))
    return result


def _buckets(moves: Sequence[Move], limit: int) -> tuple[tuple[Move, ...], ...]:
    """Lay moves end to end in buckets of at most limit elements, keeping their order."""
    buckets: list[list[Move]] = []
    used = limit
    for move in moves:
        if used + move.source_box.numel > limit:
            buckets.append([])
            used = 0
        buckets[-1].append(Move(move.worker, move.source, move.source_box, move.target, used))
        used += move.source_box.numel
    return tuple(tuple(bucket) for bucket in buckets)
