"""Off-policy corrections: how much a token counts that another distribution sampled.

    rho_t = pi(token t) / mu(token t)        pi: the policy; mu: what sampled it

rho differs from 1 when the engine computes in another way than the policy, when its weights are
older, and, where the loss has no ratio of its own, after the first update of a rollout batch.

Shape legend: N response tokens of one micro-batch, R its responses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpg_megatron.config.algorithm import AlgorithmConfig

LARGEST_LOG_RATIO = 20.0
"""Beyond it a ratio is as good as infinite, and its square would be in float32."""


def ratio(numerator_N: Tensor, denominator_N: Tensor) -> Tensor:
    """exp(numerator - denominator) of log-probs, the difference limited to +-20 nats."""
    return (numerator_N - denominator_N).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def correction_weights(
    policy_N: Tensor, old_N: Tensor, responses_N: Tensor, config: AlgorithmConfig
) -> tuple[Tensor, Tensor]:
    """The factor of every token's policy gradient, and where the ratio was cut.

    | correction | factor of token t |
    |---|---|
    | none | 1 |
    | truncate-token | min(rho_t, max) |
    | truncate-sequence | min(product of rho over the response, max) |
    | mask-token (IcePop) | rho_t where min <= rho_t <= max, else 0 |
    | reject-sequence | 1 where min <= geometric mean of rho over the response <= max, else 0 |

    Truncated importance sampling: arXiv 1802.01561, section 4.1, and for engines that compute
    in another way than the trainer, fengyao.notion.site/off-policy-rl. Masking: IcePop,
    arXiv 2510.18855.

    Args:
        policy_N: fp32 [N] log-probs of the policy; no gradient flows through the factor.
        old_N: fp32 [N] log-probs of what sampled the tokens: the engine, or the policy before the
            first update of the rollout batch.
        responses_N: int64 [N], number of the token's response, from 0 and below N.
        config: correction, correction_min, correction_max.

    Returns:
        fp32 [N] factors, and bool [N]: truncated, masked or rejected.
    """
    assert policy_N.shape == old_N.shape == responses_N.shape, "expected equal [N]"
    policy_N = policy_N.detach()
    low, high = config.correction_min, config.correction_max
    mode = config.correction
    assert mode != "auto", "to be settled by config.off_policy"
    if mode == "none":
        return torch.ones_like(policy_N), torch.zeros_like(policy_N, dtype=torch.bool)
    if mode in ("truncate-token", "mask-token"):
        rho_N = ratio(policy_N, old_N)
    else:
        log_rho_N = per_response(policy_N - old_N, responses_N, average=mode == "reject-sequence")
        rho_N = log_rho_N.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    if mode in ("truncate-token", "truncate-sequence"):
        return rho_N.clamp(max=high), rho_N > high
    outside_N = (rho_N < low) | (rho_N > high)
    kept_N = rho_N if mode == "mask-token" else torch.ones_like(rho_N)
    return torch.where(outside_N, 0.0, kept_N), outside_N


def per_response(values_N: Tensor, responses_N: Tensor, *, average: bool) -> Tensor:
    """The sum or the mean over each token's response, at each of its tokens; [N] -> [N]."""
    # Each has a token, so there are N at most; how many, the host would have to wait for.
    sums_N = torch.zeros_like(values_N).index_add(0, responses_N, values_N)
    if average:
        ones_N = torch.ones_like(values_N)
        sums_N = sums_N / torch.zeros_like(ones_N).index_add(0, responses_N, ones_N).clamp(min=1.0)
    return sums_N[responses_N]
