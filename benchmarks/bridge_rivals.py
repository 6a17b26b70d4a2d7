"""What a publish of benchmarks.bridge is measured against."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class PlainCopy:
    """The same bytes from rank 0's memory through shared memory into rank 1's (or back into
    rank 0's, when it is alone): the two copies that no transport on one host can avoid."""

    def __init__(self, n_bytes: int) -> None:
        self._path = Path("/dev/shm") / f"gpg_{os.environ['GPG_RUN_ID']}_copy"
        self._reader = min(1, dist.get_world_size() - 1)
        rank = dist.get_rank()
        if rank == 0:
            self._path.touch(exist_ok=False)
            os.truncate(self._path, n_bytes)
        dist.barrier()
        if rank in (0, self._reader):
            self._shared = torch.from_file(
                str(self._path), shared=True, size=n_bytes, dtype=torch.uint8
            )
            self._own = torch.zeros(n_bytes, dtype=torch.uint8)

    def run(self) -> None:
        if dist.get_rank() == 0:
            self._shared.copy_(self._own)
        dist.barrier()
        if dist.get_rank() == self._reader:
            self._own.copy_(self._shared)

    def close(self) -> None:
        self._path.unlink(missing_ok=True)


class GatherReload:
    """The usual way: full Hugging Face tensors on rank 0, then the engine's own loader."""

    def __init__(self, policy: Any, shape: Any, fleet: Any, n_bytes: int) -> None:
        from gpg_megatron.layout.boxes import Shard
        from gpg_megatron.layout.families import pieces_of
        from gpg_megatron.layout.topology import hf_shapes

        position = policy.position
        self._fleet = fleet
        self._pieces = [
            (tensor, piece)
            for name, tensor in policy.named_shards().items()
            for piece in pieces_of(
                name, Shard(tuple(tensor.shape), position.tp_rank, position.tp_size), shape
            )
        ]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, [piece for _, piece in self._pieces])
        self._others = everyone
        self._path = Path("/dev/shm") / f"gpg_{os.environ['GPG_RUN_ID']}_full"
        self._manifest, offset = [], 0
        for name, size in hf_shapes(shape).items():
            self._manifest.append((name, list(size), offset))
            offset += torch.Size(size).numel() * 4
        if dist.get_rank() == 0:
            self._path.touch(exist_ok=False)
            os.truncate(self._path, n_bytes)
            memory = torch.from_file(str(self._path), shared=True, size=n_bytes, dtype=torch.uint8)
            self._full = {
                name: memory[o : o + torch.Size(s).numel() * 4].view(torch.float32).view(s)
                for name, s, o in self._manifest
            }

    def run(self) -> None:
        rank = dist.get_rank()
        if rank:
            for tensor, piece in self._pieces:
                dist.send(tensor[piece.local.slices].contiguous(), dst=0)
        else:
            for tensor, piece in self._pieces:
                self._full[piece.hf_name][piece.hf.slices].copy_(tensor[piece.local.slices])
            for source in range(1, dist.get_world_size()):
                for piece in self._others[source]:
                    part = torch.empty(piece.hf.shape)
                    dist.recv(part, src=source)
                    self._full[piece.hf_name][piece.hf.slices].copy_(part)
            arguments = (str(self._path), self._manifest)
            self._fleet.call_workers("bench_reload", [arguments], timeout_s=300)
        dist.barrier()

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
