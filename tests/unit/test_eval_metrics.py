"""mean@n, pass@k, maj@k: closed forms, counting by hand, and enumeration."""

from __future__ import annotations

import itertools
import math
import random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.evaluation.metrics import (
    Answers,
    estimate,
    majority,
    majority_at_k,
    pass_at_k,
    powers_of_two,
    summarise,
)


def answers(text: str, right: str) -> Answers:
    """One letter for each answer; "-" is none. `right` holds the right ones."""
    return Answers(
        accuracy_n=tuple(float(letter in right) for letter in text),
        answer_n=tuple(None if letter == "-" else letter for letter in text),
    )


@given(n=st.integers(1, 8), data=st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n: int, data: st.DataObject) -> None:
    c = data.draw(st.integers(0, n))
    k = data.draw(st.integers(1, n))
    subsets = list(itertools.combinations(range(n), k))
    share = sum(any(i < c for i in subset) for subset in subsets) / len(subsets)
    assert pass_at_k(n, c, k) == pytest.approx(share)


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)  # 1 - 3/6
    assert pass_at_k(10, 0, 5) == 0.0
    assert pass_at_k(1000, 500, 501) == 1.0


@pytest.mark.parametrize(
    ("given_answers", "right", "value"),
    [
        ("aab", "a", 1.0),
        ("abb", "a", 0.0),
        ("ab", "a", 0.5),  # a tie of two
        ("abc", "a", 1 / 3),
        ("aabbc", "ab", 1.0),  # both spellings of the tie are right
        ("a---", "a", 1.0),  # nothing does not vote
        ("----", "", 0.0),
    ],
)
def test_majority(given_answers: str, right: str, value: float) -> None:
    assert majority(answers(given_answers, right)) == pytest.approx(value)


def test_majority_of_one_answer_is_the_mean() -> None:
    problem = answers("aabbbccd", "ad")
    exact = fmean(problem.accuracy_n)
    assert majority_at_k(problem, 1, seed=3) == pytest.approx(exact, abs=0.1)
    assert majority_at_k(problem, 8, seed=3) == majority(problem) == 0.0
    assert majority_at_k(problem, 4, seed=3) == majority_at_k(problem, 4, seed=3)


@given(st.permutations("aabbbc--"))
def test_the_order_of_answers_does_not_matter(order: list[str]) -> None:
    assert majority(answers("".join(order), "b")) == 1.0


def test_the_interval_by_hand() -> None:
    found = estimate([0.0, 1.0, 1.0, 0.0])
    assert found.value == 0.5
    # Wilson: 0.5 +- z sqrt(1/12 + z^2/36) / (1 + z^2/3), z^2 = 3.8415
    assert found.half_width == pytest.approx(0.374666, abs=1e-5)
    assert (found.low, found.high) == pytest.approx((0.125334, 0.874666), abs=1e-5)
    assert estimate([1.0] * 30).low == pytest.approx(29 / (29 + 3.841459), abs=1e-5)
    assert estimate([1.0] * 30).high == 1.0
    assert estimate([0.0] * 30).low == 0.0
    assert estimate([0.25]).half_width is None
    assert (estimate([0.25]).low, estimate([0.25]).high) == (0.25, 0.25)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """400 evaluations of 100 problems with accuracy 0.3: 95 % of the intervals, to 3 sd."""
    import random

    rng = random.Random(0)
    runs = [estimate([float(rng.random() < 0.3) for _ in range(100)]) for _ in range(400)]
    share = fmean(run.low <= 0.3 <= run.high for run in runs)
    assert abs(share - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 400)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
@pytest.mark.parametrize("n", [1, 4])
def test_the_interval_holds_with_few_problems(p: float, n: int) -> None:
    """2,000 evaluations of 30 problems whose accuracies differ, n answers to each. An exact sum
    for n = 1 gives 0.97, 0.96 and 0.94."""
    rng = random.Random(f"{p}/{n}")

    def problem() -> float:
        accuracy = rng.betavariate(4 * p, 4 * (1 - p))
        return fmean(float(rng.random() < accuracy) for _ in range(n))

    runs = [estimate([problem() for _ in range(30)]) for _ in range(2000)]
    share = fmean(run.low <= p <= run.high for run in runs)
    assert share >= 0.93 - 3 * math.sqrt(0.93 * 0.07 / 2000)


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=40))
def test_the_interval_holds_its_value_and_stays_within_0_and_1(values: list[float]) -> None:
    found = estimate(values)
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0
    assert found.low < found.high


def test_summarise() -> None:
    problems = [answers("aabc", "a"), answers("xyyy", "x")]
    found = summarise(problems, powers_of_two(4))
    assert list(found) == ["mean@4", "pass@2", "maj@2", "pass@4", "maj@4"]
    assert found["mean@4"].value == pytest.approx((0.5 + 0.25) / 2)
    assert found["pass@2"].value == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert found["pass@4"].value == 1.0
    assert found["maj@4"].value == 0.5
    assert list(summarise([answers("a", "a")], powers_of_two(1))) == ["mean@1"]


@pytest.mark.parametrize(
    ("n", "ks"), [(1, [1]), (2, [2]), (3, [2, 3]), (8, [2, 4, 8]), (10, [2, 4, 8, 10])]
)
def test_powers_of_two(n: int, ks: list[int]) -> None:
    assert powers_of_two(n) == ks
