"""Rewards to advantages, after GPG (arXiv 2504.02546).

    A_i = alpha * (r_i - baseline) / F_norm
    alpha = B / (B - M)                           B samples in the batch, M of them in dead groups

A group is dead when all its answers are right or all are wrong: it carries no gradient, yet it
counts in the batch's mean. alpha undoes that dilution. Other baselines, divisors and alphas are
those of the methods that GPG is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from statistics import mean, stdev

import torch

from gpg_megatron.config.algorithm import AlgorithmConfig
from gpg_megatron.errors import UserError
from gpg_megatron.types import Reward, ScoredGroup, TrainSample

DEAD_TOLERANCE = 1e-6
LARGEST_REWARD = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageStats:
    """What assign_advantages saw in one rollout batch."""

    alpha: float
    """The factor in every advantage, or, with alpha_apply "step", of every update; 1.0 when each
    update has its own. 0.0 when dead groups are counted and no group is live."""
    live_fraction: float
    """Share of groups that are live, in [0, 1]; 0.0 without groups."""
    n_samples: int
    """B."""
    n_shaped: int
    """Samples with a score that is neither 0 nor 1."""


def is_live(group: ScoredGroup, dead_by: str = "accuracy") -> bool:
    """True when the answers of the group differ by more than DEAD_TOLERANCE.

    What is compared is dead_by: "accuracy", "score", or a part of the rewards; "none", where no
    group is dead, takes accuracy, for the metrics. Accuracy is the default: a shaped score
    (length, format) varies among answers that are all wrong, and would turn every such group
    into one that trains on style alone. A group of one is dead.
    """
    values = [_worth(reward, dead_by) for reward in group.rewards]
    return max(values) - min(values) > DEAD_TOLERANCE


def live_fraction(groups: Sequence[ScoredGroup], dead_by: str = "accuracy") -> float:
    """Share of live groups, in [0, 1]; 0.0 for an empty sequence."""
    return sum(is_live(group, dead_by) for group in groups) / len(groups) if groups else 0.0


def alpha(samples: Sequence[TrainSample], mode: str, largest: float = 0.0) -> float:
    """The correction for samples that carry no gradient.

    "none": 1. "group": B / (B - M), the paper's. "token": response tokens of all samples /
    response tokens of those in live groups, which is exact when the loss is a mean over tokens.
    Without a live group (or a token in one) there is nothing to scale: 0.0 in these two.
    "nonzero": samples / samples with a score other than 0, or / 1 when there is none (verl).

    Args:
        samples: all over which alpha counts.
        mode: as above.
        largest: upper limit; 0: none.
    """
    assert mode in ("none", "group", "token", "nonzero"), mode
    if mode == "none":
        return 1.0
    if mode == "nonzero":
        factor = len(samples) / max(1, sum(sample.score != 0.0 for sample in samples))
    else:
        size = _n_tokens if mode == "token" else _one
        n_live = sum(size(sample) for sample in samples if sample.live)
        factor = sum(map(size, samples)) / n_live if n_live else 0.0
    return min(factor, largest) if largest else factor


def normalised_rewards(groups: Sequence[ScoredGroup], config: AlgorithmConfig) -> list[list[float]]:
    """(r_i - baseline) / F_norm for each answer of each group, from the scores.

    | baseline | subtracted from r_i |
    |---|---|
    | group-mean (GPG, GRPO) | mean of its group; 0 for a group of one |
    | leave-one-out (RLOO, arXiv 2402.14740) | mean of the other answers of its group |
    | min-variance (OPO, arXiv 2505.23585) | the same, each answer weighed by its tokens |
    | batch-mean (REINFORCE++, arXiv 2501.03262) | mean of all answers |

    | f_norm | divisor of r_i - baseline |
    |---|---|
    | one (GPG) | 1 |
    | std (GRPO, arXiv 2402.03300) | standard deviation of the group's scores + f_norm_eps |
    | mean (MaxRL, arXiv 2602.02710) | mean of the group's scores; 0.0 where it is not positive |
    | batch-std | standard deviation of all r_i - baseline + f_norm_eps |
    | token-whiten (REINFORCE++, arXiv 2501.03262) | less the mean over all response tokens, over \
the root of the variance there + f_norm_eps |

    Variances have one less than the count in the denominator. Means and deviations are correctly
    rounded, so a sample whose score equals its baseline gets exactly 0.0. "std" and the
    baselines of the others in the group need groups of two.
    """
    scores = [[reward.score for reward in group.rewards] for group in groups]
    if config.baseline == "min-variance":
        centred = [
            _less_min_variance(row, [len(c.token_ids) for c in group.completions])
            for row, group in zip(scores, groups, strict=True)
        ]
    else:
        centred = _less_mean(scores, config.baseline)
    if config.f_norm == "one":
        return centred
    if config.f_norm == "mean":
        means = [mean(row) for row in scores]
        return [[x / m if m > 0 else 0.0 for x in r] for r, m in zip(centred, means, strict=True)]
    if config.f_norm == "token-whiten":
        return _whitened(centred, groups, config.f_norm_eps)
    if config.f_norm == "std":
        deviations = [stdev(row) for row in scores]
    else:
        residuals = [x for row in centred for x in row]
        deviations = [stdev(residuals) if len(residuals) > 1 else 0.0] * len(scores)
    return [
        [x / (deviation + config.f_norm_eps) if x else 0.0 for x in row]
        for row, deviation in zip(centred, deviations, strict=True)
    ]


def _less_mean(scores: Sequence[Sequence[float]], baseline: str) -> list[list[float]]:
    if baseline == "batch-mean":
        everything = [score for row in scores for score in row]
        common = mean(everything) if everything else 0.0
        return [[score - common for score in row] for row in scores]
    means = [mean(row) if len(row) > 1 else 0.0 for row in scores]
    centred = [[r - m for r in row] for row, m in zip(scores, means, strict=True)]
    if baseline == "leave-one-out":
        # r_i - (sum - r_i) / (G - 1) = G / (G - 1) * (r_i - mean)
        return [[x * len(row) / (len(row) - 1) for x in row] for row in centred]
    return centred


def _less_min_variance(scores: Sequence[float], lengths: Sequence[int]) -> list[float]:
    """r_i - sum_j L_j r_j / sum_j L_j over the others j of the group.

    E[r |s|^2] / E[|s|^2] is the constant that an answer's gradient (r - b) s varies least with,
    s = grad log pi of the whole answer. |s|^2 is proportional to the length L where the scores of
    tokens are as long as each other and orthogonal. Without the answer itself no bias comes in.
    Where the others have no token nothing is subtracted.
    """
    values = [Fraction(score) for score in scores]
    n_tokens = sum(lengths)
    total = sum((x * n for x, n in zip(values, lengths, strict=True)), Fraction())
    return [
        float(x - (total - x * n) / (n_tokens - n)) if n < n_tokens else float(x)
        for x, n in zip(values, lengths, strict=True)
    ]


def _whitened(
    rows: Sequence[Sequence[float]], groups: Sequence[ScoredGroup], eps: float
) -> list[list[float]]:
    """(x - mean) / sqrt(variance + eps), each answer counted once for each of its tokens."""
    lengths = [len(c.token_ids) for group in groups for c in group.completions]
    values = [Fraction(x) for row in rows for x in row]
    n = sum(lengths)
    if n < 2:
        return [[0.0] * len(row) for row in rows]
    centre = sum((x * k for x, k in zip(values, lengths, strict=True)), Fraction()) / n
    squares = sum(((x - centre) ** 2 * k for x, k in zip(values, lengths, strict=True)), Fraction())
    deviation = math.sqrt(squares / (n - 1) + Fraction(eps))
    return [[float(Fraction(x) - centre) / deviation for x in row] for row in rows]


def assign_advantages(
    groups: Sequence[ScoredGroup], config: AlgorithmConfig
) -> tuple[list[TrainSample], AdvantageStats]:
    """Turn the scored groups of one rollout batch into training samples.

    Advantages are exactly 0.0 for members of dead groups (unless dead_by is "none"), even where
    their scores differ, for empty responses, and for samples whose score is their baseline.
    alpha is part of them where it counts over the rollout batch (alpha_scope) and multiplies the
    loss (alpha_apply).

    Args:
        groups: at least one answer in each; group i gives samples with group == i.
        config: what defines the advantage.

    Returns:
        the samples, in the order of groups and of answers within them, and the statistics.

    Raises:
        UserError: a score or accuracy is not a finite float32, or no reward has the part dead_by.
    """
    for group in groups:
        _check(group)
    check_dead_by(groups, config.dead_by)
    plain = _without_alpha(groups, config)
    whole = config.alpha_scope == "batch"
    factor = alpha(plain, config.alpha, config.alpha_max) if whole else 1.0
    stats = AdvantageStats(
        alpha=factor,
        live_fraction=live_fraction(groups, config.dead_by),
        n_samples=len(plain),
        n_shaped=sum(sample.score not in (0.0, 1.0) for sample in plain),
    )
    if config.alpha_apply == "step":
        return plain, stats
    return [scaled(sample, factor) for sample in plain], stats


def scaled(sample: TrainSample, factor: float) -> TrainSample:
    """The sample with its advantage times factor."""
    return replace(sample, advantage=factor * sample.advantage) if sample.advantage else sample


def check_dead_by(groups: Sequence[ScoredGroup], dead_by: str) -> None:
    """The part that decides who is dead occurs. An answer without it counts as 0, as it does in
    the metrics: its scorer may have crashed.

    Raises:
        UserError
    """
    known = {part for group in groups for reward in group.rewards for part in reward.parts}
    if groups and dead_by not in known | {"accuracy", "score", "none"}:
        raise UserError(
            f"algorithm.dead_by is {dead_by!r}, which no reward of the batch has; expected "
            f"{', '.join(['accuracy', 'score', 'none', *sorted(known)])}"
        )


def _without_alpha(groups: Sequence[ScoredGroup], config: AlgorithmConfig) -> list[TrainSample]:
    # An empty response has no token that could be stale: it takes the batch's newest version.
    newest = max((s.version for g in groups for c in g.completions for s in c.versions), default=0)
    samples = []
    for index, (group, row) in enumerate(
        zip(groups, normalised_rewards(groups, config), strict=True)
    ):
        live = is_live(group, config.dead_by)
        taught = live or config.dead_by == "none"
        for completion, reward, x in zip(group.completions, group.rewards, row, strict=True):
            sample = TrainSample(
                prompt_id=group.prompt.id,
                group=index,
                index=completion.index,
                prompt_token_ids=group.prompt.token_ids,
                response_token_ids=completion.token_ids,
                rollout_logprobs=completion.logprobs,
                advantage=x if taught and len(completion.token_ids) else 0.0,
                version=min((span.version for span in completion.versions), default=newest),
                live=live,
                score=reward.score,
                routing=completion.routing,
            )
            samples.append(sample)
    return samples


def _check(group: ScoredGroup) -> None:
    assert len(group.completions) == len(group.rewards) > 0, group.prompt.id
    for index, reward in enumerate(group.rewards):
        for name, value in (("score", reward.score), ("accuracy", reward.accuracy)):
            if not abs(value) <= LARGEST_REWARD:
                raise UserError(
                    f"reward of prompt {group.prompt.id!r}, answer {index}: {name} is {value}; "
                    "expected a finite number that fits in float32"
                )


def _worth(reward: Reward, dead_by: str) -> float:
    if dead_by in ("accuracy", "none"):
        return reward.accuracy
    return reward.score if dead_by == "score" else reward.parts.get(dead_by, 0.0)


def _one(_: TrainSample) -> int:
    return 1


def _n_tokens(sample: TrainSample) -> int:
    return len(sample.response_token_ids)
