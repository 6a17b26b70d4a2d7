"""gpg-train --dry-run: what a configuration will do, and whether it fits; dry_run_text.py says it.

What the policy section leaves open is decided here too, for a run and for a dry run alike.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import psutil

from gpg_megatron.config.sections import GIB, Config
from gpg_megatron.host.device import Device, device_bytes
from gpg_megatron.loop.inputs import model_files
from gpg_megatron.model.layout_rules import check_engine_type, check_layout
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.placement.memory import cache_problem
from gpg_megatron.rollout.engine_args import check_engine_args
from gpg_megatron.start.run_plan import Machine, RunPlan, made_plan

ROW_TOKENS = {"cuda": 16384, "cpu": 768}
"""Of a micro-batch by default: on a CPU longer rows are not faster, and hold more."""
ROOM = 0.9
"""Of a memory, what is planned with; the rest is for CUDA, NCCL, other processes and holes."""


def plan_run(config: Config, *, device: str, machine: Machine | None = None) -> RunPlan:
    """Plan a run; in the plan's configuration the policy section leaves nothing open.

    Args:
        device: cpu or cuda.
        machine: each of the hosts with GPUs; unused on CPU.

    Raises:
        UserError: the model's config.json is missing or unsupported, or the parallel sizes do
            not fit it.
    """
    shape = load_model_shape(model_files(config), need_weights=False)
    check_layout(config, shape)
    check_engine_type(config, shape, device)
    check_engine_args(config.rollout)
    tokens = config.policy.max_tokens_per_micro_batch or ROW_TOKENS[device]
    config = _with_policy(config, max_tokens_per_micro_batch=tokens)
    if config.policy.recompute != "auto":
        return made_plan(config, shape, device, machine or Machine())
    plan, saving = (
        made_plan(_with_policy(config, recompute=x), shape, device, machine or Machine())
        for x in ("none", "layers")
    )
    return saving if _too_large(plan) else plan


def settled(config: Config, device: Device) -> Config:
    """With what the policy section leaves open decided for this machine, by the dry run's
    arithmetic. Raises UserError."""
    n_bytes = device_bytes(device) or 0
    gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    host_gib = psutil.virtual_memory().total / GIB
    machine = Machine(gpu_gib=n_bytes / GIB, gpus=gpus, host_gib=host_gib)
    return plan_run(config, device=device, machine=machine).config


def _with_policy(config: Config, **values: Any) -> Config:
    return replace(config, policy=replace(config.policy, **values))


def _too_large(plan: RunPlan) -> bool:
    """Whether ranks and engines do not fit, in memory with some room left."""
    if plan.device_bytes is None:
        return sum(plan.cpu_parts.values()) > ROOM * plan.host_bytes
    return any(sum(held) > ROOM * plan.device_bytes for _, *held in plan.peaks.values())


def problems(plan: RunPlan) -> list[str]:
    """What would not fit, most telling first; empty when nothing is known to be wrong."""
    config, engine = plan.config, plan.engine
    found = []
    if problem := cache_problem(config, engine):
        found.append(problem)
    if plan.device_bytes is None:
        if sum(plan.cpu_parts.values()) > plan.host_bytes:
            needed = sum_of(plan.cpu_parts)
            found.append(f"host: {needed} are more than this machine's {gib(plan.host_bytes)}")
        return found
    peaks = plan.peaks
    totals = {gpu: policy + engines for gpu, (_, policy, engines) in peaks.items()}
    too_small = sum(n_bytes > plan.device_bytes for n_bytes in totals.values())
    if too_small:
        worst = max(totals, key=lambda gpu: totals[gpu])
        state, policy, engines = peaks[worst]
        when = f" in state {state}" if config.trainer.placement == "colocated" else ""
        found.append(
            f"{too_small} of {len(peaks)} GPUs are too small; worst is GPU {worst}{when}: "
            f"policy {gib(policy)} + engine {gib(engines)} of {gib(plan.device_bytes)}; lower "
            f"rollout.gpu_memory_utilization or policy.max_tokens_per_micro_batch, or raise the "
            f"parallel sizes"
        )
    return found + _host_problems(plan)


def _host_problems(plan: RunPlan) -> list[str]:
    """Of the host with GPUs that needs the most; a run that never saves needs nothing for it."""
    saving = plan.config.checkpoint.save_freq > 0 or plan.config.checkpoint.hf_export != "never"
    states = [
        (needed, state, number)
        for number, host in enumerate(plan.hosts)
        for state, needed in host.states.items()
        if saving or state != "saving"
    ]
    needed, state, number = max(states)
    if needed <= plan.host_bytes:
        return []
    return [
        f"host {number} needs {gib(needed)} of memory while {state}, it has "
        f"{gib(plan.host_bytes)}; use more hosts, or policy.use_distributed_optimizer"
    ]


def sum_of(parts: Mapping[str, int]) -> str:
    """Named bytes, for people."""
    return " + ".join(f"{name} {gib(n_bytes)}" for name, n_bytes in parts.items())


def gib(n_bytes: float) -> str:
    """Bytes, for people."""
    return f"{n_bytes / GIB:.2f} GiB"
