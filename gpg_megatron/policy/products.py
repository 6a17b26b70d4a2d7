"""How matrix products are computed: those of gradients, and those of bf16 on a CPU without it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from gpg_megatron.host.device import product_dtype


def add_product(x: torch.Tensor, grad: torch.Tensor, total: torch.Tensor) -> None:
    """total [out, in] += grad [T, out].T @ x [T, in]; total is fp32. Computed in fp32 without a
    product in memory of its own. The arguments are those of Apex's wgrad_gemm_accum_fp32."""
    dtype = product_dtype(grad.device.type, grad.dtype)
    if dtype == total.dtype:
        total.addmm_(grad.t().to(dtype), x.to(dtype))
    else:
        total += grad.t() @ x


_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
_ROUNDED = {"mm": 1, "addmm": 1, "bmm": 1, _ATTENTION: 1, f"{_ATTENTION}_backward": 3}
"""torch's kernels -> how many of their results, from the first on, have the arguments' type."""


@functools.cache
def redirect_bf16_products() -> None:
    """Make this process compute bf16's products and attention on its CPU in fp32, and round their
    results once, where torch has no kernels for it and its loops take 5 to 100 times as long.
    Idempotent; everything else stays as it is."""
    if product_dtype("cpu", torch.bfloat16) == torch.bfloat16:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for name, rounded in _ROUNDED.items():
            kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
            run = functools.partial(_run_in_fp32, kernel, rounded)
            _library().impl(name, run, "CPU", with_keyset=True, allow_override=True)


@functools.cache
def _library() -> torch.library.Library:
    """What is registered lives as long as it does."""
    return torch.library.Library("aten", "IMPL")


def _run_in_fp32(kernel: Any, rounded: int, keys: Any, *args: Any, **options: Any) -> Any:
    if not any(_is_bf16(x) for x in args):
        return kernel.call_boxed(keys, *args, **options)
    found = kernel.call_boxed(keys, *map(_widened, args), **_widened_values(options))
    if isinstance(found, torch.Tensor):
        return found.bfloat16()
    return tuple(x.bfloat16() if i < rounded else x for i, x in enumerate(found))


def _is_bf16(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16


def _widened(x: Any) -> Any:
    return x.float() if _is_bf16(x) else x


def _widened_values(options: Mapping[str, object]) -> dict[str, object]:
    return {name: _widened(x) for name, x in options.items()}
