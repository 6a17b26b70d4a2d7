"""What is counted over one optimizer step: alpha, where it counts over no more, and the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from gpg_megatron.algorithm.advantages import alpha, scaled
from gpg_megatron.algorithm.aggregation import aggregation_weights
from gpg_megatron.algorithm.micro_steps import micro_steps
from gpg_megatron.config.algorithm import AlgorithmConfig
from gpg_megatron.types import TrainSample


@dataclass(frozen=True, slots=True, kw_only=True)
class WeighedUpdate:
    """The samples of an update as the loss takes them."""

    samples: tuple[TrainSample, ...]
    """With their final advantages."""
    weights: tuple[float, ...]
    """Of every response token of each sample."""
    alpha: float
    """The factor that the advantages got here, or, with alpha_apply "step", that the update is to
    get: the mean of those that are not 0 where each micro-step has its own; 1.0 where alpha counts
    over the rollout batch."""


def weigh_update(
    samples: Sequence[TrainSample],
    config: AlgorithmConfig,
    *,
    dp_size: int,
    max_tokens: int,
    max_response_length: int,
) -> WeighedUpdate:
    """Finish the advantages of an update and find its weights.

    Args:
        samples: of one update, those without gradient included.
        config: alpha and its scope, and the aggregation.
        dp_size, max_tokens: define a micro-step, see micro_steps.
        max_response_length: tokens; read by seq-mean-token-sum-norm only.
    """
    steps = micro_steps(samples, dp_size, max_tokens)
    cells = [cell for step in steps if _counts(step, samples, config) for cell in step]
    scopes = {
        "batch": [],
        "mini-batch": [list(range(len(samples)))],
        "micro-batch": [[i for cell in step for i in cell] for step in steps],
    }[config.alpha_scope]
    finished = list(samples)
    factors = []
    for scope in scopes:
        factors.append(alpha([samples[i] for i in scope], config.alpha, config.alpha_max))
        for i in scope if config.alpha_apply == "loss" else ():
            finished[i] = scaled(samples[i], factors[-1])
    mean = fmean([factor for factor in factors if factor] or [0.0])
    return WeighedUpdate(
        samples=tuple(finished),
        weights=tuple(
            aggregation_weights(samples, config.loss_aggregation, max_response_length, cells)
        ),
        alpha=1.0 if config.alpha_scope == "batch" else mean,
    )


def _counts(
    step: Sequence[Sequence[int]], samples: Sequence[TrainSample], config: AlgorithmConfig
) -> bool:
    """AMAP-ML draws a micro-step again until enough of its groups are live. One without a live
    group would take its share of the mean, and with it the correction of the others."""
    return config.dead_by == "none" or any(samples[i].live for cell in step for i in cell)
