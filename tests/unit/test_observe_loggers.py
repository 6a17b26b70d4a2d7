"""The run directory that a logger leaves, read back."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from gpg_megatron.config.sections import LoggingConfig
from gpg_megatron.errors import UserError
from gpg_megatron.observe.loggers import RunLogger, check_logging
from gpg_megatron.observe.rundir import damage, read_metrics, read_rollouts
from gpg_megatron.types import (
    Completion,
    Prompt,
    Reward,
    ScoredGroup,
    TrainSample,
    VersionSpan,
)
from tests.samples import float32, int32

PLAIN = LoggingConfig(tensorboard=False)


def rollout(n_groups: int, size: int) -> tuple[list[ScoredGroup], list[TrainSample]]:
    groups, samples = [], []
    for g in range(n_groups):
        prompt = Prompt(
            id=f"a/{g}",
            token_ids=int32((1, 2)),
            messages=({"role": "user", "content": f"{g} + 1 ="},),
            ground_truth=str(g + 1),
            data_source="arithmetic",
        )
        completions = [
            Completion(
                prompt_id=prompt.id,
                index=i,
                token_ids=int32((7,) * i),
                logprobs=float32(-0.5 * k for k in range(i)),
                finish_reason="stop",
                text=f"answer {i} \ud800\u2028",
                versions=(VersionSpan(version=4, start=0, end=i),),
            )
            for i in range(size)
        ]
        rewards = [Reward(score=0.5 * i, accuracy=float(i > 0), parts={"p": 1.0 * i})
                   for i in range(size)]  # fmt: skip
        groups.append(
            ScoredGroup(prompt=prompt, completions=tuple(completions), rewards=tuple(rewards))
        )
        samples += [
            TrainSample(
                prompt_id=prompt.id,
                group=g,
                index=c.index,
                prompt_token_ids=prompt.token_ids,
                response_token_ids=c.token_ids,
                rollout_logprobs=c.logprobs,
                advantage=10.0 * g + c.index,
                version=4,
                live=True,
                score=0.5 * c.index,
            )
            for c in completions
        ]
    return groups, samples


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def test_a_row_has_the_step_first_and_sorted_keys(tmp_path: Path) -> None:
    with closing(RunLogger(tmp_path / "run", PLAIN, "a: 1\n")) as logger:
        logger.log(3, {"b/x": 0.5, "a/y": 2, "c": None, "d": math.nan, "e": -math.inf})
        # Flushed while the run goes on.
        [line] = lines(tmp_path / "run" / "metrics.jsonl")
    assert line == '{"step": 3, "a/y": 2, "b/x": 0.5, "c": null, "d": null, "e": null}'
    assert (tmp_path / "run" / "config.yaml").read_text() == "a: 1\n"


def test_values_of_array_libraries_are_written_as_numbers(tmp_path: Path) -> None:
    import torch

    with closing(RunLogger(tmp_path, PLAIN, "")) as logger:
        logger.log(1, {"x": torch.tensor(0.25), "y": torch.tensor(math.nan)})  # type: ignore
    assert read_metrics(tmp_path) == [{"step": 1, "x": 0.25, "y": None}]


def test_a_second_logger_continues_and_mends_a_torn_line(tmp_path: Path) -> None:
    with closing(RunLogger(tmp_path, PLAIN, "")) as logger:
        logger.log(1, {"x": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "x"')
    assert read_metrics(tmp_path) == [{"step": 1, "x": 1.0}]
    with closing(RunLogger(tmp_path, PLAIN, "")) as logger:
        logger.log(2, {"x": 2.0})
    assert read_metrics(tmp_path) == [{"step": 1, "x": 1.0}, {"step": 2, "x": 2.0}]


def test_rows_of_a_step_merge_and_a_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    with closing(RunLogger(tmp_path, PLAIN, "")) as logger:
        for step in (0, 1, 2, 3):
            logger.log(step, {"x": float(step)})
        logger.log(3, {"eval/a/mean@1": 0.5})
    assert read_metrics(tmp_path)[-1] == {"step": 3, "x": 3.0, "eval/a/mean@1": 0.5}
    with closing(RunLogger(tmp_path, PLAIN, "")) as logger:
        logger.log(2, {"y": 20.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2]
    assert read_metrics(tmp_path)[:2] == [{"step": 0, "x": 0.0}, {"step": 1, "x": 1.0}]


def test_bad_run_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        read_metrics(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    with pytest.raises(UserError, match="no rows"):
        read_metrics(tmp_path)
    path.write_text("\0\n")
    with pytest.raises(UserError, match="no rows"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        b"\0" * 4096,
        b'\0\0{"step": 2}',
        b'{"step": 2, "x"',
        b'{"step": 2, "x": 1.\xff}',
        b"[2]",
        b'{"x": 1.0}',
        b'{"step": true}',
        b'{"step": 2, "x": "1"}',
        b'{"step": 2, "x": NaN}',
        b'{"step": 2, "x": 1e999}',
        b'{"step": 2, "x": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
    ],
    ids=lambda line: str(line[:20]),
)
def test_a_damaged_line_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "x": 1.0}\n' + line + b'\n{"step": 3, "x": null}\n')
    with closing(RunLogger(tmp_path, PLAIN, "")) as logger:
        logger.log(4, {"x": 4.0})
    named = f"{path}: damaged and left out: line 2"
    assert capsys.readouterr().err == f"warning: {named}\n" and damage(tmp_path) == named
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3, 4]


def test_the_first_ten_damaged_lines_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"\0\n" * 11)
    said = damage(tmp_path)
    assert said is not None
    assert said.endswith("damaged and left out: lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ...")


def test_rollouts_hold_the_first_samples(tmp_path: Path) -> None:
    groups, samples = rollout(n_groups=3, size=2)
    config = LoggingConfig(tensorboard=False, rollout_samples=3)
    with closing(RunLogger(tmp_path, config, "")) as logger:
        for step in (1, 2, 10):
            logger.write_rollouts(step, groups, list(reversed(samples)))
    assert sorted(p.name for p in (tmp_path / "rollouts").iterdir()) == [
        "step_1.jsonl",
        "step_10.jsonl",
        "step_2.jsonl",
    ]
    rollouts = read_rollouts(tmp_path)
    assert list(rollouts) == [1, 10]
    rows = rollouts[10]
    assert [(row["group"], row["index"]) for row in rows] == [(0, 0), (0, 1), (1, 0)]
    assert rows[0]["logprob_mean"] is None
    assert rows[1] == {
        "step": 10,
        "group": 0,
        "index": 1,
        "prompt_id": "a/0",
        "prompt": "0 + 1 =",
        "response": "answer 1 \ud800\u2028",
        "ground_truth": "1",
        "reward": 0.5,
        "accuracy": 1.0,
        "parts": {"p": 1.0},
        "advantage": 1.0,
        "version": 4,
        "logprob_mean": 0.0,
        "length": 1,
        "finish_reason": "stop",
    }
    assert rows[2]["advantage"] == 10.0


def test_no_rollouts_when_none_are_wanted(tmp_path: Path) -> None:
    with closing(
        RunLogger(tmp_path, LoggingConfig(tensorboard=False, rollout_samples=0), "")
    ) as logger:
        logger.write_rollouts(1, *rollout(n_groups=1, size=2))
    assert not (tmp_path / "rollouts").exists()


def test_tensorboard_gets_the_finite_values(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with closing(RunLogger(tmp_path, LoggingConfig(), "")) as logger:
        logger.log(1, {"reward/mean": 0.25, "policy/loss": math.nan})
        logger.log(2, {"reward/mean": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]
    assert events.Tags()["scalars"] == ["reward/mean"]


def test_a_configured_logger_must_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = LoggingConfig(tensorboard=False, wandb=True)
    with pytest.raises(UserError, match=r"logging\.wandb is true but the package wandb is not"):
        RunLogger(tmp_path / "run", config, "")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"logging\.tensorboard is true"):
        check_logging(LoggingConfig())
    check_logging(PLAIN)


def test_wandb_is_told_what_metrics_jsonl_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append((step, values))

        def finish(self) -> None:
            calls.append("finish")

    def init(**arguments: Any) -> Run:
        calls.append(arguments)
        return Run()

    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = LoggingConfig(tensorboard=False, wandb=True, wandb_project="p")
    with closing(RunLogger(tmp_path / "run7", config, "model: {path: m}\n")) as logger:
        logger.log(1, {"x": 0.5, "y": math.nan})
    run7 = str(tmp_path / "run7")
    assert calls == [
        {"project": "p", "name": "run7", "dir": run7, "config": {"model": {"path": "m"}}},
        (1, {"x": 0.5}),
        "finish",
    ]


def test_an_output_dir_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"trainer.output_dir .*file.*; expected a directory") as e:
        RunLogger(tmp_path / "file" / "run", PLAIN, "")
    assert "\n" not in str(e.value)
