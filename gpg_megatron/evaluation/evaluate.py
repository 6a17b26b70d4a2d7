"""Held-out accuracy of the engines' current weights, in the loop and in gpg-eval.

prompts -> n answers each -> scores -> mean@n, pass@k, maj@k per data_source
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpg_megatron.errors import writing
from gpg_megatron.evaluation.metrics import Answers, Estimate, summarise
from gpg_megatron.reward.pool import RewardPool
from gpg_megatron.rollout.sampling import Sampler, SamplingRequest
from gpg_megatron.types import Prompt, SamplingParams, ScoredGroup


def answer_all(
    sampler: Sampler, pool: RewardPool, prompts: Sequence[Prompt], params: SamplingParams
) -> list[ScoredGroup]:
    """params.n scored answers to each prompt, in the prompts' order."""
    completions = sampler.generate([SamplingRequest(prompt=p, params=params) for p in prompts])
    n = params.n
    return pool.score([(p, completions[i * n : (i + 1) * n]) for i, p in enumerate(prompts)])


def by_source(groups: Sequence[ScoredGroup], ks: Sequence[int]) -> dict[str, dict[str, Estimate]]:
    """data_source -> metric -> estimate."""
    problems: dict[str, list[Answers]] = defaultdict(list)
    for group in groups:
        problems[group.prompt.data_source].append(
            Answers(
                accuracy_n=tuple(reward.accuracy for reward in group.rewards),
                answer_n=tuple(reward.answer for reward in group.rewards),
            )
        )
    return {source: summarise(answers, ks) for source, answers in problems.items()}


def evaluate(
    sampler: Sampler,
    pool: RewardPool,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    generations: Path | None = None,
) -> dict[str, float]:
    """Answer and score held-out prompts.

    Args:
        generations: where the answers are written.

    Returns:
        eval/<data_source>/<metric> for mean@n and, with n > 1, pass@n and maj@n; and the half
        width of each one's 95 % confidence interval under .../<metric>/ci95.
    """
    groups = answer_all(sampler, pool, prompts, params)
    if generations is not None:
        write_generations(generations, groups)
    metrics: dict[str, float] = {}
    for source, estimates in by_source(groups, [params.n]).items():
        for name, estimate in estimates.items():
            metrics[f"eval/{source}/{name}"] = estimate.value
            if estimate.half_width is not None:
                metrics[f"eval/{source}/{name}/ci95"] = estimate.half_width
    return metrics


def write_generations(
    path: Path, groups: Sequence[ScoredGroup], *, extra_info: bool = False, **columns: Any
) -> None:
    """One JSON object a line for each answer; columns are the same in all of them.

    Args:
        extra_info: the row's own is written, too, for functions that score the answers again.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, groups, extra_info, columns)


def _write(
    path: Path, groups: Sequence[ScoredGroup], extra_info: bool, columns: Mapping[str, Any]
) -> None:
    with path.open("a" if columns else "w", encoding="utf-8") as file:
        for group in groups:
            for completion, reward in zip(group.completions, group.rewards, strict=True):
                row = {
                    **columns,
                    "prompt_id": group.prompt.id,
                    "data_source": group.prompt.data_source,
                    "messages": [dict(message) for message in group.prompt.messages],
                    "ground_truth": group.prompt.ground_truth,
                    "index": completion.index,
                    "response": completion.text,
                    "answer": reward.answer,
                    "accuracy": reward.accuracy,
                    "score": reward.score,
                    "parts": dict(reward.parts),
                    "length": len(completion.token_ids),
                    "finish_reason": completion.finish_reason,
                }
                if extra_info:
                    row["extra_info"] = group.prompt.extra_info
                # ASCII escapes: a response may hold halves of surrogate pairs. What of extra_info
                # JSON cannot hold, dates for example, becomes a text.
                file.write(json.dumps(row, default=str) + "\n")
