"""Boxes against sets of points; layouts against Megatron's own way of stacking and cutting.

The Megatron side is built with numpy from whole Hugging Face tensors whose elements are all
different, so an element in a wrong place cannot look right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.layout.boxes import (
    Box,
    Layout,
    Piece,
    Shard,
    columns,
    flat_boxes,
    gated_rows,
    qkv_rows,
    replicated,
    vocab_rows,
)
from gpg_megatron.shapes import ModelShape

PADDING = -1


def boxes(ndim: int) -> st.SearchStrategy[Box]:
    side = st.tuples(st.integers(0, 4), st.integers(1, 4)).map(lambda x: (x[0], x[0] + x[1]))
    return st.tuples(*[side] * ndim).map(Box)


box_pairs = st.integers(1, 3).flatmap(lambda ndim: st.tuples(boxes(ndim), boxes(ndim)))


def points(box: Box | None) -> set[tuple[int, ...]]:
    return set() if box is None else set(product(*(range(a, b) for a, b in box.ranges)))


@given(box_pairs)
def test_a_box_counts_and_indexes_its_points(pair: tuple[Box, Box]) -> None:
    box = pair[0]
    tensor = np.zeros((8,) * len(box.ranges))
    tensor[box.slices] = 1
    assert {tuple(map(int, index)) for index in np.argwhere(tensor)} == points(box)
    assert tensor[box.slices].shape == box.shape
    assert box.numel == len(points(box))


@given(box_pairs)
def test_intersect_is_what_both_boxes_hold(pair: tuple[Box, Box]) -> None:
    a, b = pair
    common = a.intersect(b)
    assert points(common) == points(a) & points(b)
    assert (common is None) == points(a).isdisjoint(points(b))
    assert common == b.intersect(a)


@given(box_pairs)
def test_relative_to_and_shifted_move_by_the_corner_and_undo_each_other(
    pair: tuple[Box, Box],
) -> None:
    box, origin = pair
    corner = [start for start, _ in origin.ranges]
    relative = box.relative_to(origin)
    assert {tuple(np.add(p, corner)) for p in points(relative)} == points(box)
    assert relative.shifted(origin) == box
    assert box.shifted(origin).relative_to(origin) == box
    assert box.relative_to(box) == Box.whole(box.shape)


def test_boxes_of_different_dimensions_do_not_meet() -> None:
    with pytest.raises(AssertionError):
        Box.whole((2, 2)).intersect(Box.whole((2,)))


def model_shape(
    *, heads: int = 4, kv_heads: int = 2, head_dim: int = 2, vocab: int = 5, hidden: int = 3
) -> ModelShape:
    return ModelShape(
        architecture="Qwen2ForCausalLM",
        num_layers=2,
        hidden_size=hidden,
        ffn_size=6,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        tied=False,
        qkv_bias=True,
        qk_norm=True,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        max_position_embeddings=16,
    )


@st.composite
def models(draw: st.DrawFn) -> tuple[ModelShape, int]:
    """A model and a tensor-parallel size that Megatron accepts, also above the KV heads."""
    kv_heads = draw(st.integers(1, 4))
    heads = kv_heads * draw(st.integers(1, 4))
    head_dim = draw(st.sampled_from([2, 4, 6]))
    legal = [
        tp
        for tp in range(1, heads + 1)
        if heads % tp == 0
        and (kv_heads % tp == 0 or tp % kv_heads == 0)
        and (heads + 2 * kv_heads) * head_dim % tp == 0
    ]
    shape = model_shape(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=draw(st.integers(1, 30)),
        hidden=draw(st.integers(1, 4)),
    )
    return shape, draw(st.sampled_from(legal))


def numbered(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Tensors in which no two elements are equal, over all of them."""
    ends = np.cumsum([np.prod(shape) for shape in shapes.values()])
    flat = np.split(np.arange(ends[-1]), ends[:-1])
    return {name: part.reshape(shapes[name]) for name, part in zip(shapes, flat, strict=True)}


def check(
    layout: Layout,
    hf: Mapping[str, np.ndarray],
    shards: Sequence[np.ndarray],
    model: ModelShape,
    *,
    copies: int = 1,
) -> None:
    """The pieces give every rank its shard, and take each element `copies` times in all."""
    taken = {name: np.zeros(tensor.shape, int) for name, tensor in hf.items()}
    for rank, expected in enumerate(shards):
        local = np.full(expected.shape, PADDING)
        written = np.zeros(expected.shape, int)
        for piece in layout(list(hf), Shard(expected.shape, rank, len(shards)), model):
            assert piece.hf.shape == piece.local.shape
            local[piece.local.slices] = hf[piece.hf_name][piece.hf.slices]
            written[piece.local.slices] += 1
            taken[piece.hf_name][piece.hf.slices] += 1
        np.testing.assert_array_equal(local, expected)
        assert written.max() <= 1
    for counts in taken.values():
        assert (counts == copies).all()


@given(models())
def test_replicated(case: tuple[ModelShape, int]) -> None:
    model, tp = case
    hf = numbered(norm=(model.hidden_size,))
    check(replicated, hf, [hf["norm"]] * tp, model, copies=tp)


@given(models())
def test_columns(case: tuple[ModelShape, int]) -> None:
    model, tp = case
    hf = numbered(o=(model.hidden_size, model.num_heads * model.head_dim))
    check(columns, hf, np.split(hf["o"], tp, axis=1), model)


@given(models(), st.integers(0, 3))
def test_vocab_rows(case: tuple[ModelShape, int], spare: int) -> None:
    """Also with ranks that hold nothing but padding."""
    model, tp = case
    hf = numbered(embed=(model.vocab_size, model.hidden_size))
    n_padding = tp * (-(-model.vocab_size // tp) + spare) - model.vocab_size
    padding = np.full((n_padding, model.hidden_size), PADDING)
    check(vocab_rows, hf, np.split(np.concatenate([hf["embed"], padding]), tp), model)


@given(models())
def test_gated_rows(case: tuple[ModelShape, int]) -> None:
    model, tp = case
    ffn = 3 * tp
    hf = numbered(gate=(ffn, model.hidden_size), up=(ffn, model.hidden_size))
    gates, ups = np.split(hf["gate"], tp), np.split(hf["up"], tp)
    check(gated_rows, hf, [np.concatenate(x) for x in zip(gates, ups, strict=True)], model)


@given(models(), st.booleans())
def test_qkv_rows(case: tuple[ModelShape, int], bias: bool) -> None:
    """For each key-value group its query heads, its key, its value; then cut by raw rows."""
    model, tp = case
    tail = () if bias else (model.hidden_size,)
    q_rows, kv_rows = (n * model.head_dim for n in (model.num_heads, model.num_kv_heads))
    hf = numbered(q=(q_rows, *tail), k=(kv_rows, *tail), v=(kv_rows, *tail))
    groups = [x.reshape(model.num_kv_heads, -1, *tail) for x in hf.values()]
    fused = np.concatenate(groups, axis=1).reshape(-1, *tail)
    check(qkv_rows, hf, np.split(fused, tp), model)


RowPiece = tuple[str, tuple[int, int], tuple[int, int]]


def row_pieces(pieces: Sequence[Piece]) -> list[RowPiece]:
    """(name, Hugging Face rows, local rows); all other dimensions are whole."""
    for piece in pieces:
        assert piece.hf.ranges[1:] == piece.local.ranges[1:] == ((0, 3),)
    return [(p.hf_name, p.hf.ranges[0], p.local.ranges[0]) for p in pieces]


def test_gated_rows_by_hand() -> None:
    """12 rows of each on 3 ranks: rank 1 has rows 4-7 of gate, then rows 4-7 of up."""
    pieces = gated_rows(["gate", "up"], Shard((8, 3), 1, 3), model_shape())
    assert row_pieces(pieces) == [("gate", (4, 8), (0, 4)), ("up", (4, 8), (4, 8))]


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0, [("q", (0, 3), (0, 3))]),
        (1, [("q", (3, 6), (0, 3))]),
        (2, [("q", (6, 8), (0, 2)), ("k", (0, 1), (2, 3))]),
        (3, [("k", (1, 2), (0, 1)), ("v", (0, 2), (1, 3))]),
    ],
)
def test_qkv_rows_with_more_ranks_than_groups_by_hand(rank: int, expected: list[RowPiece]) -> None:
    """One group: q rows 0-7, k rows 0-1, v rows 0-1, cut into 4 times 3 rows."""
    model = model_shape(heads=4, kv_heads=1, head_dim=2)
    assert row_pieces(qkv_rows(["q", "k", "v"], Shard((3, 3), rank, 4), model)) == expected


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0, [("embed", (0, 2), (0, 2))]),
        (2, [("embed", (4, 5), (0, 1))]),
        (3, []),
    ],
)
def test_vocab_rows_by_hand(rank: int, expected: list[RowPiece]) -> None:
    """5 rows padded to 8 on 4 ranks: rank 2 has one of each kind, rank 3 padding only."""
    pieces = vocab_rows(["embed"], Shard((2, 3), rank, 4), model_shape(vocab=5))
    assert row_pieces(pieces) == expected


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_a_run_of_elements_as_rectangles(shape: list[int], data: st.DataObject) -> None:
    """In the order of the elements, each once, and few: three of a matrix."""
    numbers = np.arange(math.prod(shape)).reshape(shape)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, numbers.size)] * 2)))
    boxes = flat_boxes(shape, start, stop)
    assert [n for box in boxes for n in numbers[box.slices].ravel()] == list(range(start, stop))
    assert all(box.numel for box in boxes) and len(boxes) <= 2 * len(shape) - 1
