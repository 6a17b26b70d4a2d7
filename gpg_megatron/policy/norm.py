"""The norm of the project's own layers: Megatron's local spec has one that refuses sequence
parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, statistics in fp32 (arXiv 1910.07467): on
    CUDA one kernel, which keeps its input in the model's type.

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
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)
