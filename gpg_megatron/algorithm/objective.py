"""The whole objective of one micro-batch: policy gradient, correction, KL and entropy terms.

    log-probs [N] + what is known of the tokens -> loss, statistics

Shape legend: N response tokens of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gpg_megatron.algorithm.correction import correction_weights, ratio
from gpg_megatron.algorithm.loss import (
    clip_loss,
    gpg_loss,
    kl_k3,
    sequence_ratio,
    token_ratio,
)
from gpg_megatron.config.algorithm import AlgorithmConfig

SUMS = (
    "loss",
    "tokens",
    "gap",
    "k1",
    "k3",
    "ratio",
    "squared_ratio",
    "factor",
    "squared_factor",
    "cut",
    "clipped",
    "kl",
    "entropy",
    "unlikely",
)
"""The statistics that are added up over micro-batches and ranks, in the order of the reduction."""
MAXIMA = ("gap_max",)
"""Those of which the largest is taken; none is negative."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What is known of the N response tokens of a micro-batch. All [N], on one device."""

    advantages: Tensor
    """fp32."""
    weights: Tensor
    """fp32; the aggregation weight."""
    rollout: Tensor
    """fp32; the engine's log-probs."""
    responses: Tensor
    """int64; number of the token's response."""
    old: Tensor | None
    """fp32; the policy's log-probs before the first update; None: those of this update."""
    reference: Tensor | None
    """fp32; of the reference model; None without a KL term."""


def objective(
    logprobs_N: Tensor, entropy_N: Tensor | None, tokens: Tokens, config: AlgorithmConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one micro-batch and the parts of its metrics.

    loss = policy gradient + kl_coef * sum w * k3 - entropy_coef * sum w * entropy, where w are
    the aggregation weights. alpha is part of the advantages, so it scales the first term only.

    Args:
        logprobs_N: fp32, of the policy, with gradient, at the sampling temperature.
        entropy_N: of the policy's next-token distribution, with gradient, nats; None when
            entropy_coef is 0.
        tokens: the rest.
        config: what the loss is made of.

    Returns:
        scalar loss; fp32 scalars under the names of SUMS and MAXIMA, detached, to be given to
        `metrics` when reduced.
    """
    assert (tokens.reference is not None) == (config.kl_coef > 0), "KL without its reference"
    assert (entropy_N is not None) == (config.entropy_coef > 0), "a bonus without the entropy"
    current_N = logprobs_N.detach()
    policy_N = current_N if tokens.old is None else tokens.old
    old_N = tokens.rollout if config.old_logprobs == "rollout" else policy_N
    if config.clips:  # the ratio covers what happened since old_N, the correction the rest
        above_N, below_N = policy_N, tokens.rollout
    else:
        above_N, below_N = current_N, old_N
    factors_N, cut_N = correction_weights(above_N, below_N, tokens.responses, config)
    weights_N = tokens.weights * factors_N
    clipped_N = torch.zeros_like(cut_N)
    if not config.clips:
        loss = gpg_loss(logprobs_N, tokens.advantages, weights_N)
    else:
        ratio_N = (
            sequence_ratio(logprobs_N, old_N, tokens.responses)
            if config.loss == "clip-sequence"
            else token_ratio(logprobs_N, old_N)
        )
        low, high = config.clip_low, config.clip_high
        loss, clipped_N = clip_loss(ratio_N, tokens.advantages, weights_N, low=low, high=high)
    kl_N = torch.zeros_like(current_N)
    if tokens.reference is not None:
        kl_N = kl_k3(logprobs_N, tokens.reference)
        loss = loss + config.kl_coef * (kl_N * tokens.weights).sum()
    if entropy_N is None:
        entropy_N = torch.zeros_like(current_N)
    else:
        loss = loss - config.entropy_coef * (entropy_N * tokens.weights).sum()
    if config.clips and config.old_logprobs == "rollout":
        above_N = current_N  # no correction: the loss's own ratio is what is measured
    terms = {"cut": cut_N, "clipped": clipped_N, "kl": kl_N, "entropy": entropy_N}
    terms |= {"factor": factors_N, "squared_factor": factors_N.square()}
    statistics = {"loss": loss, **{name: term_N.sum() for name, term_N in terms.items()}}
    statistics |= _distances(current_N, tokens.rollout, ratio(above_N, below_N))
    return loss, {name: value.detach().float() for name, value in statistics.items()}


def _distances(current_N: Tensor, engine_N: Tensor, rho_N: Tensor) -> dict[str, Tensor]:
    """How far the policy's log-probs are from the engine's, and the sums of the ratios."""
    gap_N = (current_N - engine_N).abs()
    return {
        "tokens": gap_N.new_full((), len(gap_N)),
        "gap": gap_N.sum(),
        "gap_max": gap_N.amax() if len(gap_N) else gap_N.new_zeros(()),
        "k1": (engine_N - current_N).sum(),
        "k3": kl_k3(engine_N, current_N).sum(),
        "ratio": rho_N.sum(),
        "squared_ratio": rho_N.square().sum(),
        "unlikely": -torch.expm1(engine_N).sum(),
    }


def metrics(statistics: Mapping[str, float], config: AlgorithmConfig) -> dict[str, float]:
    """The reduced statistics of `objective` -> metrics under their names.

    mismatch/kl_k1 and kl_k3 estimate KL(engine || policy) from the engine's samples
    (joschu.net/blog/kl-approx.html). correction/ess is the effective sample size over the
    number of tokens, (sum rho)^2 / (n sum rho^2), of the ratios before they are cut;
    correction/ess_cut the same of the weights that are left of them.
    """
    n = max(statistics["tokens"], 1.0)
    named = {
        "mismatch/logprob_mean": statistics["gap"] / n,
        "mismatch/logprob_max": statistics["gap_max"],
        "mismatch/unlikely_mean": statistics["unlikely"] / n,
        "mismatch/kl_k1": statistics["k1"] / n,
        "mismatch/kl_k3": statistics["k3"] / n,
    }
    if config.is_weighted:
        named["correction/ess"] = _effective(statistics["ratio"], statistics["squared_ratio"], n)
    if config.correction != "none":
        total, squares = statistics["factor"], statistics["squared_factor"]
        named["correction/ess_cut"] = _effective(total, squares, n)
        named["correction/cut_fraction"] = statistics["cut"] / n
    if config.clips:
        named["policy/clip_fraction"] = statistics["clipped"] / n
    if config.kl_coef:
        named["policy/kl"] = statistics["kl"] / n
    if config.entropy_coef:
        named["policy/entropy"] = statistics["entropy"] / n
    return named


def _effective(total: float, squares: float, n: float) -> float:
    """Effective sample size of n weights, over n, in [0, 1]."""
    return total**2 / (n * squares) if squares else 0.0
