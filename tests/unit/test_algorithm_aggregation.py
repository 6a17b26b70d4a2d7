"""The aggregation modes, against values computed by hand and against their definitions."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.algorithm.aggregation import aggregation_weights
from gpg_megatron.config.algorithm import AlgorithmConfig
from gpg_megatron.types import TrainSample
from tests.samples import train_sample

MODES = get_args(get_type_hints(AlgorithmConfig)["loss_aggregation"])


def sample(group: int, length: int, advantage: float = 1.0) -> TrainSample:
    return train_sample(response=(3,) * length, group=group, advantage=advantage)


# Two questions; lengths 2 + 6 and 1 + 1 + 0: T = 10, N = 5. The second question is dead.
BATCH = [sample(7, 2), sample(7, 6), sample(9, 1, 0.0), sample(9, 1, 0.0), sample(9, 0, 0.0)]
# Four micro-batches, of 3, 7, 0 and 0 response tokens: the mean is over two of them.
CELLS = [[0, 2], [1, 3], [4], []]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", [0.1, 0.1, 0.1, 0.1, 0.0]),
        ("seq-mean-token-sum", [0.2, 0.2, 0.2, 0.2, 0.0]),
        ("seq-mean-token-mean", [1 / 10, 1 / 30, 1 / 5, 1 / 5, 0.0]),
        ("seq-mean-token-sum-norm", [1 / 40, 1 / 40, 1 / 40, 1 / 40, 0.0]),
        ("group-token-mean", [1 / 16, 1 / 16, 1 / 4, 1 / 4, 0.0]),
        ("micro-batch-token-mean", [1 / 6, 1 / 14, 1 / 6, 1 / 14, 0.0]),
    ],
)
def test_weights_by_hand(mode: str, expected: list[float]) -> None:
    assert aggregation_weights(BATCH, mode, 8, CELLS) == expected


def test_every_mode_of_the_configuration_is_there_and_no_other() -> None:
    for mode in MODES:
        assert len(aggregation_weights(BATCH, mode, 8, CELLS)) == len(BATCH)
    with pytest.raises(KeyError):
        aggregation_weights(BATCH, "sum", 8)


@pytest.mark.parametrize("mode", MODES)
def test_no_samples_and_only_empty_responses(mode: str) -> None:
    assert aggregation_weights([], mode, 8) == []
    assert aggregation_weights([sample(0, 0), sample(1, 0)], mode, 8, [[1], [0]]) == [0.0, 0.0]


@pytest.mark.parametrize("cells", [[[0, 1], [1, 2, 3, 4]], [[0, 1, 2, 3, 4, 4]]])
def test_cells_that_are_no_partition_are_a_programming_error(
    cells: Sequence[Sequence[int]],
) -> None:
    with pytest.raises(AssertionError):
        aggregation_weights(BATCH, "micro-batch-token-mean", 8, cells)


def direct(
    mode: str, losses: Sequence[Sequence[Fraction]], groups: Sequence[int], max_length: int
) -> Fraction | float:
    """The table of modes read literally: losses[i] are the token losses of sample i."""
    n, total = len(losses), sum(map(len, losses))
    sums = [sum(row, Fraction(0)) for row in losses]
    if mode == "token-mean":
        return sum(sums) / total
    if mode == "seq-mean-token-sum":
        return sum(sums) / n
    if mode == "seq-mean-token-mean":
        return sum(s / len(row) for s, row in zip(sums, losses, strict=True)) / n
    if mode == "seq-mean-token-sum-norm":
        return sum(sums) / (n * max_length)
    if mode == "micro-batch-token-mean":  # here: odd and even places
        groups = [i % 2 for i in range(n)]
    of_question = []
    for question in set(groups):
        members = [i for i, g in enumerate(groups) if g == question]
        tokens = sum(len(losses[i]) for i in members)
        of_question.append(sum(sums[i] for i in members) / tokens)
    return sum(of_question) / len(of_question)


@pytest.mark.parametrize("mode", MODES)
@given(
    batch=st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.integers(-99, 99), min_size=1, max_size=6)),
        min_size=1,
        max_size=8,
    )
)
def test_weighted_sum_is_the_definition(mode: str, batch: list[tuple[int, list[int]]]) -> None:
    groups = [question for question, _ in batch]
    losses = [[Fraction(x) for x in row] for _, row in batch]
    cells = [list(range(len(batch)))[i::2] for i in (0, 1)]
    weights = aggregation_weights([sample(q, len(row)) for q, row in batch], mode, 8, cells)
    weighted = sum(w * float(sum(row)) for w, row in zip(weights, losses, strict=True))
    assert weighted == pytest.approx(float(direct(mode, losses, groups, 8)), rel=1e-12, abs=1e-9)


@pytest.mark.parametrize("mode", [m for m in MODES if m not in ("seq-mean-token-sum",)])
@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=8))
def test_the_mean_of_a_constant_is_the_constant(mode: str, lengths: list[int]) -> None:
    # seq-mean-token-sum-norm is a mean only where every response has the maximal length
    lengths = [8] * len(lengths) if mode == "seq-mean-token-sum-norm" else lengths
    batch = [sample(i // 2, n) for i, n in enumerate(lengths)]
    cells = [list(range(len(batch)))[i::3] for i in range(3)]
    weights = aggregation_weights(batch, mode, 8, cells)
    total = sum(w * n for w, n in zip(weights, lengths, strict=True))
    assert total == pytest.approx(1.0)
