"""What ends a run: steps that are not finite, and engines that disagree with the policy."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpg_megatron.loop.agreement import MismatchError
from gpg_megatron.loop.guard import Guard, TooManyBadSteps
from gpg_megatron.types import StepResult, TrainSample


def result(*, updated: bool, loss: float = 1.0, grad_norm: float = 1.0) -> StepResult:
    return StepResult(
        version=0, updated=updated, loss=loss, grad_norm=grad_norm, lr=1e-3, metrics={}
    )


MADE = result(updated=True)
EMPTY = result(updated=False, loss=0.0, grad_norm=0.0)
BAD = result(updated=False, loss=math.nan)


def sample(name: str, *, group: int = 0, version: int = 4) -> TrainSample:
    return TrainSample(
        prompt_id=name,
        group=group,
        index=1,
        prompt_token_ids=(1,),
        response_token_ids=(2, 3),
        rollout_logprobs=(-1.0, -1.0),
        advantage=0.5,
        version=version,
        live=True,
        score=1.0,
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_bad(bad: float) -> None:
    assert result(updated=False, loss=bad).is_bad
    assert result(updated=False, grad_norm=bad).is_bad
    assert not MADE.is_bad and not EMPTY.is_bad


def guard(folder: Path, said: list[str] | None = None, **options: Any) -> Guard:
    defaults: dict[str, Any] = {
        "mismatch_limit": 1e-4,
        "judges_steps": True,
        "max_bad_steps": 3,
        "samples_file": folder / "bad_samples.jsonl",
        "say": (said if said is not None else []).append,
        "is_rank0": True,
    }
    return Guard(**defaults | options)


@pytest.mark.parametrize(
    ("history", "too_many"),
    [
        ([BAD, BAD, BAD], True),
        ([BAD, BAD], False),
        ([BAD, BAD, MADE, BAD, BAD], False),
        ([BAD, BAD, EMPTY, BAD], True),  # nothing was learned in between
        ([MADE, BAD, BAD, BAD], True),
    ],
)
def test_three_in_a_row(tmp_path: Path, history: list[StepResult], too_many: bool) -> None:
    def one_by_one() -> None:
        judge = guard(tmp_path)
        for step, each in enumerate(history, start=1):
            judge.check(step, [sample("a")], [each])

    def at_once() -> None:
        samples = [sample("a", group=i) for i in range(len(history))]
        guard(tmp_path).check(1, samples, history)

    for check in (one_by_one, at_once):
        with pytest.raises(TooManyBadSteps) if too_many else nullcontext():
            check()


def test_the_samples_of_the_row_are_written(tmp_path: Path) -> None:
    judge = guard(tmp_path, max_bad_steps=2)
    judge.check(1, [sample("a"), sample("b", group=1)], [BAD, MADE])
    groups = [sample("c"), sample("d", group=1), sample("e", group=1)]
    judge.check(2, groups, [MADE, BAD])
    with pytest.raises(TooManyBadSteps):
        judge.check(3, [sample("f")], [result(updated=False, grad_norm=math.inf)])
    rows = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").open()]
    assert [(r["step"], r["update"], r["prompt_id"]) for r in rows] == [
        (2, 2, "d"),
        (2, 2, "e"),
        (3, 1, "f"),
    ]
    assert rows[0] == {
        "step": 2,
        "update": 2,
        "loss": "nan",
        "grad_norm": "1.0",
        "prompt_id": "d",
        "group": 1,
        "index": 1,
        "advantage": 0.5,
        "version": 4,
        "length": 2,
    }


@pytest.mark.parametrize("is_rank0", [True, False])
def test_the_run_ends_with_one_line_and_the_file(tmp_path: Path, is_rank0: bool) -> None:
    said: list[str] = []
    judge = guard(tmp_path, said, max_bad_steps=2, is_rank0=is_rank0)
    judge.check(7, [sample("a")], [BAD])
    assert said == ["step 7: update skipped, loss nan, gradient norm 1"]
    with pytest.raises(TooManyBadSteps) as error:
        judge.check(8, [sample("b")], [BAD])
    path = tmp_path / "bad_samples.jsonl"
    message = str(error.value)
    assert "\n" not in message and error.value.everywhere
    assert all(part in message for part in ("step 8", "trainer.max_bad_steps", str(path)))
    assert path.exists() is is_rank0


@pytest.mark.parametrize(
    ("version", "judges_steps", "refused"),
    [(4, True, True), (4, False, False), (3, True, False)],
    ids=["of the present weights", "cut or in low precision", "of older weights"],
)
def test_only_samples_of_the_present_weights_are_held_against_the_policy(
    tmp_path: Path, version: int, judges_steps: bool, refused: bool
) -> None:
    far = {"mismatch/logprob_mean": 1.0, "mismatch/logprob_max": 1.0}
    first = replace(result(updated=True), version=5, metrics=far)
    with pytest.raises(MismatchError) if refused else nullcontext():
        guard(tmp_path, judges_steps=judges_steps).check(
            1, [sample("a", version=version), sample("b", version=4, group=1)], [first]
        )
