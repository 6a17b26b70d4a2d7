"""Objects of the loop -> metrics under their names in metrics.jsonl. Pure functions, but for
memory_metrics, which asks the operating system."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

import psutil

from gpg_megatron.types import ScoredGroup, TrainSample

GIGABYTE = 10**9


def rollout_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Means over all completions of the rollout batch.

    reward/mean, reward/accuracy, one reward/<part> for each part that a scorer named
    (an answer without it counts as 0), response/length_mean (tokens),
    response/clipped_fraction (share that ended at the length limit).
    """
    rewards = [reward for group in groups for reward in group.rewards]
    completions = [completion for group in groups for completion in group.completions]
    assert rewards and len(rewards) == len(completions), "a rollout batch has completions"
    metrics = {
        f"reward/{part}": fmean(reward.parts.get(part, 0.0) for reward in rewards)
        for part in sorted({part for reward in rewards for part in reward.parts})
    }
    return metrics | {
        "reward/mean": fmean(reward.score for reward in rewards),
        "reward/accuracy": fmean(reward.accuracy for reward in rewards),
        "response/length_mean": fmean(len(c.token_ids) for c in completions),
        "response/clipped_fraction": fmean(c.finish_reason == "length" for c in completions),
    }


def staleness_metrics(samples: Iterable[TrainSample], version: int) -> dict[str, float]:
    """staleness/max: optimizer steps between the weights that sampled the oldest token and
    the weights (`version`) that are about to learn from it; 0 when fully on-policy."""
    return {"staleness/max": max((version - sample.version for sample in samples), default=0)}


def memory_metrics(pids: Iterable[int] = ()) -> dict[str, float]:
    """memory/rss_gb: resident memory, 10^9 bytes, of this process, the processes `pids`, and
    all their descendants, each counted once. Processes that have ended count as 0; pages
    that processes share count in each of them.
    """
    processes: dict[int, psutil.Process] = {}
    for pid in (psutil.Process().pid, *pids):
        try:
            root = psutil.Process(pid)
            processes |= {p.pid: p for p in (root, *root.children(recursive=True))}
        except psutil.NoSuchProcess:
            continue
    return {"memory/rss_gb": sum(map(_rss, processes.values())) / GIGABYTE}


def _rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
