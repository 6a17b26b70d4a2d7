"""Log-probabilities and entropies from hidden states, a chunk of tokens at a time.

The logits of a chunk live only while it is worked on, but for the last one's: the backward pass
begins with it, and computes the others again. So memory depends on the chunk, not on the number of
tokens times the vocabulary.

Shape legend: N tokens with loss, H hidden size, V vocabulary rows of this rank, C tokens of
a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from gpg_megatron.host.products import product_dtype
from gpg_megatron.policy.gradients import add_product

NO_LOGIT = -1e30
"""Stands for the largest logit of a rank that has only padding rows: finite, because -inf minus
-inf is nan."""
N_PARTS = 8
"""A chunk's exponentials are summed in so many parts: one is held beside its logits."""


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

    def chunks(self, n: int) -> Sequence[slice]:
        """[0, n) in runs of as many tokens as the limit allows, evenly."""
        most = max(1, self.chunk_bytes // (4 * max(1, self.n_tokens)))
        count = -(-n // most)
        size = -(-n // max(1, count))
        return [slice(i, min(i + size, n)) for i in range(0, n, max(1, size))]


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
    """Saves its inputs, the logits of one chunk, and one number per token. A backward pass follows
    its forward pass at once, as on a pipeline's last stage: what is saved is what it would need."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        labels_N: torch.Tensor,
        shard: VocabShard,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lse_N, label_logit_N, mean_N, first_CV = _statistics(
            hidden_NH, weight_VH, labels_N, shard, with_entropy
        )
        entropy_N = lse_N - mean_N
        ctx.save_for_backward(hidden_NH, weight_VH, labels_N, lse_N, entropy_N)
        ctx.shard, ctx.with_entropy, ctx.first_CV = shard, with_entropy, first_CV
        return label_logit_N - lse_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_logprob_N, grad_entropy_N = grads
        hidden_NH, weight_VH, labels_N, lse_N, entropy_N = ctx.saved_tensors
        shard = ctx.shard
        hidden, weight = _factors(hidden_NH, weight_VH[: shard.n_tokens])
        grad_hidden_NH = torch.zeros_like(hidden)
        total_VH = _gradient_sum(weight_VH)
        logits_CV, ctx.first_CV = ctx.first_CV, None
        for chunk in shard.chunks(len(hidden_NH)):
            if logits_CV is None:
                logits_CV = _logits(hidden[chunk], weight, shard)
            grad_CV = _grad_logits(
                logits_CV,
                labels_N[chunk],
                lse_N[chunk],
                entropy_N[chunk],
                grad_logprob_N[chunk],
                grad_entropy_N[chunk] if ctx.with_entropy else None,
                shard,
            ).to(hidden.dtype)
            torch.mm(grad_CV, weight, out=grad_hidden_NH[chunk])
            add_product(hidden[chunk], grad_CV, total_VH[: shard.n_tokens])
            logits_CV = None  # before the next chunk's are made
            del grad_CV
        grad_hidden_NH = grad_hidden_NH.to(hidden_NH.dtype)
        if shard.group is not None:
            dist.all_reduce(grad_hidden_NH, group=shard.group)
        return grad_hidden_NH, _left_to_autograd(weight_VH, total_VH), None, None, None


def _statistics(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_N: torch.Tensor,
    shard: VocabShard,
    with_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of each token, over the whole vocabulary: the log-sum-exp of its logits, the logit of its
    label, and the mean logit under the softmax (only with_entropy; else the log-sum-exp). And the
    logits of the first chunk."""
    hidden, weight = _factors(hidden_NH, weight_VH[: shard.n_tokens])
    top_N = hidden_NH.new_full((len(hidden_NH),), NO_LOGIT, dtype=torch.float32)
    # Sums over the rank's rows of exp(l - top), of the label's logit, of exp(l - top) * l.
    sums_3N = hidden_NH.new_zeros((3, len(hidden_NH)), dtype=torch.float32)
    logits_CV = None
    # The first one last: it is the one that the backward pass begins with.
    for chunk in reversed(shard.chunks(len(hidden_NH))) if shard.n_tokens else ():
        logits_CV = None  # before this chunk's are made
        logits_CV = _logits(hidden[chunk], weight, shard)
        top_N[chunk] = logits_CV.amax(1)
        is_local, local = _local_labels(labels_N[chunk], shard)
        sums_3N[1, chunk] = torch.where(is_local, logits_CV.gather(1, local).squeeze(1), 0.0)
        sums_3N[0::2, chunk] = _sums(logits_CV, top_N[chunk], with_entropy)
    if shard.group is not None:
        own_top_N = top_N.clone()
        dist.all_reduce(top_N, op=dist.ReduceOp.MAX, group=shard.group)
        sums_3N[0::2] *= (own_top_N - top_N).exp()
        dist.all_reduce(sums_3N, group=shard.group)
    lse_N = top_N + sums_3N[0].log()
    mean_N = sums_3N[2] / sums_3N[0] if with_entropy else lse_N
    return lse_N, sums_3N[1].clone(), mean_N, logits_CV


def _factors(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In the type in which their products are computed."""
    dtype = product_dtype(hidden.device.type, hidden.dtype)
    return hidden.to(dtype), weight.to(dtype)


def _logits(hidden_CH: torch.Tensor, weight_VH: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """float32 [C, tokens of this rank]."""
    return (hidden_CH @ weight_VH.t()).float().div_(shard.temperature)


def _sums(logits_CV: torch.Tensor, top_C: torch.Tensor, with_entropy: bool) -> torch.Tensor:
    """float32 [2, C]: the sums of exp(l - top), and with_entropy of exp(l - top) * l (else 0)."""
    sums_2C = logits_CV.new_zeros((2, len(top_C)))
    parts = zip(logits_CV.chunk(N_PARTS), top_C.chunk(N_PARTS), strict=True)
    columns = sums_2C.chunk(N_PARTS, dim=1)
    for (part_CV, part_top_C), column_2C in zip(parts, columns, strict=True):
        exp_CV = (part_CV - part_top_C[:, None]).exp_()
        column_2C[0] = exp_CV.sum(1)
        if with_entropy:
            column_2C[1] = torch.linalg.vecdot(exp_CV, part_CV)
    return sums_2C


def _grad_logits(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    lse_C: torch.Tensor,
    entropy_C: torch.Tensor,
    grad_logprob_C: torch.Tensor,
    grad_entropy_C: torch.Tensor | None,
    shard: VocabShard,
) -> torch.Tensor:
    """float32 [C, tokens of this rank], the gradient of hidden @ weight.T. Overwrites the logits.

    Of the scaled logits l: d logprob / d l_v = 1[v is the label] - p_v, and
    d entropy / d l_v = -p_v (log p_v + entropy).
    """
    logp_CV = logits_CV.sub_(lse_C[:, None])
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


def _gradient_sum(weight_VH: torch.Tensor) -> torch.Tensor:
    """float32 [V, H], to which the projection's gradient is added: where Megatron's DDP sums
    gradients, if it has the weight."""
    total: torch.Tensor | None = getattr(weight_VH, "main_grad", None)
    return torch.zeros_like(weight_VH, dtype=torch.float32) if total is None else total


def _left_to_autograd(weight_VH: Any, total_VH: torch.Tensor) -> torch.Tensor | None:
    """The gradient that autograd gets where total_VH is the whole. DDP counts a gradient as there
    when autograd has one, and adds it unless the weight is marked."""
    if not hasattr(weight_VH, "main_grad"):
        return total_VH.to(weight_VH.dtype)
    if getattr(weight_VH, "zero_out_wgrad", False):
        # Megatron's word for a weight that is this stage's embedding too, whose gradient follows.
        return None
    weight_VH.grad_added_to_main_grad = True
    return torch.empty_like(weight_VH)
