"""The device of this process: which one, its process group, its threads, its peak."""

from __future__ import annotations

import importlib.util
import math
import os
import time
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from gpg_megatron.errors import UserError

Device = Literal["cpu", "cuda"]


def resolve_device(wanted: Literal["auto", "cpu", "cuda"]) -> Device:
    """The device that trainer.device asks for. Raises UserError for cuda without a GPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("trainer.device=cuda, but torch sees no CUDA device; use cpu or auto")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def init_process_group(device: Device, timeout_s: int) -> None:
    """Join torchrun's world: gloo on CPU, gloo and NCCL on CUDA. Every collective has a limit."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A host tensor on a device. The copy is queued behind the device's work and the host goes
    on; from memory that is not pinned it would wait until all of that work is done."""
    on_gpu = torch.device(device).type == "cuda"
    return (tensor.pin_memory() if on_gpu else tensor).to(device, non_blocking=True)


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone; gloo has no type for it."""
    return "gloo" in str(error) and "onnection" in str(error)


def set_threads(num_threads: int | None) -> None:
    """CPU threads of this rank: as configured, or the machine's cores shared among its ranks."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(num_threads or max(1, cores // ranks))


# Dense bf16 operations per second, as the data sheets state them; the SXM version where there
# are several.
_BF16_PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def peak_flops_per_s(device: Device, dtype: torch.dtype) -> float:
    """Floating-point operations per second that this process could do at best.

    In bf16 on a GPU of the table its data sheet's; otherwise those of a large matrix product,
    measured now: the best of a few, on the threads or the GPU of this process.
    """
    if device == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name()
        known = [peak for part, peak in _BF16_PEAKS.items() if part in name]
        if known:
            return known[0]
    return _measured_flops_per_s(device, dtype)


def _measured_flops_per_s(device: Device, dtype: torch.dtype) -> float:
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = math.inf
    for _ in range(8):
        begin = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the GPU
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be used here (it needs CUDA)."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
