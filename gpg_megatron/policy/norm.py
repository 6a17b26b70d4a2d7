"""The norm of the project's own layers: Megatron's local spec has one that refuses sequence
parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, statistics in fp32 (arXiv 1910.07467): on
    CUDA one kernel. It keeps its input in the model's type, and on a CPU nothing beside it.

    The product with the weight is taken after the cast back, as Hugging Face and vLLM do, but not
    where the factor is 1 + weight.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        weight: Any = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron then sums its gradient over the tensor-parallel ranks: each saw other tokens.
        weight.sequence_parallel = config.sequence_parallel
        self.weight: torch.nn.Parameter = weight
        self.eps = eps
        self.centred = config.layernorm_zero_centered_gamma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.centred:
            # The product in fp32 too: 1 + weight has more digits than the model's type.
            factor = 1.0 + self.weight.float()
            return F.rms_norm(x.float(), x.shape[-1:], factor, self.eps).to(x.dtype)
        if x.is_cuda:
            return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)
        apply: Any = _Normed.apply  # torch has no types for it
        out: torch.Tensor = apply(x, self.weight, self.eps)
        return out


class _Normed(torch.autograd.Function):
    """weight * rms_norm(x), bit for bit; the backward pass computes the norm again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        over = x.float().pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, over)
        return weight * (x.float() * over).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, weight, over), (grad,) = ctx.saved_tensors, grads
        normed = x.float() * over
        grad_weight = (grad * normed.to(x.dtype)).sum_to_size(weight.shape)
        # Of x / rms(x): what changes its length alone changes nothing.
        out = (grad * weight).float()
        along = torch.linalg.vecdot(out, normed)[..., None] / x.shape[-1]
        out.addcmul_(normed, along, value=-1).mul_(over)
        return out.to(x.dtype), grad_weight, None
