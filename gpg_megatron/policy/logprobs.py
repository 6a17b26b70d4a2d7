"""Log-probabilities and entropies from hidden states, a chunk of tokens at a time.

The logits of a chunk live only while it is worked on; the backward pass computes them again.
So memory depends on the chunk, not on the number of tokens times the vocabulary.

Shape legend: N tokens with loss, H hidden size, V vocabulary rows of this rank, C tokens of
a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from gpg_megatron.policy.gradients import add_product

NO_LOGIT = -1e30
"""Stands for the largest logit of a rank that has only padding rows: finite, because -inf minus
-inf is nan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabShard:
    """The rows of the vocabulary that this tensor-parallel rank holds, and how they are used."""

    first: int
    """Token id of the first row."""
    n_tokens: int
    """Rows that are tokens; the rows after them are padding and get no probability."""
    temperature: float
    """Logits are divided by it, as the engine does when it samples."""
    chunk_bytes: int
    """Limit of the fp32 logits that are held at once; a chunk has at least one token."""
    group: dist.ProcessGroup | None
    """The tensor-parallel ranks; None: this rank has the whole vocabulary."""

    def chunks(self, n: int) -> Iterator[slice]:
        """[0, n) in runs of as many tokens as the limit allows, evenly."""
        most = max(1, self.chunk_bytes // (4 * max(1, self.n_tokens)))
        count = -(-n // most)
        size = -(-n // max(1, count))
        return (slice(i, min(i + size, n)) for i in range(0, n, max(1, size)))


def vocab_parallel_logprobs(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_N: torch.Tensor,
    shard: VocabShard,
    *,
    with_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p(label) under softmax(hidden @ weight.T / temperature), and that softmax's entropy.

    Collective over shard.group, forward and backward. Every rank gives the same hidden states
    and labels, gets the same result, and gets the whole gradient of the hidden states.

    Args:
        hidden_NH: floating [N, H].
        weight_VH: [V, H], this rank's rows of the output projection, padding included.
        labels_N: int64 [N], token ids of the whole vocabulary.
        with_entropy: costs a second buffer of the chunk's size.

    Returns:
        float32 [N] log-probabilities, float32 [N] entropies in nats or None. Both have exact
        gradients; rows of padding get the gradient 0.
    """
    assert hidden_NH.shape[1] == weight_VH.shape[1] and len(labels_N) == len(hidden_NH)
    apply: Any = _Logprobs.apply  # torch has no types for it
    logprobs_N, entropy_N = apply(hidden_NH, weight_VH, labels_N, shard, with_entropy)
    return logprobs_N, (entropy_N if with_entropy else None)


class _Logprobs(torch.autograd.Function):
    """Saves its inputs and one number per token; no logit outlives its chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        labels_N: torch.Tensor,
        shard: VocabShard,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lse_N, label_logit_N, mean_N = _statistics(
            hidden_NH, weight_VH, labels_N, shard, with_entropy
        )
        entropy_N = lse_N - mean_N
        ctx.save_for_backward(hidden_NH, weight_VH, labels_N, lse_N, entropy_N)
        ctx.shard, ctx.with_entropy = shard, with_entropy
        return label_logit_N - lse_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_logprob_N, grad_entropy_N = grads
        hidden_NH, weight_VH, labels_N, lse_N, entropy_N = ctx.saved_tensors
        shard = ctx.shard
        weight = weight_VH[: shard.n_tokens]
        grad_hidden_NH = torch.zeros_like(hidden_NH)
        grad_weight_VH = _GradientSum(weight_VH)
        for chunk in shard.chunks(len(hidden_NH)):
            # A function of its own, so that one chunk's logits are gone when the next are made.
            grad_CV = _grad_logits(
                hidden_NH[chunk] @ weight.t(),
                labels_N[chunk],
                lse_N[chunk],
                entropy_N[chunk],
                grad_logprob_N[chunk],
                grad_entropy_N[chunk] if ctx.with_entropy else None,
                shard,
            ).to(hidden_NH.dtype)
            torch.mm(grad_CV, weight, out=grad_hidden_NH[chunk])
            grad_weight_VH.add(grad_CV, hidden_NH[chunk])
            del grad_CV
        if shard.group is not None:
            dist.all_reduce(grad_hidden_NH, group=shard.group)
        return grad_hidden_NH, grad_weight_VH.total(), None, None, None


def _statistics(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_N: torch.Tensor,
    shard: VocabShard,
    with_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each token, over the whole vocabulary: the log-sum-exp of its logits, the logit of its
    label, and the mean logit under the softmax (only with_entropy; else the log-sum-exp)."""
    weight = weight_VH[: shard.n_tokens]
    top_N = hidden_NH.new_full((len(hidden_NH),), NO_LOGIT, dtype=torch.float32)
    # Sums over the rank's rows of exp(l - top), of the label's logit, of exp(l - top) * l.
    sums_3N = hidden_NH.new_zeros((3, len(hidden_NH)), dtype=torch.float32)
    for chunk in shard.chunks(len(hidden_NH)) if shard.n_tokens else ():
        logits_CV = _logits(hidden_NH[chunk] @ weight.t(), shard)
        top_N[chunk] = logits_CV.amax(1)
        is_local, local = _local_labels(labels_N[chunk], shard)
        sums_3N[1, chunk] = torch.where(is_local, logits_CV.gather(1, local).squeeze(1), 0.0)
        if with_entropy:
            exp_CV = (logits_CV - top_N[chunk, None]).exp_()
            sums_3N[2, chunk] = torch.linalg.vecdot(exp_CV, logits_CV)
        else:
            exp_CV = logits_CV.sub_(top_N[chunk, None]).exp_()
        sums_3N[0, chunk] = exp_CV.sum(1)
        del logits_CV, exp_CV  # before the next chunk's are made
    if shard.group is not None:
        own_top_N = top_N.clone()
        dist.all_reduce(top_N, op=dist.ReduceOp.MAX, group=shard.group)
        sums_3N[0::2] *= (own_top_N - top_N).exp()
        dist.all_reduce(sums_3N, group=shard.group)
    lse_N = top_N + sums_3N[0].log()
    mean_N = sums_3N[2] / sums_3N[0] if with_entropy else lse_N
    return lse_N, sums_3N[1].clone(), mean_N


def _logits(product_CV: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """float32 [C, tokens of this rank]; in fp32 it overwrites the product."""
    return product_CV.float().div_(shard.temperature)


def _grad_logits(
    product_CV: torch.Tensor,
    labels_C: torch.Tensor,
    lse_C: torch.Tensor,
    entropy_C: torch.Tensor,
    grad_logprob_C: torch.Tensor,
    grad_entropy_C: torch.Tensor | None,
    shard: VocabShard,
) -> torch.Tensor:
    """float32 [C, tokens of this rank], the gradient of hidden @ weight.T.

    Of the scaled logits l: d logprob / d l_v = 1[v is the label] - p_v, and
    d entropy / d l_v = -p_v (log p_v + entropy).
    """
    logp_CV = _logits(product_CV, shard).sub_(lse_C[:, None])
    if grad_entropy_C is None:
        grad_CV = logp_CV.exp_().mul_(-grad_logprob_C[:, None])
    else:
        p_CV = logp_CV.exp()
        grad_CV = logp_CV.add_(entropy_C[:, None]).mul_(grad_entropy_C[:, None])
        grad_CV.add_(grad_logprob_C[:, None]).mul_(p_CV).neg_()
    is_local, local = _local_labels(labels_C, shard)
    if shard.n_tokens:
        grad_CV.scatter_add_(1, local, torch.where(is_local, grad_logprob_C, 0.0)[:, None])
    return grad_CV.div_(shard.temperature)


def _local_labels(labels_C: torch.Tensor, shard: VocabShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether this rank holds the label's row, and [C, 1] the row (0 where it does not)."""
    local = labels_C - shard.first
    is_local = (local >= 0) & (local < shard.n_tokens)
    return is_local, torch.where(is_local, local, 0).unsqueeze(1)


class _GradientSum:
    """The projection's gradient, added up over chunks in fp32."""

    def __init__(self, weight_VH: torch.Tensor) -> None:
        self._weight = weight_VH
        self._sum = torch.zeros_like(weight_VH, dtype=torch.float32)

    def add(self, grad_CV: torch.Tensor, hidden_CH: torch.Tensor) -> None:
        add_product(hidden_CH, grad_CV, self._sum[: grad_CV.shape[1]])

    def total(self) -> torch.Tensor:
        return self._sum.to(self._weight.dtype)
