"""The losses of one micro-batch.

Shape legend: N response tokens, in the order of the packed row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpg_megatron.algorithm.correction import LARGEST_LOG_RATIO, ratio


def gpg_loss(logprobs_N: Tensor, advantages_N: Tensor, weights_N: Tensor) -> Tensor:
    """-sum log pi * A * w: the policy gradient itself (arXiv 2504.02546).

    No ratio, no clipping, no KL. The weights hold every denominator, so the losses of all
    micro-batches and data-parallel ranks add up to the loss of the step.

    Args:
        logprobs_N: floating [N], log pi of each token, with gradient.
        advantages_N, weights_N: floating [N].

    Returns:
        scalar, float32 (float64 for float64 log-probs); 0 with zero gradient without tokens.
    """
    assert logprobs_N.shape == advantages_N.shape == weights_N.shape, "expected equal [N]"
    return -(_at_least_fp32(logprobs_N) * (advantages_N * weights_N)).sum()


def clip_loss(
    logprobs_N: Tensor,
    old_N: Tensor,
    advantages_N: Tensor,
    weights_N: Tensor,
    *,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    """-sum min(r A, clip(r, 1 - low, 1 + high) A) w with r = pi / pi_old (arXiv 1707.06347).

    high above low is DAPO's clip-higher (arXiv 2503.14476).

    Args:
        logprobs_N: floating [N], of the policy, with gradient.
        old_N: floating [N]; no gradient flows through it.
        advantages_N, weights_N: floating [N].

    Returns:
        scalar, float32 (float64 for float64 log-probs), and bool [N]: where the clipped branch
        is the smaller one, so that no gradient flows.
    """
    assert logprobs_N.shape == old_N.shape == advantages_N.shape == weights_N.shape
    r_N = ratio(_at_least_fp32(logprobs_N), old_N.detach())
    whole_N, cut_N = r_N * advantages_N, r_N.clamp(1.0 - low, 1.0 + high) * advantages_N
    return -(torch.minimum(whole_N, cut_N) * weights_N).sum(), (cut_N < whole_N).detach()


def kl_k3(logprobs_N: Tensor, other_N: Tensor) -> Tensor:
    """exp(d) - 1 - d with d = other - logprobs, at least 0, per token.

    Its mean over tokens sampled from the distribution of logprobs_N is KL(it || other)
    (k3 in joschu.net/blog/kl-approx.html). Floating [N] each; gradient flows through both.
    """
    d_N = (other_N - _at_least_fp32(logprobs_N)).clamp(max=LARGEST_LOG_RATIO)
    return torch.expm1(d_N) - d_N


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
