"""Metrics by hand-computed values."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Literal

import psutil
import pytest

from gpg_megatron.observe.metrics import (
    memory_metrics,
    rollout_metrics,
    staleness_metrics,
    update_metrics,
)
from gpg_megatron.types import (
    Completion,
    Prompt,
    Reward,
    ScoredGroup,
    StepResult,
    TrainSample,
    VersionSpan,
)
from tests.samples import float32, int32


def group(
    rewards: Sequence[Reward],
    lengths: Sequence[int],
    finish_reason: Literal["stop", "length"] = "stop",
) -> ScoredGroup:
    prompt = Prompt(id="a/0", token_ids=int32((1,)), messages=(), ground_truth="1", data_source="a")
    completions = tuple(
        Completion(
            prompt_id=prompt.id,
            index=i,
            token_ids=int32((7,) * length),
            logprobs=float32((-0.5,) * length),
            finish_reason=finish_reason,
            text="",
            versions=(VersionSpan(version=0, start=0, end=length),),
        )
        for i, length in enumerate(lengths)
    )
    return ScoredGroup(prompt=prompt, completions=completions, rewards=tuple(rewards))


def reward(score: float, accuracy: float, **parts: float) -> Reward:
    return Reward(score=score, accuracy=accuracy, parts=parts)


def sample(version: int) -> TrainSample:
    return TrainSample(
        prompt_id="a/0",
        group=0,
        index=0,
        prompt_token_ids=int32((1,)),
        response_token_ids=int32((7,)),
        rollout_logprobs=float32((-0.5,)),
        advantage=0.5,
        version=version,
        live=True,
        score=1.0,
    )


def test_rollout_metrics_of_two_groups() -> None:
    right, wrong = reward(1.5, 1.0, format=1.0), reward(0.5, 0.0, format=1.0)
    groups = [
        group([right, wrong], [2, 4]),
        group([wrong, reward(0.0, 0.0, timeout=1.0)], [6, 8], finish_reason="length"),
    ]
    assert rollout_metrics(groups) == {
        "reward/mean": pytest.approx((1.5 + 0.5 + 0.5 + 0.0) / 4),
        "reward/accuracy": 0.25,
        "reward/format": 0.75,
        "reward/timeout": 0.25,
        "response/length_mean": 5.0,
        "response/tokens": 20,
        "response/clipped_fraction": 0.5,
    }


def test_means_weigh_completions_alike_when_groups_are_ragged() -> None:
    right, wrong = reward(1.0, 1.0), reward(0.0, 0.0)
    metrics = rollout_metrics([group([right] * 3, [1, 1, 1]), group([wrong], [5])])
    assert metrics["reward/accuracy"] == 0.75
    assert metrics["response/length_mean"] == 2.0


def test_staleness_is_that_of_the_oldest_sample() -> None:
    mixed = staleness_metrics([sample(5), sample(3), sample(4), sample(5)], 5)
    assert mixed == {"staleness/max": 2, "staleness/fraction": 0.5}
    for fresh in ([sample(5)], []):
        assert staleness_metrics(fresh, 5) == {"staleness/max": 0, "staleness/fraction": 0.0}


def test_the_metrics_of_several_updates() -> None:
    results = [
        StepResult(version=0, updated=False, loss=0.0, grad_norm=0.0, lr=1.0, metrics=metrics)
        for metrics in (
            {"mismatch/logprob_max": 1.0, "policy/clip_fraction": 0.0},
            {},
            {"mismatch/logprob_max": 9.0, "policy/clip_fraction": 0.5},
        )
    ]
    assert update_metrics(results) == {"mismatch/logprob_max": 1.0, "policy/clip_fraction": 0.25}
    assert update_metrics(results[1:]) == {"policy/clip_fraction": 0.5}


def test_memory_counts_descendants_once() -> None:
    code = (
        "b = bytearray(200_000_000); b[::4096] = b'x' * len(b[::4096]); print(flush=True); input()"
    )
    own = memory_metrics()["memory/rss_gb"]
    this = psutil.Process()  # other tests may have left it a child
    whole = sum(p.memory_info().rss for p in (this, *this.children(recursive=True)))
    assert own == pytest.approx(whole / 1e9, rel=0.2)
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        with_child = memory_metrics()["memory/rss_gb"]
        assert 0.19 < with_child - own < 0.3
        parts = memory_metrics([child.pid, os.getpid()])
        assert parts["memory/rss_gb"] == pytest.approx(with_child, abs=0.02)
        assert parts["memory/policy_gb"] == pytest.approx(this.memory_info().rss / 1e9 + 0.2, 0.2)
        assert parts["memory/engines_gb"] == 0.0
        assert sum(parts.values()) == pytest.approx(2 * parts["memory/rss_gb"])
    finally:
        child.kill()
        child.communicate()
    assert memory_metrics([child.pid])["memory/rss_gb"] < own + 0.1
