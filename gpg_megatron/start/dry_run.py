"""gpg-train --dry-run: what a configuration will do, from the model's config.json alone.

Nothing is started, no weights are read, no GPU is needed. Here are the numbers; dry_run_text.py
says them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from gpg_megatron.bridge.engine_layout import Engine
from gpg_megatron.bridge.forecast import Forecast, forecast, worker_parameters
from gpg_megatron.bridge.links import Links, Seat
from gpg_megatron.config.sections import GIB, Config
from gpg_megatron.layout.topology import PolicyGrid, hf_shapes, local_shapes, policy_grid
from gpg_megatron.model.layout_rules import check_layout
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.placement.devices import first_engine_device
from gpg_megatron.placement.memory import (
    EngineLimits,
    EngineMemory,
    PolicyMemory,
    engine_limits,
    engine_memory,
    gpu_states,
    policy_memory,
)
from gpg_megatron.rollout.engine_args import check_engine_args
from gpg_megatron.types import ModelShape

DEFAULT_GPU_GIB = 80.0
GPUS_PER_HOST = 8
"""As long as nobody has asked the hosts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One pipeline stage of the policy; its ranks are alike."""

    number: int
    ranks: tuple[int, ...]
    layers: tuple[int, ...]
    n_parameters: int
    """Of each rank."""
    memory: PolicyMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """Everything that the dry run says."""

    config: Config
    shape: ModelShape
    n_parameters: int
    """Of the model."""
    stages: tuple[Stage, ...]
    engine: EngineMemory
    limits: EngineLimits
    publish: Forecast
    n_rows: int | None
    """Training rows, before over-long prompts are left out; None: the files cannot be counted."""
    device_bytes: int | None
    """Of each GPU; None: on CPU."""
    host_bytes: int
    """Of this machine."""

    @property
    def longest(self) -> int:
        """Tokens of one sequence of full length."""
        return self.config.data.max_prompt_length + self.config.rollout.max_response_length

    @property
    def engine_gpus(self) -> range:
        """Those of the engine workers; rank r is on GPU r."""
        r = self.config.rollout
        first = first_engine_device(self.config.trainer.placement, self.config.policy.world_size)
        return range(first, first + r.num_engines * r.tensor_model_parallel_size)

    @property
    def memory_by_gpu(self) -> dict[int, Mapping[str, tuple[int, int]]]:
        """GPU -> state -> (policy bytes, engine bytes); disaggregated, there is but one state."""
        ranks = {rank: stage.memory for stage in self.stages for rank in stage.ranks}
        return {
            gpu: gpu_states(
                self.config.trainer.placement,
                ranks.get(gpu),
                self.engine if gpu in self.engine_gpus else None,
            )
            for gpu in range(max(len(ranks), self.engine_gpus.stop))
        }

    @property
    def peaks(self) -> dict[int, tuple[str, int, int]]:
        """GPU -> the state in which most is on it, with its policy and engine bytes."""
        return {
            gpu: max(((s, *held) for s, held in states.items()), key=lambda x: x[1] + x[2])
            for gpu, states in self.memory_by_gpu.items()
        }


def plan_run(config: Config, *, device: str, gpu_gib: float = DEFAULT_GPU_GIB) -> RunPlan:
    """Plan a run.

    Args:
        device: cpu or cuda.
        gpu_gib: memory of each GPU.

    Raises:
        UserError: the model's config.json is missing or unsupported, or the parallel sizes do
            not fit it.
    """
    shape = load_model_shape(config.model.path, need_weights=False)
    check_layout(config, shape)
    check_engine_args(config.rollout)
    r = config.rollout
    grid = policy_grid(config.policy, shape)
    engine = Engine(model=shape, tp_size=r.tensor_model_parallel_size)
    device_bytes = int(gpu_gib * GIB) if device == "cuda" else None
    n_parameters = worker_parameters(shape, engine.tp_size)
    memory = engine_memory(config, shape, n_parameters=n_parameters, device_bytes=device_bytes)
    return RunPlan(
        config=config,
        shape=shape,
        n_parameters=_count(hf_shapes(shape)),
        stages=tuple(_stage(config, shape, grid, number) for number in range(grid.pp_size)),
        engine=memory,
        limits=engine_limits(config, memory, on_gpu=device == "cuda"),
        publish=forecast(grid, engine, planned_links(config, device)),
        n_rows=count_rows(config.data.train_files),
        device_bytes=device_bytes,
        host_bytes=psutil.virtual_memory().total,
    )


def _stage(config: Config, shape: ModelShape, grid: PolicyGrid, number: int) -> Stage:
    shapes = local_shapes(shape, grid, grid.rank(tp=0, dp=0, pp=number))
    n_parameters = _count(shapes)
    return Stage(
        number=number,
        ranks=grid.holders(number, None, None),
        layers=tuple(i for i, stage in enumerate(grid.stage_of_layer) if stage == number),
        n_parameters=n_parameters,
        memory=policy_memory(config, shape, n_parameters=n_parameters, stage=number),
    )


def planned_links(config: Config, device: str) -> Links:
    """Rank r on GPU r, the engines' workers one after the other on theirs; an engine's workers see
    each other's GPUs. On CPU everything is on this host."""
    r = config.rollout
    n_ranks, tp = config.policy.world_size, r.tensor_model_parallel_size
    first = first_engine_device(config.trainer.placement, n_ranks)

    def seat(gpu: int, seen: range = range(0)) -> Seat:
        if device == "cpu":
            return Seat(host="0")
        here = [g for g in seen if g // GPUS_PER_HOST == gpu // GPUS_PER_HOST and g != gpu]
        host, peers = str(gpu // GPUS_PER_HOST), frozenset(map(str, here))
        return Seat(host=host, gpu=str(gpu), peers=peers)

    gpus = range(first, first + r.num_engines * tp)
    return Links(
        transport=config.bridge.transport,
        ranks=tuple(seat(rank) for rank in range(n_ranks)),
        workers=tuple(seat(g, gpus[i - i % tp : i - i % tp + tp]) for i, g in enumerate(gpus)),
        n_workers=tp,
    )


def _count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def count_rows(files: Sequence[str]) -> int | None:
    """Rows of parquet and jsonl files, without reading the parquet ones; None: one cannot be
    counted."""
    total = 0
    for path in map(Path, files):
        try:
            if path.suffix == ".parquet":
                total += int(pq.read_metadata(path).num_rows)
            elif path.suffix == ".jsonl":
                with path.open("rb") as lines:
                    total += sum(bool(line.strip()) for line in lines)
            else:
                return None
        except (OSError, pa.ArrowException):
            return None
    return total


def problems(plan: RunPlan) -> list[str]:
    """What would not fit, most telling first; empty when nothing is known to be wrong."""
    config, engine = plan.config, plan.engine
    found = []
    if engine.kv_cache <= 0:
        found.append(
            f"engine: the weights take {gib(engine.parameters)} of the {gib(engine.reserved)} "
            f"that rollout.gpu_memory_utilization={config.rollout.gpu_memory_utilization:g} "
            f"gives each worker; raise it or rollout.tensor_model_parallel_size"
        )
    elif engine.kv_tokens < plan.longest:
        found.append(
            f"engine: the cache holds {engine.kv_tokens:,} tokens, one sequence may have "
            f"{plan.longest:,}; raise rollout.gpu_memory_utilization (on CPU rollout.kv_cache_gb)"
        )
    if plan.device_bytes is None:
        ranks = sum(len(stage.ranks) * stage.memory.total for stage in plan.stages)
        engines = len(plan.engine_gpus) * engine.reserved
        if ranks + engines > plan.host_bytes:
            found.append(
                f"host: ranks {gib(ranks)} + engines {gib(engines)} are more than this "
                f"machine's {gib(plan.host_bytes)}"
            )
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
    return found


def gib(n_bytes: float) -> str:
    """Bytes, for people."""
    return f"{n_bytes / GIB:.2f} GiB"
