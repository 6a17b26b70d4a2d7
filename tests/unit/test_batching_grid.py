"""The plan of ranks and micro-batches: balance, budget, and no more micro-batches than needed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.batching import plan_grid


def test_grid_by_hand():
    # longest first: 9 -> rank 0, 8 -> 1, 5 -> 1 (13), 4 -> 0 (13), 2 -> 0 (15), 1 -> 1 (14)
    # rank 0: 9 + 4 + 2 in two micro-batches of at most 10: [9], [4, 2]; rank 1: [8], [5, 1]
    assert plan_grid([1, 9, 4, 5, 8, 2], 2, 10) == [[[1], [2, 5]], [[4], [0, 3]]]


def test_a_sequence_above_the_budget_goes_alone():
    assert plan_grid([50, 3, 3], 1, 10) == [[[0], [1, 2]]]
    for row in plan_grid([50, 40, 3, 3, 3, 3], 2, 10):
        assert [0] in row or [1] in row


def test_grid_without_samples():
    assert plan_grid([], 3, 10) == [[], [], []]


LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(lengths=LENGTHS, dp_size=st.integers(1, 6), max_tokens=st.integers(1, 120))
def test_ranks_are_balanced_to_within_the_longest_sample(lengths, dp_size, max_tokens):
    grid = plan_grid(lengths, dp_size, max_tokens)
    loads = [sum(lengths[i] for cell in row for i in cell) for row in grid]
    assert max(loads) - min(loads) <= max(lengths)
    assert max(loads) <= sum(lengths) / dp_size + max(lengths) * (1 - 1 / dp_size) + 1e-9


@given(lengths=LENGTHS, dp_size=st.integers(1, 6), max_tokens=st.integers(1, 120))
def test_cells_are_empty_only_where_a_rank_has_too_few_samples(lengths, dp_size, max_tokens):
    for row in plan_grid(lengths, dp_size, max_tokens):
        n = sum(map(len, row))
        assert sum(bool(cell) for cell in row) == min(n, len(row))
        assert all(row[: min(n, len(row))])


@given(lengths=LENGTHS, max_tokens=st.integers(50, 120))
def test_no_micro_batch_more_than_needed(lengths, max_tokens):
    # one fewer did not fit: a sample met every micro-batch more than half full
    (row,) = plan_grid(lengths, 1, max_tokens)
    assert len(row) <= 2 * sum(lengths) / max_tokens + 1


@given(lengths=LENGTHS, dp_size=st.integers(1, 6), max_tokens=st.integers(1, 120))
def test_the_grid_holds_every_sample_once_within_the_budget(lengths, dp_size, max_tokens):
    grid = plan_grid(lengths, dp_size, max_tokens)
    assert len(grid) == dp_size and len({len(row) for row in grid}) == 1
    assert sorted(i for row in grid for cell in row for i in cell) == list(range(len(lengths)))
    for row in grid:
        loads = [sum(lengths[i] for i in cell) for cell in row]
        assert loads == sorted(loads, reverse=True)
        assert all(n <= max_tokens or len(c) == 1 for n, c in zip(loads, row, strict=True))


def test_planning_a_large_batch_of_equal_lengths():
    # two fit in each micro-batch; far from the lower bound of n * 700 / 2000
    grid = plan_grid([700] * 5120, 2, 2000)
    assert [len(row) for row in grid] == [1280, 1280]
