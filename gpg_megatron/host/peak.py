"""What a device could compute at best: the denominator of a run's utilisation."""

from __future__ import annotations

import math
import re
import time

import torch

from gpg_megatron.host.device import Device
from gpg_megatron.host.products import product_dtype

# Words of a device's name -> dense bf16 operations per second, as the data sheets state them.
# Names without a form factor are of the SXM version.
_BF16_PEAKS: dict[tuple[str, ...], float] = {
    ("A10",): 125e12,
    ("A30",): 165e12,
    ("A40",): 149.7e12,
    ("A100",): 312e12,
    ("A800",): 312e12,
    ("L4",): 121e12,
    ("L40",): 181e12,
    ("L40S",): 362e12,
    ("H20",): 148e12,
    ("H100",): 989e12,
    ("H100", "NVL"): 835e12,
    ("H100", "PCIe"): 756e12,
    ("H800",): 989e12,
    ("H800", "PCIe"): 756e12,
    ("H200",): 989e12,
    ("H200", "NVL"): 835e12,
    ("GH200",): 989e12,
    ("B200",): 2250e12,
    ("B300",): 2250e12,
    ("GB200",): 2500e12,
    ("GB300",): 2500e12,
}


def bf16_peak(name: str) -> float | None:
    """Of a whole GPU by the name that its driver gives it; None: it is not in the table, or a
    part of a GPU (MIG)."""
    words = set(re.split(r"[\s-]+", name))
    known = [row for row in _BF16_PEAKS if words.issuperset(row)]
    if not known or "MIG" in words:
        return None
    return _BF16_PEAKS[max(known, key=len)]


def peak_flops_per_s(device: Device, dtype: torch.dtype) -> float:
    """Floating-point operations per second that this process could do at best.

    In bf16 on a GPU of the table its data sheet's; otherwise those of a large matrix product,
    measured now: the best of a few, on the threads or the GPU of this process.
    """
    if device == "cuda" and dtype == torch.bfloat16:
        known = bf16_peak(torch.cuda.get_device_name())
        if known is not None:
            return known
    return _measured_flops_per_s(device, dtype)


def _measured_flops_per_s(device: Device, dtype: torch.dtype) -> float:
    size = 8192 if device == "cuda" else 512
    dtype = product_dtype(device, dtype)
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = math.inf
    for _ in range(8):
        begin = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the GPU
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best
