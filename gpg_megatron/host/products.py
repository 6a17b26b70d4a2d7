"""bf16's matrix products and attention on a CPU for which torch has no kernels of them.

Its loops take 5 to 100 times as long there as fp32's kernels do. So they are computed in fp32, and
their results rounded once.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, cast

import torch


def product_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """The type in which matrix products of a type are computed on a device ("cpu" or another):
    their own, but fp32 for bf16 on a CPU for which torch has no such kernels."""
    if device == "cpu" and dtype == torch.bfloat16 and not _has_bf16_products():
        return torch.float32
    return dtype


@functools.cache
def _has_bf16_products() -> bool:
    """torch's own question: oneDNN's kernels want AVX-512 here, on Arm bf16 instructions."""
    has_onednn = torch.backends.mkldnn.is_available()
    return has_onednn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


FEW_ROWS = 6
"""Fewer than so many, times a matrix that lies transposed, as a linear layer's does, are faster by
torch's loops, which read the matrix once: a copy of it in fp32 costs more."""
BLOCK = 2**20
"""Elements of such a matrix that are in fp32 at once: they stay in a processor's cache."""
_PRODUCTS = ("mm", "addmm", "bmm")
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
_ROUNDED = {_ATTENTION: 1, f"{_ATTENTION}_backward": 3}
"""Kernel -> how many of its results, from the first on, have the arguments' type."""


@functools.cache
def redirect_bf16_products() -> None:
    """Of this process, on its CPU, where product_dtype says so. Idempotent; everything else stays
    as it is."""
    if product_dtype("cpu", torch.bfloat16) == torch.bfloat16:
        return
    for name in _PRODUCTS:
        kernel, into = _kernel(name), _kernel(f"{name}.out")
        _replace(name, functools.partial(_multiply, kernel))
        _replace(f"{name}.out", functools.partial(_multiply_into, into, kernel))
    for name, rounded in _ROUNDED.items():
        _replace(name, functools.partial(_attend, _kernel(name), rounded))


def _kernel(name: str) -> Any:
    return torch.library.get_kernel(f"aten::{name}", "CPU")


def _replace(name: str, run: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        _library().impl(name, run, "CPU", with_keyset=True, allow_override=True)


@functools.cache
def _library() -> torch.library.Library:
    """What is registered lives as long as it does."""
    return torch.library.Library("aten", "IMPL")


def _multiply(kernel: Any, keys: Any, *args: Any, **options: Any) -> torch.Tensor:
    """mm(a, b), bmm(a, b), addmm(bias, a, b)."""
    if not _gains(*args[-2:]):
        return cast(torch.Tensor, kernel.call_boxed(keys, *args, **options))
    return _wide_product(kernel, keys, *args, **options).bfloat16()


def _multiply_into(
    into: Any, kernel: Any, keys: Any, *args: Any, out: torch.Tensor, **options: Any
) -> torch.Tensor:
    """The same; what torch compiles calls it so."""
    if not (_is_bf16(out) and _gains(*args[-2:])):
        return cast(torch.Tensor, into.call_boxed(keys, *args, out=out, **options))
    found = _wide_product(kernel, keys, *args, **options)
    return out.resize_(found.shape).copy_(found)


def _gains(a: torch.Tensor, b: torch.Tensor) -> bool:
    is_bf16 = _is_bf16(a) and _is_bf16(b)
    return is_bf16 and not (a.shape[-2] < FEW_ROWS and _is_transposed(b))


def _is_transposed(b: torch.Tensor) -> bool:
    return b.stride(-2) == 1


def _wide_product(kernel: Any, keys: Any, *args: Any, **options: Any) -> torch.Tensor:
    """float32."""
    *bias, a, b = args
    if bias or b.dim() == 3 or b.numel() <= BLOCK or not _is_transposed(b):
        return cast(torch.Tensor, kernel.call_boxed(keys, *map(_widened, args), **options))
    wide = a.float()
    out: torch.Tensor = wide.new_empty(len(a), b.shape[1])
    n = max(1, BLOCK // len(b))
    for some, b_some in zip(out.split(n, dim=1), b.split(n, dim=1), strict=True):
        torch.mm(wide, b_some.float(), out=some)
    return out


def _attend(kernel: Any, rounded: int, keys: Any, *args: Any, **options: Any) -> Any:
    if not any(map(_is_bf16, args)):
        return kernel.call_boxed(keys, *args, **options)
    wide = {name: _widened(x) for name, x in options.items()}
    found = kernel.call_boxed(keys, *map(_widened, args), **wide)
    return tuple(x.bfloat16() if i < rounded else x for i, x in enumerate(found))


def _is_bf16(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16


def _widened(x: Any) -> Any:
    return x.float() if _is_bf16(x) else x
