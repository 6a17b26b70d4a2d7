"""Generated problems: right answers, disjoint splits, seeds."""

from __future__ import annotations

import re

import pytest

from gpg_megatron.data import arithmetic
from gpg_megatron.data.schema import parse_row
from gpg_megatron.errors import UserError


@pytest.mark.parametrize(
    ("task", "operands", "question", "answer"),
    [
        ("add", (48, 7), "What is 48 + 7?", "55"),
        ("largest", (20, 97, 31), "Largest of 20, 97, 31?", "97"),
        ("max3", (20, 97, 35), "max(31, 94, 57) = 94\nmax(20, 97, 35) = ", "97"),
    ],
)
def test_rows(task: str, operands: tuple[int, ...], question: str, answer: str) -> None:
    (row,) = arithmetic.rows(task, "test", [operands])
    problem = parse_row(row, "here")
    assert problem.messages == ({"role": "user", "content": question},)
    assert problem.ground_truth == answer
    assert problem.data_source == f"arithmetic/{task}"
    assert row["extra_info"] == {"split": "test", "index": 0}


@pytest.mark.parametrize("task", list(arithmetic.TASKS))
def test_train_and_test_are_disjoint_whatever_the_order_of_operands(task: str) -> None:
    split = arithmetic.draw(task, seed=3, train_size=1000, test_size=200)
    train, test = ({tuple(sorted(x)) for x in part} for part in (split.train, split.test))
    assert (len(train), len(test)) == (1000, 200)
    assert not train & test
    assert any(x != tuple(sorted(x)) for x in split.test)


def test_seed_and_size() -> None:
    def draw(seed: int, train_size: int) -> arithmetic.Split:
        return arithmetic.draw("add", seed=seed, train_size=train_size, test_size=100)

    assert draw(1, 500) == draw(1, 500)
    assert draw(1, 500).test != draw(2, 500).test
    assert draw(1, 900).test == draw(1, 500).test
    assert draw(1, 900).train[:500] == draw(1, 500).train


def test_the_worked_example_is_no_problem() -> None:
    keys = set(arithmetic.TASKS["max3"].keys())
    assert (31, 57, 94) not in keys
    assert len(keys) == 90 * 89 * 88 // 6 - 1


def test_all_additions_can_be_drawn_and_not_one_more() -> None:
    split = arithmetic.draw("add", seed=1, train_size=5000, test_size=50)
    assert len({tuple(sorted(x)) for x in split.train + split.test}) == 100 * 101 // 2
    with pytest.raises(UserError, match=re.escape("(5001 + 50)")):
        arithmetic.draw("add", seed=1, train_size=5001, test_size=50)


@pytest.mark.parametrize(
    ("task", "train", "test", "message"),
    [("divide", 1, 1, "unknown; expected one of add"), ("add", 0, 1, "at least 1")],
)
def test_bad_requests(task: str, train: int, test: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        arithmetic.draw(task, seed=1, train_size=train, test_size=test)
