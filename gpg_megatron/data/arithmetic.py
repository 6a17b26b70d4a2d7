"""Seeded arithmetic problems with a held-out split.

Train and test share no problem even up to the order of the operands: 37 + 48 and 48 + 37
stand on the same side. The answer is scored by exact match.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement
from types import MappingProxyType
from typing import Any

from gpg_megatron.data.schema import make_row
from gpg_megatron.errors import UserError

Operands = tuple[int, ...]

_EXAMPLE = (31, 94, 57)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One kind of problem."""

    description: str
    question: Callable[[Operands], str]
    answer: Callable[[Operands], int]
    keys: Callable[[], Iterable[Operands]]
    """Every problem once, its operands sorted."""


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "add": Task(
            description="sum of two numbers below 100, asked as a question",
            question=lambda x: f"What is {x[0]} + {x[1]}?",
            answer=sum,
            keys=lambda: combinations_with_replacement(range(100), 2),
        ),
        "largest": Task(
            description="largest of three two-digit numbers, asked as a question",
            question=lambda x: f"Largest of {x[0]}, {x[1]}, {x[2]}?",
            answer=max,
            keys=lambda: combinations(range(10, 100), 3),
        ),
        "max3": Task(
            description="largest of three two-digit numbers, as a text to be continued",
            question=lambda x: f"max{_EXAMPLE} = {max(_EXAMPLE)}\nmax({x[0]}, {x[1]}, {x[2]}) = ",
            answer=max,
            keys=lambda: (
                k for k in combinations(range(10, 100), 3) if k != tuple(sorted(_EXAMPLE))
            ),
        ),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Disjoint problems, each with its operands in the order in which they are asked."""

    train: tuple[Operands, ...]
    test: tuple[Operands, ...]


def draw(task: str, *, seed: int, train_size: int, test_size: int) -> Split:
    """Draw distinct problems. The test set depends on (task, seed, test_size) alone.

    Raises:
        UserError: unknown task, sizes that are not positive, or more problems than exist.
    """
    if task not in TASKS:
        raise UserError(f"task {task!r} is unknown; expected one of {', '.join(TASKS)}")
    if train_size < 1 or test_size < 1:
        raise UserError(f"sizes {train_size} and {test_size}: expected at least 1 problem each")
    keys = list(TASKS[task].keys())
    if train_size + test_size > len(keys):
        raise UserError(
            f"task {task!r} has {len(keys)} problems; expected train size + test size "
            f"({train_size} + {test_size}) to be at most that"
        )
    rng = random.Random(f"{task}/{seed}")
    rng.shuffle(keys)
    asked = [tuple(rng.sample(key, len(key))) for key in keys[: test_size + train_size]]
    return Split(train=tuple(asked[test_size:]), test=tuple(asked[:test_size]))


def rows(task: str, split_name: str, problems: Iterable[Operands]) -> list[dict[str, Any]]:
    """Rows of the schema; data_source is "arithmetic/<task>"."""
    kind = TASKS[task]
    return [
        make_row(
            data_source=f"arithmetic/{task}",
            content=kind.question(operands),
            ability="arithmetic",
            ground_truth=str(kind.answer(operands)),
            extra_info={"split": split_name, "index": index},
        )
        for index, operands in enumerate(problems)
    ]
