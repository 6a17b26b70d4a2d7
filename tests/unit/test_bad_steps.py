"""Steps that are not finite: counted in a row, their samples written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpg_megatron.loop.guard import BadSteps, TooManyBadSteps
from gpg_megatron.types import StepResult, TrainSample


def result(*, updated: bool, loss: float = 1.0, grad_norm: float = 1.0) -> StepResult:
    return StepResult(
        version=0, updated=updated, loss=loss, grad_norm=grad_norm, lr=1e-3, metrics={}
    )


MADE = result(updated=True)
EMPTY = result(updated=False, loss=0.0, grad_norm=0.0)
BAD = result(updated=False, loss=math.nan)


def sample(name: str) -> TrainSample:
    return TrainSample(
        prompt_id=name,
        group=0,
        index=1,
        prompt_token_ids=(1,),
        response_token_ids=(2, 3),
        rollout_logprobs=(-1.0, -1.0),
        advantage=0.5,
        version=4,
        live=True,
        score=1.0,
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_bad(bad: float) -> None:
    assert result(updated=False, loss=bad).is_bad
    assert result(updated=False, grad_norm=bad).is_bad
    assert not MADE.is_bad and not EMPTY.is_bad


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
def test_three_in_a_row(history: list[StepResult], too_many: bool) -> None:
    one_by_one, at_once = BadSteps(3), BadSteps(3)
    for step, each in enumerate(history, start=1):
        one_by_one.see(step, [[sample("a")]], [each])
    at_once.see(1, [[sample("a")]] * len(history), history)
    assert one_by_one.are_too_many is at_once.are_too_many is too_many


def test_the_samples_of_the_row_are_written(tmp_path: Path) -> None:
    bad_steps = BadSteps(2)
    bad_steps.see(1, [[sample("a")], [sample("b")]], [BAD, MADE])
    bad_steps.see(2, [[sample("c")], [sample("d"), sample("e")]], [MADE, BAD])
    bad_steps.see(3, [[sample("f")]], [result(updated=False, grad_norm=math.inf)])
    assert bad_steps.are_too_many
    bad_steps.write(tmp_path / "bad.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
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
        "group": 0,
        "index": 1,
        "advantage": 0.5,
        "version": 4,
        "length": 2,
    }


def test_the_run_ends_with_one_line_and_the_file(tmp_path: Path) -> None:
    """The trainer's part, with nothing behind it: a loss that is no number cannot be ordered."""
    from gpg_megatron.config.sections import Config, TrainerConfig
    from gpg_megatron.loop.trainer import Trainer

    said: list[str] = []
    rank0 = SimpleNamespace(
        config=Config(trainer=TrainerConfig(output_dir=str(tmp_path), max_bad_steps=2)),
        conductor=object(),
        _bad_steps=BadSteps(2),
        _say=said.append,
    )
    Trainer._check_finite(rank0, 7, [sample("a")], [BAD])
    assert said == ["step 7: update skipped, loss nan, gradient norm 1"]
    with pytest.raises(TooManyBadSteps) as error:
        Trainer._check_finite(rank0, 8, [sample("b")], [BAD])
    path = tmp_path / "bad_samples.jsonl"
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in ("step 8", "trainer.max_bad_steps", str(path)))
    assert [json.loads(line)["prompt_id"] for line in path.open()] == ["a", "b"]
