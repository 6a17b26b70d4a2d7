"""Begins to start the engines of a run, on rank 0."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from gpg_megatron.bridge.forecast import worker_parameters
from gpg_megatron.bridge.protocol import BACKEND, RECEIVER
from gpg_megatron.config.sections import Config
from gpg_megatron.host.cores import on_all_cores
from gpg_megatron.host.device import Device, device_bytes
from gpg_megatron.host.reaper import scratch_directory
from gpg_megatron.loop.inputs import is_converted, model_files
from gpg_megatron.placement.devices import engine_devices, visible_devices
from gpg_megatron.placement.memory import fitting_limits
from gpg_megatron.rollout.fleet import Fleet
from gpg_megatron.rollout.spec import EngineSpec
from gpg_megatron.shapes import ModelShape

CPU_WARNING = (
    "warning: trainer.placement=colocated saves no memory on CPU: vLLM's workers cannot sleep there"
)


def start_engines(config: Config, shape: ModelShape, device: Device, run_id: str) -> Fleet:
    """They go on starting while the policy is built, which takes as long."""
    colocated = config.trainer.placement == "colocated"
    n_parameters = worker_parameters(shape, config.rollout.tensor_model_parallel_size)
    limits = fitting_limits(
        config, shape, n_parameters=n_parameters, device_bytes=device_bytes(device)
    )
    spec = EngineSpec(
        rollout=config.rollout,
        model_path=os.path.abspath(model_files(config)),
        random_weights=is_converted(config),
        device=device,
        max_model_len=config.data.max_prompt_length + config.rollout.max_response_length,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        has_states=shape.delta is not None,
        is_latent=shape.latent is not None,
        gives_memory_back=colocated,
        # A new engine would load its model where the policy has its memory.
        replaces_lost=not colocated and config.rollout.max_losses_per_hour > 0,
        worker_extension=RECEIVER,
        weight_transfer=BACKEND,
        scratch=scratch_directory(run_id),
    )
    with on_all_cores():
        return Fleet.start(
            spec,
            run_id=run_id,
            log_dir=Path(config.trainer.output_dir) / "logs",
            devices=_engine_devices(config) if device == "cuda" else None,
        )


def make_room(config: Config, fleet: Fleet, device: Device) -> None:
    """Before the policy is built: engines that share its GPUs must have taken, and given back,
    their memory."""
    if config.trainer.placement == "colocated":
        fleet.wait_ready()
        if device == "cpu":
            print(CPU_WARNING, file=sys.stderr)


def _engine_devices(config: Config) -> tuple[str, ...] | None:
    """For a private Ray; an existing cluster has its own."""
    r = config.rollout
    if r.ray_address is not None:
        return None
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    return engine_devices(
        visible_devices(variable, torch.cuda.device_count()),
        mode=config.trainer.placement,
        n_ranks=int(os.environ["LOCAL_WORLD_SIZE"]),
        n_workers=r.num_engines * r.tensor_model_parallel_size,
    )
