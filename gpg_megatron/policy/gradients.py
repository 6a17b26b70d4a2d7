"""How a weight's gradient is added up."""

from __future__ import annotations

import torch

from gpg_megatron.host.products import product_dtype


def add_product(x: torch.Tensor, grad: torch.Tensor, total: torch.Tensor) -> None:
    """total [out, in] += grad [T, out].T @ x [T, in]; total is fp32. Computed in fp32 without a
    product in memory of its own. The arguments are those of Apex's wgrad_gemm_accum_fp32."""
    dtype = product_dtype(grad.device.type, grad.dtype)
    if dtype == total.dtype:
        total.addmm_(grad.t().to(dtype), x.to(dtype))
    else:
        total += grad.t() @ x
