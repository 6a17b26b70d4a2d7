"""Objects of the loop -> metrics under their names in metrics.jsonl. Pure functions, but for
memory_metrics, which asks the operating system."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from statistics import fmean

import psutil

from gpg_megatron.types import ScoredGroup, StepResult, TrainSample

ENGINE_PROCESS = "ray::Engine"
"""What Ray calls an engine's actor; the method that it is in follows."""
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


def memory_metrics(ranks: Iterable[int] = (), launcher: int | None = None) -> dict[str, float]:
    """Resident memory, 10^9 bytes, of processes on this host and all their descendants, each
    counted once. Processes that have ended count as 0; pages that processes share count in each of
    them.

        memory/rss_gb       this process, the other policy ranks, the launcher
        memory/policy_gb    of these the ranks alone, without descendants
        memory/engines_gb   of these the engines' actors, with descendants
        memory/other_gb     the launcher, Ray, processes that score
    """
    policy = {os.getpid(), *ranks}
    held: dict[psutil.Process, int] = {}
    engines: set[psutil.Process] = set()
    for pid in policy | ({launcher} if launcher else set()):
        with suppress(psutil.NoSuchProcess):
            held |= {p: _resident(p) for p in _with_descendants(psutil.Process(pid))}
    for process in held:
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith(ENGINE_PROCESS):
                engines |= _with_descendants(process)
    parts = {
        "rss": sum(held.values()),
        "policy": sum(n_bytes for process, n_bytes in held.items() if process.pid in policy),
        "engines": sum(held.get(process, 0) for process in engines),
    }
    parts["other"] = parts["rss"] - parts["policy"] - parts["engines"]
    return {f"memory/{name}_gb": n_bytes / GIGABYTE for name, n_bytes in parts.items()}


def _with_descendants(process: psutil.Process) -> set[psutil.Process]:
    return {process, *process.children(recursive=True)}


def _resident(process: psutil.Process) -> int:
    with suppress(psutil.NoSuchProcess):
        return int(process.memory_info().rss)
    return 0
