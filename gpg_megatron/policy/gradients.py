"""How a weight's gradient is added up."""

from __future__ import annotations

import torch


def add_product(x: torch.Tensor, grad: torch.Tensor, total: torch.Tensor) -> None:
    """total [out, in] += grad [T, out].T @ x [T, in]; total is fp32. In fp32 without a product in
    memory of its own. The arguments are those of Apex's wgrad_gemm_accum_fp32."""
    if grad.dtype == total.dtype:
        total.addmm_(grad.t(), x)
    else:
        total += grad.t() @ x
