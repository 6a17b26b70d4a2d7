"""The plan of ranks and micro-batches: balance, budget, shared prompts, and no more
micro-batches than needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.batching.planning import plan_grid, run_cost, run_tokens, shared_runs
from gpg_megatron.model.flops import TokenCosts
from gpg_megatron.types import TrainSample
from tests.samples import train_sample

LINEAR = TokenCosts(per_token=1.0, per_loss_token=0.0, per_pair=0.0)
COSTS = TokenCosts(per_token=1.0, per_loss_token=0.5, per_pair=0.02)


def sample(prompt: Iterable[int], n_response: int) -> TrainSample:
    return train_sample(prompt, (3,) * n_response)


def alone(lengths: Sequence[int]) -> list[TrainSample]:
    """Samples of these lengths that share nothing."""
    return [sample([100 + i], n - 1) for i, n in enumerate(lengths)]


def family(prompt_id: int, n_prompt: int, responses: Sequence[int]) -> list[TrainSample]:
    return [sample([prompt_id] * n_prompt, n) for n in responses]


def plan(
    samples: Sequence[TrainSample],
    dp_size: int = 1,
    max_tokens: int = 10**6,
    costs: TokenCosts = LINEAR,
    share: bool = True,
) -> list[list[list[int]]]:
    return plan_grid(samples, dp_size=dp_size, max_tokens=max_tokens, costs=costs, share=share)


def runs_of(
    samples: Sequence[TrainSample], cell: Sequence[int], share: bool = True
) -> list[list[TrainSample]]:
    return shared_runs([samples[i] for i in cell], share=share)


def tokens_of(samples: Sequence[TrainSample], cell: Sequence[int], share: bool = True) -> int:
    return sum(map(run_tokens, runs_of(samples, cell, share)))


def cost_of(
    samples: Sequence[TrainSample],
    row: Sequence[Sequence[int]],
    costs: TokenCosts,
    share: bool = True,
) -> float:
    return sum(run_cost(run, costs) for cell in row for run in runs_of(samples, cell, share))


def test_grid_by_hand() -> None:
    # longest first: 9 -> rank 0, 8 -> 1, 5 -> 1 (13), 4 -> 0 (13), 2 -> 0 (15), 1 -> 1 (14)
    # rank 0: 9 + 4 + 2 in two micro-batches of at most 10: [9], [4, 2]; rank 1: [8], [5, 1]
    grid = plan(alone([1, 9, 4, 5, 8, 2]), 2, 10)
    assert grid == [[[1], [2, 5]], [[4], [0, 3]]]


def test_a_sequence_above_the_budget_goes_alone() -> None:
    assert plan(alone([50, 3, 3]), 1, 10) == [[[0], [1, 2]]]
    for row in plan(alone([50, 40, 3, 3, 3, 3]), 2, 10):
        assert [0] in row or [1] in row


def test_grid_without_samples() -> None:
    assert plan([], 3, 10) == [[], [], []]


def test_cost_is_balanced_and_not_the_number_of_tokens() -> None:
    """One long sequence costs as much as its tokens and its 100 * 101 / 2 pairs."""
    samples = alone([100] + [10] * 20)
    # 100 tokens: 100 + 49.5 + 101 = 250.5; 10 tokens: 10 + 4.5 + 1.1 = 15.6
    assert [len(row[0]) for row in plan(samples, 2, costs=COSTS)] == [1 + 2, 18]
    assert [len(row[0]) for row in plan(samples, 2)] == [1 + 5, 15]


def test_what_a_run_costs_by_hand() -> None:
    # A prompt of 4 and responses of 2 and 3: 3 tokens once, then 1 + 1 and 1 + 2 tokens.
    run = family(7, 4, [2, 3])
    assert run_tokens(run) == 3 + 2 + 3
    # pairs: 1 + 2 + 3 of the prompt, 2 * 3 + 1 + 2, 3 * 3 + 1 + 2 + 3
    costs = TokenCosts(per_token=100.0, per_loss_token=10000.0, per_pair=1.0)
    assert run_cost(run, costs) == 50000 + 800 + 6 + 9 + 15
    # alone: all 6 tokens, the last one included, and 1 + 2 + ... + 6 pairs
    assert run_tokens(run[:1]) == 6
    assert run_cost(run[:1], costs) == 20000 + 600 + 21


def test_neighbours_share_where_it_saves_tokens() -> None:
    a, b = family(1, 3, [2, 2, 2]), family(2, 1, [2, 2])
    assert list(map(len, shared_runs(a + b, share=True))) == [3, 1, 1]
    assert list(map(len, shared_runs(a, share=False))) == [1, 1, 1]
    assert list(map(len, shared_runs([a[0], b[0], a[1]], share=True))) == [1, 1, 1]
    empty = family(1, 3, [2, 0])
    assert list(map(len, shared_runs(empty, share=True))) == [1, 1]


def test_a_family_stays_together_and_is_split_by_the_budget_alone() -> None:
    samples = [s for _ in range(4) for s in (*family(1, 50, [5]), *family(2, 50, [5]))]
    assert plan(samples, 1, 80) == [[[0, 2, 4, 6], [1, 3, 5, 7]]]
    assert plan(samples, 2, 80) == [[[0, 2, 4, 6]], [[1, 3, 5, 7]]]
    # 49 + 2 * 5 tokens fit into 60, three responses do not
    assert sorted(map(len, plan(samples, 1, 60)[0])) == [2, 2, 2, 2]
    assert all(tokens_of(samples, cell) == 59 for cell in plan(samples, 1, 60)[0])


def test_a_family_is_split_where_ranks_would_have_nothing_to_do() -> None:
    samples = family(1, 10, [50] * 8)
    grid = plan(samples, 4)
    assert [len(row[0]) for row in grid] == [2, 2, 2, 2]
    # A prompt that costs more than its responses is not computed twice for the balance.
    assert [len(cell) for row in plan(family(1, 1000, [1, 1]), 2) for cell in row] == [2, 0]


FAMILIES = st.lists(
    st.tuples(st.integers(1, 30), st.lists(st.integers(1, 30), min_size=1, max_size=6)),
    min_size=1,
    max_size=8,
)
GRIDS = {
    "families": FAMILIES,
    "dp_size": st.integers(1, 6),
    "max_tokens": st.integers(1, 120),
    "share": st.booleans(),
}


def samples_of(families: list[tuple[int, list[int]]]) -> list[TrainSample]:
    return [s for i, (n, responses) in enumerate(families) for s in family(i + 5, n, responses)]


@given(**GRIDS)
def test_the_grid_holds_every_sample_once_within_the_budget(
    families: list[tuple[int, list[int]]], dp_size: int, max_tokens: int, share: bool
) -> None:
    samples = samples_of(families)
    grid = plan(samples, dp_size, max_tokens, COSTS, share)
    assert len(grid) == dp_size and len({len(row) for row in grid}) == 1
    indices = sorted(i for row in grid for cell in row for i in cell)
    assert indices == list(range(len(samples)))
    for row in grid:
        for cell in row:
            assert tokens_of(samples, cell, share) <= max_tokens or len(cell) == 1
        # no work after an empty cell
        assert [bool(cell) for cell in row] == sorted((bool(c) for c in row), reverse=True)


@given(**GRIDS)
def test_sharing_never_costs_more(
    families: list[tuple[int, list[int]]], dp_size: int, max_tokens: int, share: bool
) -> None:
    samples = samples_of(families)
    shared = plan(samples, dp_size, max_tokens, COSTS, True)
    apart = plan(samples, dp_size, max_tokens, COSTS, False)
    total = [
        sum(cost_of(samples, row, COSTS, how) for row in grid)
        for grid, how in ((shared, True), (apart, False))
    ]
    assert total[0] <= total[1]


LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(lengths=LENGTHS, dp_size=st.integers(1, 6), max_tokens=st.integers(1, 120))
def test_ranks_are_balanced_to_within_the_costliest_sample(
    lengths: Sequence[int], dp_size: int, max_tokens: int
) -> None:
    samples = alone(lengths)
    grid = plan(samples, dp_size, max_tokens, COSTS)
    loads = [cost_of(samples, row, COSTS) for row in grid]
    largest = max(run_cost([s], COSTS) for s in samples)
    assert max(loads) - min(loads) <= largest + 1e-9
    mean = sum(loads) / dp_size
    assert max(loads) <= mean + largest * (1 - 1 / dp_size) + 1e-9


@given(lengths=LENGTHS, dp_size=st.integers(1, 6), max_tokens=st.integers(1, 120))
def test_cells_are_empty_only_where_a_rank_has_too_few_samples(
    lengths: Sequence[int], dp_size: int, max_tokens: int
) -> None:
    for row in plan(alone(lengths), dp_size, max_tokens):
        n = sum(map(len, row))
        assert sum(bool(cell) for cell in row) == min(n, len(row))
        assert all(row[: min(n, len(row))])


@given(lengths=LENGTHS, max_tokens=st.integers(50, 120))
def test_no_micro_batch_more_than_needed(lengths: Sequence[int], max_tokens: int) -> None:
    # one fewer did not fit: a sample met every micro-batch more than half full
    (row,) = plan(alone(lengths), 1, max_tokens)
    assert len(row) <= 2 * sum(lengths) / max_tokens + 1


def test_planning_a_large_batch() -> None:
    # two fit in each micro-batch; far from the lower bound of n * 700 / 2000
    grid = plan(alone([700] * 5120), 2, 2000)
    assert [len(row) for row in grid] == [1280, 1280]
    samples = [s for i in range(1024) for s in family(i + 5, 300, [100 + i % 37] * 5)]
    grid = plan(samples, 8, 16384, COSTS)
    loads = [cost_of(samples, row, COSTS) for row in grid]
    assert max(loads) < 1.01 * min(loads)
    assert all(len(set(cell)) % 5 == 0 for row in grid for cell in row), "no family is split"
