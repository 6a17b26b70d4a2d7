"""Whether this host has room for what a run keeps there: caches, shared memory, checkpoints."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gpg_megatron.bridge.transports.base import SLOTS
from gpg_megatron.config.sections import GIB, MIB, Config
from gpg_megatron.errors import UserError
from gpg_megatron.host.reaper import SHARED_MEMORY, scratch_directory
from gpg_megatron.layout.topology import hf_shapes
from gpg_megatron.model.shape import padded_vocab_size
from gpg_megatron.placement.memory import FP32, engine_memory
from gpg_megatron.shapes import ModelShape
from gpg_megatron.types import DTYPES

CPU_BLOCK = 128
"""Tokens of a block of vLLM's key-value cache on CPU; a sequence takes whole ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Bytes that are free here."""

    shared_memory: int
    """In /dev/shm."""
    output: int
    """On the disk of trainer.output_dir."""


def room_here(config: Config) -> Room:
    """Ask the operating system."""
    path = Path(config.trainer.output_dir).absolute()
    existing = next(p for p in (path, *path.parents) if p.exists())
    return Room(
        shared_memory=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0,
        output=shutil.disk_usage(existing).free,
    )


def check_room(
    config: Config, shape: ModelShape, room: Room, *, n_ranks: int, on_cpu: bool
) -> None:
    """Raise UserError where something of a run cannot fit.

    Args:
        n_ranks: policy ranks of this host.
    """
    for needed, free, message in _needs(config, shape, room, n_ranks, on_cpu):
        if needed > free:
            raise UserError(message)


def check_scratch(run_id: str) -> None:
    """Raise UserError: the run's scratch folder cannot be made."""
    parent = scratch_directory(run_id).parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{parent} is not writable; expected a folder for temporary files, TMPDIR")


def checkpoint_bytes(config: Config, shape: ModelShape) -> int:
    """Of one checkpoint: parameters, Adam's two moments and, for bf16 ones, master weights; and
    the same model as Hugging Face files, where the first checkpoint is exported, too."""
    item = DTYPES[config.model.dtype].itemsize
    master = FP32 if item < FP32 else 0
    exported = item if config.checkpoint.hf_export == "every" else 0
    rows = padded_vocab_size(shape, config.policy.tensor_model_parallel_size)
    shape = replace(shape, vocab_size=rows)
    n_parameters = sum(map(math.prod, hf_shapes(shape).values()))
    return n_parameters * (item + master + 2 * FP32 + exported)


def _needs(
    config: Config, shape: ModelShape, room: Room, n_ranks: int, on_cpu: bool
) -> Iterator[tuple[int, int, str]]:
    """(what is needed, what there is, the message when that is too little)."""
    if on_cpu:
        longest = config.data.max_prompt_length + config.rollout.max_response_length
        cache = engine_memory(config, shape, n_parameters=0, device_bytes=None)
        needed = math.ceil(longest / CPU_BLOCK) * CPU_BLOCK
        least = needed * cache.kv_bytes_per_token / GIB
        yield (
            needed,
            cache.kv_tokens,
            f"rollout.kv_cache_gb={config.rollout.kv_cache_gb:g} holds {cache.kv_tokens:,} tokens, "
            f"and one sequence may have {longest:,}; expected at least {least:.2g}",
        )
    if _through_shared_memory(config, n_ranks, on_cpu):
        buckets = n_ranks * SLOTS * config.bridge.bucket_mb * MIB
        yield (
            buckets,
            room.shared_memory,
            f"/dev/shm has {_mib(room.shared_memory)} free, and {n_ranks} policy ranks with "
            f"{SLOTS} buckets of bridge.bucket_mb={config.bridge.bucket_mb} need {_mib(buckets)}; "
            "expected smaller ones, more room (in a container --shm-size) or bridge.transport=gloo",
        )
    if config.checkpoint.save_freq:
        size = checkpoint_bytes(config, shape)
        yield (
            size,
            room.output,
            f"trainer.output_dir {config.trainer.output_dir}: its disk has {_mib(room.output)} "
            f"free, and the first checkpoint takes {_mib(size)}; expected more room, or "
            "checkpoint.save_freq=0",
        )


def _through_shared_memory(config: Config, n_ranks: int, on_cpu: bool) -> bool:
    """Whether weights certainly go that way; auto may choose another where there are GPUs or
    engines on other hosts."""
    if config.bridge.transport == "auto":
        here = n_ranks == config.policy.world_size and config.rollout.ray_address is None
        return on_cpu and here
    return config.bridge.transport == "shm"


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / MIB:,.0f} MiB"
