"""Objects of the loop -> metrics under their names in metrics.jsonl. Pure functions, but for
memory_metrics, which asks the operating system."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from statistics import fmean

import psutil

from gpg_megatron.types import ScoredGroup, StepResult, TrainSample

GIGABYTE = 10**9


def rollout_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Means over all completions of the rollout batch.

    reward/mean, reward/accuracy, one reward/<part> for each part that a scorer named
    (an answer without it counts as 0), response/length_mean (tokens), response/tokens (their sum),
    response/clipped_fraction (share that ended at the length limit).
    """
    rewards = [reward for group in groups for reward in group.rewards]
    completions = [completion for group in groups for completion in group.completions]
    assert rewards and len(rewards) == len(completions), "a rollout batch has completions"
    metrics = {
        f"reward/{part}": fmean([reward.parts.get(part, 0.0) for reward in rewards])
        for part in sorted({part for reward in rewards for part in reward.parts})
    }
    return metrics | {
        "reward/mean": fmean([reward.score for reward in rewards]),
        "reward/accuracy": fmean([reward.accuracy for reward in rewards]),
        "response/length_mean": fmean([len(c.token_ids) for c in completions]),
        "response/tokens": sum(len(c.token_ids) for c in completions),
        "response/clipped_fraction": fmean([c.finish_reason == "length" for c in completions]),
    }


def staleness_metrics(samples: Sequence[TrainSample], version: int) -> dict[str, float]:
    """How far the samples are from the weights (`version`) that are about to learn from them.

    staleness/max: optimizer steps since the weights that sampled the oldest token; 0 when fully
    on-policy. staleness/fraction: share of samples with a token from older weights.
    """
    ages = [version - sample.version for sample in samples]
    return {
        "staleness/max": max(ages, default=0),
        "staleness/fraction": sum(age > 0 for age in ages) / len(ages) if ages else 0.0,
    }


def update_metrics(results: Sequence[StepResult]) -> dict[str, float]:
    """The updates of one rollout batch in one: mismatch/* of the first, before the policy
    changes; of everything else the mean over the updates that have it."""
    merged: dict[str, list[float]] = {}
    for number, result in enumerate(results):
        for key, value in result.metrics.items():
            if number == 0 or not key.startswith("mismatch/"):
                merged.setdefault(key, []).append(value)
    return {key: fmean(values) for key, values in merged.items()}


def memory_metrics(pids: Iterable[int] = ()) -> dict[str, float]:
    """memory/rss_gb: resident memory, 10^9 bytes, of this process, the processes `pids`, and
    all their descendants, each counted once. Processes that have ended count as 0; pages
    that processes share count in each of them.
    """
    processes: set[psutil.Process] = set()
    for pid in (os.getpid(), *pids):
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            processes |= {root, *root.children(recursive=True)}
    n_bytes = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            n_bytes += process.memory_info().rss
    return {"memory/rss_gb": n_bytes / GIGABYTE}
