"""How one Megatron shard maps onto Hugging Face tensors: lists of rectangles.

A Piece says: this box of the local parameter holds that box of that Hugging Face tensor.
Loading, saving and moving weights all intersect boxes; nobody does head arithmetic again.

    Megatron shard --layout--> pieces in Hugging Face coordinates <--recording-- vLLM shard
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpg_megatron.shapes import ModelShape


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of a tensor: [start, stop) for each dimension."""

    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box that covers a tensor of this shape."""
        return cls(tuple((0, n) for n in shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent of each dimension."""
        return tuple(stop - start for start, stop in self.ranges)

    @property
    def numel(self) -> int:
        """Number of elements."""
        n = 1
        for start, stop in self.ranges:
            n *= stop - start
        return n

    @property
    def slices(self) -> tuple[slice, ...]:
        """For indexing: tensor[box.slices]."""
        return tuple(slice(start, stop) for start, stop in self.ranges)

    def intersect(self, other: Box) -> Box | None:
        """The common rectangle; None when it is empty."""
        assert len(self.ranges) == len(other.ranges), (self, other)
        ranges = []
        for (a, b), (c, d) in zip(self.ranges, other.ranges, strict=True):
            start, stop = max(a, c), min(b, d)
            if start >= stop:
                return None
            ranges.append((start, stop))
        return Box(tuple(ranges))

    def relative_to(self, origin: Box) -> Box:
        """The same rectangle in coordinates that start at origin's first corner."""
        return Box(
            tuple((a - o, b - o) for (a, b), (o, _) in zip(self.ranges, origin.ranges, strict=True))
        )

    def shifted(self, origin: Box) -> Box:
        """The inverse of relative_to."""
        return Box(
            tuple((a + o, b + o) for (a, b), (o, _) in zip(self.ranges, origin.ranges, strict=True))
        )


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Elements [start, stop) of a row-major tensor as rectangles, in their order. Of a matrix at
    most three: the end of a row, whole rows, the beginning of a row."""
    if start >= stop:
        return []
    if len(shape) == 1:
        return [Box(((start, stop),))]
    size = math.prod(shape[1:])

    def within(row: int, first: int, last: int) -> list[Box]:
        return [Box(((row, row + 1), *box.ranges)) for box in flat_boxes(shape[1:], first, last)]

    whole_from, whole_to = -(-start // size), stop // size
    if whole_from > whole_to:
        return within(whole_to, start - whole_to * size, stop - whole_to * size)
    rows = [Box(((whole_from, whole_to), *Box.whole(shape[1:]).ranges))]
    before = within(whole_from - 1, start - (whole_from - 1) * size, size)
    return before + rows[: whole_to - whole_from] + within(whole_to, 0, stop - whole_to * size)


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a local parameter and the box of the Hugging Face tensor that it holds."""

    hf_name: str
    hf: Box
    local: Box


@dataclass(frozen=True, slots=True)
class Shard:
    """Where a local parameter stands: its shape, and its tensor-parallel rank."""

    shape: tuple[int, ...]
    tp_rank: int
    tp_size: int


Layout = Callable[[Sequence[str], Shard, ModelShape], list[Piece]]


def split_dimension(layout: Layout) -> int | None:
    """The dimension of a Megatron parameter that tensor parallelism cuts; None: it is copied."""
    return _SPLIT.get(layout, 0)


def replicated(names: Sequence[str], shard: Shard, model: ModelShape) -> list[Piece]:
    """Every rank holds the whole tensor."""
    whole = Box.whole(shard.shape)
    return [Piece(names[0], whole, whole)]


def columns(names: Sequence[str], shard: Shard, model: ModelShape) -> list[Piece]:
    """Equal runs of columns (Megatron's row-parallel layers)."""
    width = shard.shape[1]
    first = shard.tp_rank * width
    hf = Box(((0, shard.shape[0]), (first, first + width)))
    return [Piece(names[0], hf, Box.whole(shard.shape))]


_SPLIT: dict[Layout, int | None] = {replicated: None, columns: 1}


def vocab_rows(names: Sequence[str], shard: Shard, model: ModelShape) -> list[Piece]:
    """Runs of rows of a padded vocabulary; the padding rows belong to no tensor."""
    return _slice_rows([(names[0], 0, model.vocab_size)], shard)


def gated_rows(names: Sequence[str], shard: Shard, model: ModelShape) -> list[Piece]:
    """Each rank holds [its rows of gate; its rows of up].

    names = (gate, up), or the one tensor of both, gate's rows first.
    """
    half = shard.shape[0] // 2
    pieces = []
    for part in range(2):
        first = shard.tp_rank * half
        if len(names) == 1:
            first += part * shard.tp_size * half
        hf = _row_box(first, first + half, shard.shape)
        local = _row_box(part * half, (part + 1) * half, shard.shape)
        pieces.append(Piece(names[part % len(names)], hf, local))
    return pieces


def rows(names: Sequence[str], shard: Shard, model: ModelShape) -> list[Piece]:
    """Equal runs of rows."""
    return _slice_rows([(names[0], 0, shard.shape[0] * shard.tp_size)], shard)


Segment = tuple[str, int, int]
"""Consecutive rows of a Hugging Face tensor: its name, the first row, how many."""


def qkv_rows(names: Sequence[str], shard: Shard, model: ModelShape) -> list[Piece]:
    """Rows of the fused projection: per key-value group [its q heads; their gates; k; v].

    Tensor parallelism cuts raw rows, so with more ranks than groups a rank may hold q rows
    alone. names = (q, k, v); with an output gate q has [query; gate] of each head.
    """
    q, k, v = names
    d, n = model.head_dim, model.num_heads // model.num_kv_heads
    segments: list[Segment] = []
    for group in range(model.num_kv_heads):
        heads = range(group * n, (group + 1) * n)
        if model.output_gate:
            segments += [(q, (2 * head + gate) * d, d) for gate in range(2) for head in heads]
        else:
            segments.append((q, group * n * d, n * d))
        segments += [(k, group * d, d), (v, group * d, d)]
    return _slice_rows(segments, shard)


def delta_rows(names: Sequence[str], shard: Shard, model: ModelShape) -> list[Piece]:
    """Rows of a gated delta net's input projection: per key head [q; k; its v; z; b; a].

    names = (qkvz, ba), by key head themselves, or (qkv, z, b, a).
    """
    delta = model.delta
    assert delta
    n = delta.value_heads // delta.key_heads
    values = n * delta.value_dim
    segments: list[Segment] = []
    widths = [2 * delta.key_dim + 2 * values, 2 * n] if delta.fused else [values, n, n]
    for head in range(delta.key_heads):
        if not delta.fused:
            segments += _delta_qkv(names[0], head, model)
        segments += [(x, head * w, w) for x, w in zip(names[-len(widths) :], widths, strict=True)]
    return _slice_rows(segments, shard)


def convolution_rows(names: Sequence[str], shard: Shard, model: ModelShape) -> list[Piece]:
    """Rows of a gated delta net's convolution: per key head [q; k; its v], of one tensor that has
    all q, all k, all v."""
    assert model.delta
    heads = range(model.delta.key_heads)
    return _slice_rows([x for head in heads for x in _delta_qkv(names[0], head, model)], shard)


def _delta_qkv(name: str, head: int, model: ModelShape) -> list[Segment]:
    """[q; k; its v] of a key head, in a tensor that has all q, all k, all v."""
    delta = model.delta
    assert delta
    d, keys = delta.key_dim, delta.key_width
    values = delta.value_width // delta.key_heads
    first = 2 * keys + head * values
    return [(name, head * d, d), (name, keys + head * d, d), (name, first, values)]


def _slice_rows(segments: Sequence[Segment], shard: Shard) -> list[Piece]:
    """The part of stacked segments that one rank's rows cover."""
    count = shard.shape[0]
    first = shard.tp_rank * count
    pieces = []
    offset = 0
    for name, hf_first, n in segments:
        start, stop = max(offset, first), min(offset + n, first + count)
        if start < stop:
            hf_start = hf_first + start - offset
            hf = _row_box(hf_start, hf_start + stop - start, shard.shape)
            pieces.append(Piece(name, hf, _row_box(start - first, stop - first, shard.shape)))
        offset += n
    return pieces


def _row_box(start: int, stop: int, shape: tuple[int, ...]) -> Box:
    """Rows [start, stop) and everything in the other dimensions."""
    return Box(((start, stop), *((0, n) for n in shape[1:])))
