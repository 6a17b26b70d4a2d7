"""The metrics of one step, from what its parts made."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from gpg_megatron.algorithm.advantages import AdvantageStats
from gpg_megatron.loop.collector import Rollout
from gpg_megatron.observe.metrics import staleness_metrics, update_metrics
from gpg_megatron.types import StepResult, TrainBatch, TrainSample


def step_metrics(
    rollout: Rollout,
    samples: Sequence[TrainSample],
    stats: AdvantageStats,
    batches: Sequence[TrainBatch],
    results: Sequence[StepResult],
) -> dict[str, float]:
    """The metrics of one step that do not depend on the clock."""
    updated = [r for r in results if r.updated]
    return {
        **rollout.metrics,
        **staleness_metrics(samples, results[0].version - results[0].updated),
        **update_metrics(results),
        "version": results[-1].version,
        "group/alpha": stats.alpha * fmean(batch.alpha for batch in batches),
        "group/live_fraction": stats.live_fraction,
        "policy/loss": fmean(r.loss for r in updated) if updated else 0.0,
        "policy/grad_norm": fmean(r.grad_norm for r in updated) if updated else 0.0,
        "policy/lr": results[-1].lr,
        "policy/updates_skipped": len(results) - len(updated),
        "policy/updates_bad": sum(r.is_bad for r in results),
        "policy/updates_held": sum(r.is_held for r in results),
        "policy/tokens": sum(b.n_computed_tokens for b in batches),
        "policy/tokens_skipped": sum(b.n_skipped_tokens for b in batches),
        "policy/tokens_shared": sum(b.n_shared_tokens for b in batches),
        "policy/flops": sum(b.flops for b in batches),
    }


def throughput(metrics: dict[str, float], peak_flops_per_s: float) -> dict[str, float]:
    """Tokens and operations per second of the phases that ran."""
    flops_per_s = metrics["policy/flops"] / metrics["timing/policy_s"]
    rates = {}
    # Where batches lie ready, one may be taken right after another.
    if rollout_s := metrics.get("timing/rollout_s"):
        rates["throughput/rollout_tokens_per_s"] = metrics["response/tokens"] / rollout_s
    return rates | {
        "throughput/policy_tokens_per_s": metrics["policy/tokens"] / metrics["timing/policy_s"],
        "throughput/policy_flops_per_s": flops_per_s,
        "throughput/policy_mfu": flops_per_s / peak_flops_per_s,
    }
