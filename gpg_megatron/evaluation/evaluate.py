"""Held-out accuracy of the engines' current weights, in the loop and in gpg-eval.

prompts -> n answers each -> scores -> mean@n, pass@k, maj@k per data_source
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpg_megatron.config.sections import Config
from gpg_megatron.evaluation.metrics import Answers, Estimate, summarise
from gpg_megatron.reward.pool import RewardPool
from gpg_megatron.rollout.fleet import Fleet
from gpg_megatron.rollout.sampling import SamplingRequest
from gpg_megatron.types import Prompt, ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How held-out prompts are answered."""

    n: int
    temperature: float
    """0: the most likely token; then n is 1."""
    top_p: float
    top_k: int
    """-1: all tokens."""
    max_tokens: int
    stop: tuple[str, ...]
    seed: int


def answer_all(
    fleet: Fleet, pool: RewardPool, prompts: Sequence[Prompt], sampling: Sampling
) -> list[ScoredGroup]:
    """n scored answers to each prompt, in the prompts' order.

    The seeds depend on sampling.seed and the prompt alone, so two evaluations differ by the
    weights only.
    """
    requests = [
        SamplingRequest(
            prompt=prompt,
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            stop=sampling.stop,
            seed=sampling.seed,
        )
        for prompt in prompts
    ]
    completions = fleet.generate(requests)
    n = sampling.n
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
    fleet: Fleet,
    pool: RewardPool,
    prompts: Sequence[Prompt],
    config: Config,
    generations: Path | None = None,
) -> dict[str, float]:
    """Answer the held-out prompts as the section validation says.

    Args:
        generations: where the answers are written.

    Returns:
        eval/<data_source>/<metric> for mean@n and, with n > 1, pass@n and maj@n; and the half
        width of each one's 95 % confidence interval under .../<metric>/ci95.
    """
    v = config.validation
    sampling = Sampling(
        n=v.n,
        temperature=v.temperature,
        top_p=v.top_p,
        top_k=v.top_k,
        max_tokens=config.rollout.max_response_length,
        stop=config.rollout.stop,
        seed=config.trainer.seed,
    )
    groups = answer_all(fleet, pool, prompts, sampling)
    if generations is not None:
        write_generations(generations, groups)
    metrics: dict[str, float] = {}
    for source, estimates in by_source(groups, [v.n]).items():
        for name, estimate in estimates.items():
            metrics[f"eval/{source}/{name}"] = estimate.value
            if estimate.half_width is not None:
                metrics[f"eval/{source}/{name}/ci95"] = estimate.half_width
    return metrics


def write_generations(path: Path, groups: Sequence[ScoredGroup], **columns: Any) -> None:
    """One JSON object a line for each answer; columns are the same in all of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
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
                # ASCII escapes: a response may hold halves of surrogate pairs.
                file.write(json.dumps(row) + "\n")
