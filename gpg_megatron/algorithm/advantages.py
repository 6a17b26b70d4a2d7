"""Rewards to advantages, after GPG (arXiv 2504.02546).

    A_i = alpha * (r_i - mean(r)) / F_norm        mean and F_norm over the group of sample i
    alpha = B / (B - M)                           B samples in the batch, M of them in dead groups

A group is dead when all its answers are right or all are wrong: it carries no gradient, yet it
counts in the batch's mean. alpha undoes that dilution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import torch

from gpg_megatron.config import AlgorithmConfig
from gpg_megatron.errors import UserError
from gpg_megatron.types import Completion, ScoredGroup, TrainSample

ACCURACY_TOLERANCE = 1e-6
STD_EPS = 1e-6
LARGEST_REWARD = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageStats:
    """What assign_advantages saw in one rollout batch."""

    alpha: float
    """The factor in every advantage; 0.0 when no group is live."""
    live_fraction: float
    """Share of groups that are live, in [0, 1]; 0.0 without groups."""
    n_groups: int
    n_live_groups: int
    n_samples: int
    """B."""
    n_dead_samples: int
    """M, samples in dead groups."""


def is_live(group: ScoredGroup) -> bool:
    """True when the accuracies of the group differ by more than ACCURACY_TOLERANCE.

    Accuracy decides, not score: a shaped score (length, format) varies among answers that are
    all wrong, and would turn every such group into one that trains on style alone. A group of
    one is dead.
    """
    accuracies = [reward.accuracy for reward in group.rewards]
    return max(accuracies) - min(accuracies) > ACCURACY_TOLERANCE


def live_fraction(groups: Sequence[ScoredGroup]) -> float:
    """Share of live groups, in [0, 1]; 0.0 for an empty sequence."""
    return sum(map(is_live, groups)) / len(groups) if groups else 0.0


def needs_redraw(
    groups: Sequence[ScoredGroup], config: AlgorithmConfig, rounds_done: int, *, batch_size: int
) -> bool:
    """The paper's beta_th rule: whether another batch of prompts has to be drawn.

    Live groups accumulate over the draws and are compared with the size of one draw: the share
    within everything that was drawn would not grow however often one draws.

    Args:
        groups: all groups of this step so far, every draw included.
        config: beta_th (0 turns the rule off) and max_redraws.
        rounds_done: draws made after the first one, at least 0.
        batch_size: prompts in one draw.
    """
    n_live = sum(map(is_live, groups))
    return rounds_done < config.max_redraws and n_live < config.beta_th * batch_size


def alpha(groups: Sequence[ScoredGroup], mode: str) -> float:
    """The correction for dead groups over one rollout batch.

    "none": 1. "group": B / (B - M), the paper's. "token": response tokens of the batch /
    response tokens of its live groups, which is exact when the loss is a mean over tokens.
    Without a live group (or a token in one) there is nothing to scale: 0.0.
    """
    assert mode in ("none", "group", "token"), mode
    size = _n_tokens if mode == "token" else _n_samples
    n_live = sum(size(group) for group in groups if is_live(group))
    if n_live == 0:
        return 0.0
    return 1.0 if mode == "none" else sum(map(size, groups)) / n_live


def centred_rewards(group: ScoredGroup, f_norm: str) -> list[float]:
    """(r_i - mean(r)) / F_norm for each of the G answers, from the scores.

    F_norm is 1 ("one"), or the group's standard deviation ("std"; sample standard deviation,
    G - 1 in the denominator, plus STD_EPS). Mean and deviation are correctly rounded, so a
    sample whose score equals its group's mean gets exactly 0.0. "std" needs G >= 2.
    """
    assert f_norm in ("one", "std"), f_norm
    scores = [reward.score for reward in group.rewards]
    baseline = mean(scores)
    divisor = stdev(scores) + STD_EPS if f_norm == "std" else 1.0
    return [(score - baseline) / divisor for score in scores]


def assign_advantages(
    groups: Sequence[ScoredGroup], config: AlgorithmConfig
) -> tuple[list[TrainSample], AdvantageStats]:
    """Turn the scored groups of one rollout batch into training samples.

    Advantages are exactly 0.0 for members of dead groups, even where their scores differ, for
    empty responses, and for samples whose score is their group's mean.

    Args:
        groups: at least one answer in each; group i gives samples with group == i.
        config: alpha and f_norm.

    Returns:
        the samples, in the order of groups and of answers within them, and the statistics.

    Raises:
        UserError: a score or accuracy is not a finite float32.
    """
    for group in groups:
        _check(group)
    factor = alpha(groups, config.alpha)
    newest = max((s.version for g in groups for c in g.completions for s in c.versions), default=0)
    samples = []
    for index, group in enumerate(groups):
        centred = centred_rewards(group, config.f_norm) if is_live(group) else None
        for i, completion in enumerate(group.completions):
            advantage = factor * centred[i] if centred and completion.token_ids else 0.0
            samples.append(_sample(group, index, completion, advantage, newest))
    live = [group for group in groups if is_live(group)]
    stats = AdvantageStats(
        alpha=factor,
        live_fraction=live_fraction(groups),
        n_groups=len(groups),
        n_live_groups=len(live),
        n_samples=len(samples),
        n_dead_samples=len(samples) - sum(map(_n_samples, live)),
    )
    return samples, stats


def _sample(
    group: ScoredGroup, index: int, completion: Completion, advantage: float, newest: int
) -> TrainSample:
    # An empty response has no token that could be stale: it takes the batch's newest version.
    return TrainSample(
        prompt_id=group.prompt.id,
        group=index,
        index=completion.index,
        prompt_token_ids=group.prompt.token_ids,
        response_token_ids=completion.token_ids,
        rollout_logprobs=completion.logprobs,
        advantage=advantage,
        version=min((span.version for span in completion.versions), default=newest),
    )


def _check(group: ScoredGroup) -> None:
    assert len(group.completions) == len(group.rewards) > 0, group.prompt.id
    for index, reward in enumerate(group.rewards):
        for name, value in (("score", reward.score), ("accuracy", reward.accuracy)):
            if not abs(value) <= LARGEST_REWARD:
                raise UserError(
                    f"reward of prompt {group.prompt.id!r}, answer {index}: {name} is {value}; "
                    "expected a finite number that fits in float32"
                )


def _n_samples(group: ScoredGroup) -> int:
    return len(group.completions)


def _n_tokens(group: ScoredGroup) -> int:
    return sum(len(completion.token_ids) for completion in group.completions)
