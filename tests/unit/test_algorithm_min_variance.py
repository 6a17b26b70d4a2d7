"""The baseline of least variance against all answers that a policy can give."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.algorithm.advantages import normalised_rewards
from gpg_megatron.config.algorithm import update_rules
from tests.presets import from_preset
from tests.unit.test_algorithm_objective import batch_of

CONFIG = from_preset("paper", baseline="min-variance", alpha="none")


def advantages(scores: Sequence[float], lengths: Sequence[int]) -> list[float]:
    (row,) = normalised_rewards(batch_of((list(scores), list(lengths))), CONFIG)
    return row


def test_by_hand() -> None:
    # the others of the first: (2 * 0 + 6 * 1) / 8, of the second: (4 + 6) / 10, of the third: 4 / 6
    expected = [1 - 6 / 8, 0 - 10 / 10, 1 - 4 / 6]
    assert advantages([1.0, 0.0, 1.0], [4, 2, 6]) == pytest.approx(expected)
    assert advantages([0.3, 0.3, 0.3], [4, 2, 6]) == [0.0, 0.0, 0.0]
    assert advantages([1.0, 0.0], [3, 0]) == [1.0, -1.0]


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=6), st.integers(1, 9))
def test_with_equal_lengths_it_is_leave_one_out(scores: list[float], length: int) -> None:
    groups = batch_of((scores, [length] * len(scores)))
    (expected,) = normalised_rewards(groups, from_preset("rloo"))
    assert advantages(scores, [length] * len(scores)) == pytest.approx(expected, abs=1e-9)


LENGTHS = {1: 0.4, 2: 0.25, 4: 0.35}
"""Probability of each length of an answer, which the policy does not choose."""


def answers() -> Iterator[tuple[float, np.ndarray, float, int]]:
    """Every answer of a policy that says 0 or 1 at each of at most four places, each place by a
    parameter of its own at 0: probability, grad log pi [4], reward, length.

    A token's score is 1/2 or -1/2 and that of another place is orthogonal: what the formula needs.
    """
    for length, chance in LENGTHS.items():
        for tokens in itertools.product((0, 1), repeat=length):
            gradient = np.zeros(4)
            gradient[:length] = np.array(tokens) - 0.5
            yield chance / 2**length, gradient, 2.0 * tokens[0] + 0.3 * sum(tokens) + length, length


def variance(baseline: float) -> float:
    """Trace of the covariance of (r - baseline) grad log pi, over all answers."""
    rows = list(answers())
    mean = np.sum([p * (r - baseline) * g for p, g, r, _ in rows], axis=0)
    square = sum(p * (r - baseline) ** 2 * float(g @ g) for p, g, r, _ in rows)
    return square - float(mean @ mean)


def test_no_constant_has_less_variance() -> None:
    rows = list(answers())
    closed = sum(p * n * r for p, _, r, n in rows) / sum(p * n for p, _, _, n in rows)
    grid = closed + np.linspace(-2, 2, 4001)
    best = grid[int(np.argmin([variance(b) for b in grid]))]
    assert closed == pytest.approx(best, abs=1e-6)
    mean = sum(p * r for p, _, r, _ in rows)
    assert variance(closed) < variance(mean) - 0.05


def test_what_the_group_estimates_it_by_is_that_constant_and_brings_no_bias() -> None:
    """The gradient of pairs of answers, in expectation, is the policy gradient; and the mean of
    many answers' baselines is the constant."""
    rows = list(answers())
    right = sum(p * r * g for p, g, r, _ in rows)
    found = np.zeros(4)
    for (p, g, r, n), (q, h, s, m) in itertools.product(rows, repeat=2):
        a, b = advantages([r, s], [n, m])
        found += p * q * (a * g + b * h) / 2
    np.testing.assert_allclose(found, right, atol=1e-12)
    closed = sum(p * n * r for p, _, r, n in rows) / sum(p * n for p, _, _, n in rows)
    rng = np.random.default_rng(3)
    drawn = [rows[i] for i in rng.choice(len(rows), size=4000, p=[p for p, *_ in rows])]
    scores, lengths = [r for _, _, r, _ in drawn], [n for *_, n in drawn]
    first = scores[0] - advantages(scores, lengths)[0]
    assert first == pytest.approx(closed, abs=0.1)


@pytest.mark.parametrize(
    "explicit",
    [{"loss": "clip"}, {"correction": "mask-token"}, {"loss_aggregation": "seq-mean-token-mean"}],
)
def test_it_is_refused_where_it_is_not_exact(explicit: dict[str, Any]) -> None:
    for baseline, expected in (("min-variance", 1), ("leave-one-out", 0)):
        rules = update_rules(from_preset("paper", baseline=baseline, **explicit))
        assert sum(broken for broken, _ in rules) == expected
