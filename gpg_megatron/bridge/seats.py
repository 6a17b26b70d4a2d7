"""Where this process computes, as links.py wants to know it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from gpg_megatron.bridge.links import Seat
from gpg_megatron.host.reaper import SHARED_MEMORY

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def gpu_uuid(device: torch.device) -> str:
    """The same in every process, however its GPUs are numbered."""
    return str(torch.cuda.get_device_properties(device).uuid)


def own_seat(device: torch.device) -> Seat:
    """Of this process, which computes on a device (with an index, if it is a GPU)."""
    if device.type != "cuda":
        return Seat(host=_host())
    others = (i for i in range(torch.cuda.device_count()) if i != device.index)
    peers = (i for i in others if torch.cuda.can_device_access_peer(device, i))
    return Seat(
        host=_host(),
        gpu=gpu_uuid(device),
        peers=frozenset(gpu_uuid(torch.device("cuda", i)) for i in peers),
    )


def _host() -> str:
    """Name, running kernel and shared memory: containers of one host may share none."""
    return f"{os.uname().nodename} {_BOOT_ID.read_text().strip()} {os.stat(SHARED_MEMORY).st_dev}"
