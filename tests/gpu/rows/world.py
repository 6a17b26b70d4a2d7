"""Ranks for the rows: a world of one in this process, or torchrun's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from gpg_megatron.host.device import Device, init_process_group, set_threads
from gpg_megatron.host.network import free_port
from gpg_megatron.policy.on_cpu import quiet_megatron

LIMIT_S = 120


@contextmanager
def one_rank(device: Device) -> Iterator[None]:
    """A world of one, as torchrun would make it. After a failure it is left as it is: a device
    that is lost would keep its last words back."""
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    quiet_megatron()
    set_threads(None)
    init_process_group(device, LIMIT_S)
    yield
    dist.destroy_process_group()
