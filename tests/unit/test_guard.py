"""What ends a run: steps that are not finite, and engines that disagree with the policy."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from gpg_megatron.loop.agreement import MismatchError
from gpg_megatron.loop.guard import FEW_TOKENS, Guard, TooManyBadSteps
from gpg_megatron.types import (
    Completion,
    MicroBatch,
    Prompt,
    StepResult,
    TrainSample,
    VersionSpan,
)
from tests.samples import float32, int32


def result(*, updated: bool, loss: float = 1.0, grad_norm: float = 1.0) -> StepResult:
    return StepResult(
        version=0, updated=updated, loss=loss, grad_norm=grad_norm, lr=1e-3, metrics={}
    )


MADE = result(updated=True)
EMPTY = result(updated=False, loss=0.0, grad_norm=0.0)
BAD = result(updated=False, loss=math.nan)


def sample(name: str, *, group: int = 0, version: int = 4, n_tokens: int = 2) -> TrainSample:
    return TrainSample(
        prompt_id=name,
        group=group,
        index=1,
        prompt_token_ids=int32((1,)),
        response_token_ids=int32([2] * n_tokens),
        rollout_logprobs=float32([-1.0] * n_tokens),
        advantage=0.5,
        version=version,
        live=True,
        score=1.0,
    )


def canary(name: str) -> tuple[Prompt, Completion]:
    prompt = Prompt(id=name, token_ids=int32((1, 2)), messages=(), ground_truth="", data_source="d")
    completion = Completion(
        prompt_id=name,
        index=0,
        token_ids=int32((3, 4)),
        logprobs=float32((-0.5, -3.0)),
        finish_reason="stop",
        text="",
        versions=(VersionSpan(version=0, start=0, end=2),),
    )
    return prompt, completion


CANARY = [canary("a"), canary("b")]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_bad(bad: float) -> None:
    assert result(updated=False, loss=bad).is_bad
    assert result(updated=False, grad_norm=bad).is_bad
    assert not MADE.is_bad and not EMPTY.is_bad


def guard(folder: Path, said: list[str] | None = None, **options: Any) -> Guard:
    defaults: dict[str, Any] = {
        "tolerance": 1e-4,
        "coarser": torch.float32,
        "judges_rollouts": True,
        "draws_ahead": False,
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


FAR = {"mismatch/logprob_mean": 1.0, "mismatch/logprob_max": 1.0, "mismatch/unlikely_mean": 0.5}
NEAR = FAR | {"mismatch/logprob_mean": 1e-6, "mismatch/logprob_max": 1e-5}


@pytest.mark.parametrize(
    ("version", "judges_rollouts", "judged"),
    [(4, True, True), (4, False, False), (3, True, False)],
    ids=["of the present weights", "of a cut distribution", "of older weights"],
)
def test_only_whole_samples_of_the_present_weights_are_held_against_the_policy(
    tmp_path: Path, version: int, judges_rollouts: bool, judged: bool
) -> None:
    samples = [
        sample("a", version=version, n_tokens=FEW_TOKENS),
        sample("b", version=4, group=1),
    ]
    judge = guard(tmp_path, judges_rollouts=judges_rollouts)
    near, far = (replace(MADE, version=5, metrics=metrics) for metrics in (NEAR, FAR))
    assert judge.check(1, samples, [near]) is judged, "otherwise the canary has to"
    with pytest.raises(MismatchError) if judged else nullcontext():
        judge.check(1, samples, [far])


def test_a_few_tokens_that_are_too_far_apart_are_left_to_the_canary(tmp_path: Path) -> None:
    few, dead = sample("a", n_tokens=FEW_TOKENS - 1), sample("b", n_tokens=9, group=1)
    apart = FAR | {"mismatch/logprob_mean": 1e-3, "mismatch/logprob_max": 2e-3}
    near, mean = (replace(MADE, version=5, metrics=metrics) for metrics in (NEAR, apart))
    judge = guard(tmp_path)
    assert judge.check(1, [few], [near])
    assert not judge.check(1, [few, replace(dead, live=False)], [mean])
    with pytest.raises(MismatchError):
        judge.check(1, [few, dead], [mean])
    for wrong in (1.0, math.nan):
        token = replace(mean, metrics=apart | {"mismatch/logprob_max": wrong})
        with pytest.raises(MismatchError):
            judge.check(1, [few], [token])


def test_where_engines_draw_ahead_the_canary_has_to_show_it_at_every_tenth_step(
    tmp_path: Path,
) -> None:
    old, judge = [sample("a", version=3)], guard(tmp_path, draws_ahead=True)
    due = [step for step in range(1, 31) if not judge.check(step, old, [MADE])]
    assert due == [10, 20, 30]


def test_a_step_that_computed_nothing_judges_nothing(tmp_path: Path) -> None:
    assert not guard(tmp_path).check(1, [sample("a", version=0)], [EMPTY])


class Rounded:
    """A policy whose log-probs are those of the engine, or off by as much as it is told."""

    def __init__(self) -> None:
        self.off, self.moved = 0.0, 0.01
        self.dtypes: list[torch.dtype] = []

    def logprobs(self, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        return [batch.rollout_logprobs_T[batch.loss_mask_T] + self.off for batch in batches]

    def rounded_logprobs(
        self, batches: Sequence[MicroBatch], dtype: torch.dtype, seed: int
    ) -> list[torch.Tensor]:
        self.dtypes.append(dtype)
        return [values + self.moved for values in self.logprobs(batches)]


@pytest.mark.parametrize(("tolerance", "limit"), [(None, 1e-4 + 3 * 0.01), (0.5, 0.5)])
def test_the_canary_is_judged_by_the_measured_limit_or_the_user_s(
    tmp_path: Path, tolerance: float | None, limit: float
) -> None:
    policy = Rounded()
    judge = guard(tmp_path, tolerance=tolerance, coarser=torch.bfloat16)
    judge.measure(CANARY, cast(Any, policy))
    assert set(policy.dtypes) == (set() if tolerance else {torch.bfloat16})
    policy.off = 0.9 * limit
    found = judge.check_canary("now", CANARY, cast(Any, policy))
    assert found.mean == pytest.approx(0.9 * limit, rel=1e-3)
    assert judge.limit.of(found) == pytest.approx(limit, rel=1e-3)
    policy.off = 1.1 * limit
    with pytest.raises(MismatchError, match="now: .*worst at prompt"):
        judge.check_canary("now", CANARY, cast(Any, policy))
