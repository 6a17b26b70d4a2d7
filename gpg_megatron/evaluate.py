"""Held-out accuracy of the engines' current weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from gpg_megatron.config import Config
from gpg_megatron.reward.pool import RewardPool
from gpg_megatron.rollout.fleet import Fleet
from gpg_megatron.rollout.sampling import SamplingRequest
from gpg_megatron.types import Prompt


def evaluate(
    fleet: Fleet, pool: RewardPool, prompts: Sequence[Prompt], config: Config
) -> dict[str, float]:
    """Sample val_n answers to each prompt and score them.

    The seeds depend on trainer.seed and the prompt alone, so two evaluations differ by the
    weights only.

    Returns:
        {"eval/<data_source>/mean@<n>": share of right answers}.
    """
    n = config.trainer.val_n
    requests = [
        SamplingRequest(
            prompt=prompt,
            n=n,
            temperature=config.trainer.val_temperature,
            top_p=1.0,
            top_k=-1,
            max_tokens=config.rollout.max_response_length,
            stop=config.rollout.stop,
            seed=config.trainer.seed,
        )
        for prompt in prompts
    ]
    completions = fleet.generate(requests)
    items = [(prompt, completions[i * n : (i + 1) * n]) for i, prompt in enumerate(prompts)]
    accuracies: dict[str, list[float]] = defaultdict(list)
    for group in pool.score(items):
        accuracies[group.prompt.data_source] += [r.accuracy for r in group.rewards]
    return {f"eval/{source}/mean@{n}": fmean(values) for source, values in accuracies.items()}
