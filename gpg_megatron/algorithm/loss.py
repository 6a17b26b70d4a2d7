"""The losses of one micro-batch.

Shape legend: N response tokens, in the order of the packed row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpg_megatron.algorithm.correction import LARGEST_LOG_RATIO, per_response, ratio


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


def token_ratio(logprobs_N: Tensor, old_N: Tensor) -> Tensor:
    """pi / pi_old of each token, with the gradient of its log-prob. Floating [N] -> at least fp32
    [N]; no gradient flows through old_N."""
    return ratio(_at_least_fp32(logprobs_N), old_N.detach())


def sequence_ratio(logprobs_N: Tensor, old_N: Tensor, responses_N: Tensor) -> Tensor:
    """The geometric mean of pi / pi_old over each token's response, with the gradient of the
    token's own log-prob (GSPO-token, arXiv 2507.18071, equation 14).

    Args:
        logprobs_N, old_N: floating [N].
        responses_N: int64 [N], number of the token's response, from 0.

    Returns:
        at least fp32 [N].
    """
    logprobs_N = _at_least_fp32(logprobs_N)
    fixed_N = logprobs_N.detach()
    mean_N = per_response(fixed_N - old_N.detach(), responses_N, average=True)
    return ratio(mean_N + (logprobs_N - fixed_N), torch.zeros_like(mean_N))


def clip_loss(
    ratio_N: Tensor, advantages_N: Tensor, weights_N: Tensor, *, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """-sum min(r A, clip(r, 1 - low, 1 + high) A) w (arXiv 1707.06347).

    high above low is DAPO's clip-higher (arXiv 2503.14476).

    Args:
        ratio_N: at least fp32 [N], r, with gradient.
        advantages_N, weights_N: floating [N].

    Returns:
        scalar of the ratio's type, and bool [N]: where the clipped branch is the smaller one, so
        that no gradient flows.
    """
    assert ratio_N.shape == advantages_N.shape == weights_N.shape, "expected equal [N]"
    whole_N = ratio_N * advantages_N
    cut_N = ratio_N.clamp(1.0 - low, 1.0 + high) * advantages_N
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
