"""The device of this process: which one, its process group, its threads."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from gpg_megatron.errors import UserError
from gpg_megatron.host.cores import threads_of_rank

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
    dist.init_process_group(backends(device), timeout=timedelta(seconds=timeout_s))


def backends(device: Device) -> str:
    """Of a process group's collectives, as torch spells them."""
    return "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A host tensor on a device. The copy is queued behind the device's work and the host goes
    on; from memory that is not pinned it would wait until all of that work is done."""
    on_gpu = torch.device(device).type == "cuda"
    return (tensor.pin_memory() if on_gpu else tensor).to(device, non_blocking=True)


_LOST = (
    ("gloo", "onnection"),
    ("NCCL", "remote process exited"),
    ("ncclRemoteError",),
    ("NCCL", "communicator was aborted"),
    ("Watchdog caught collective operation timeout",),
)
"""Words of an error, all of one row, that mean a lost rank: neither backend has a type for it."""


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone. NCCL's watchdog says it of one that
    is late; the rendezvous' store (DistNetworkError) of the rank that keeps it."""
    text = str(error)
    return isinstance(error, dist.DistNetworkError) or any(
        all(word in text for word in row) for row in _LOST
    )


def set_threads(num_threads: int | None) -> None:
    """CPU threads of this rank: as configured, or its share of the cores."""
    torch.set_num_threads(num_threads or threads_of_rank())


def device_bytes(device: Device) -> int | None:
    """Memory of this process's GPU; None on CPU."""
    if device == "cpu":
        return None
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
