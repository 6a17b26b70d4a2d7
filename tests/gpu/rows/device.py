"""The device, what it can do at best, and the groups that torchrun's ranks form on it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import synchronize
from gpg_megatron.host.device import Device
from gpg_megatron.host.peak import peak_flops_per_s
from tests.gpu.rows.world import one_rank

PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
COPIED_BYTES = {"cpu": 2**24, "cuda": 2**30}


def device_and_groups(device: Device, folder: Path) -> str:
    """A tensor and an object through the process group; a matrix product; a copy."""
    with one_rank(device):
        ones = torch.ones(1000, device=device)
        dist.all_reduce(ones)
        assert ones.sum().item() == 1000.0
        box = ["an object"]
        dist.broadcast_object_list(box, src=0)
        assert box == ["an object"]
        groups = dist.get_backend_config()
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        peak = peak_flops_per_s(device, dtype) / 1e12
        product = (
            f"{product_rate(device, dtype):.3g} TFLOP/s in {dtype}, taken as its peak {peak:.3g}"
        )
        rates = ", ".join(f"{what} {rate:.1f} GB/s" for what, rate in copy_rates(device).items())
    return f"{_named(device)}groups {groups}; a matrix product {product}; {rates}"


def _named(device: Device) -> str:
    if device == "cpu":
        return ""
    p: Any = torch.cuda.get_device_properties()
    size, sm = p.total_memory / 2**30, f"sm_{p.major}{p.minor}"
    return f"{p.name}, {sm}, {p.multi_processor_count} multiprocessors, {size:.1f} GiB; "


def product_rate(device: Device, dtype: torch.dtype) -> float:
    """TFLOP/s of a product of two large random matrices; the best of a few."""
    size = PRODUCT_SIZE[device]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2e-12 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(8))


def copy_rates(device: Device) -> dict[str, float]:
    """GB/s of large copies: within the device, and with a GPU from and to pinned memory."""
    n_bytes = COPIED_BYTES[device]
    here = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    rates = {"copies here": rate(lambda: there.copy_(here), n_bytes, device)}
    if device == "cuda":
        host = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
        rates["to the host"] = rate(lambda: host.copy_(here, non_blocking=True), n_bytes, device)
        rates["from it"] = rate(lambda: there.copy_(host, non_blocking=True), n_bytes, device)
    return rates


def rate(copy: Any, n_bytes: int, device: Device) -> float:
    """GB/s of the best of a few."""
    return n_bytes / 1e9 / min(seconds(copy, device) for _ in range(4))


def seconds(action: Any, device: Device) -> float:
    """Of one call, and of what it launched."""
    synchronize(device)
    begin = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - begin
