"""What a configuration will do, from the model's config.json alone: the numbers of the dry run.

Nothing is started, no weights are read, no GPU is needed.
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
from gpg_megatron.shapes import ModelShape
from gpg_megatron.start.host_memory import HostMemory, rank_host_memory

# What processes on a CPU hold beside tensors, bytes, as psutil counts them: modules above all, and
# with them what they share. A rank; a worker of an engine; an engine's actor, and the server that
# its workers are forked from; the launcher, Ray, and the processes that score.
RANK_BYTES, WORKER_BYTES, ENGINE_BYTES, OTHER_BYTES = (
    int(x * 1e9) for x in (0.45, 0.8, 1.25, 1.05)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One pipeline stage of the policy; its ranks are alike."""

    number: int
    ranks: tuple[int, ...]
    layers: tuple[int, ...]
    n_parameters: int
    """Of each rank."""
    n_in_experts: int
    """Of these."""
    largest: int
    """Elements of a rank's largest parameter."""
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
    device_bytes: int | None
    """Of each GPU; None: on CPU."""
    host_bytes: int
    """Of each host's memory; on CPU that of this machine."""
    gpus_per_host: int

    @property
    def longest(self) -> int:
        """Tokens of one sequence of full length."""
        return self.config.data.max_prompt_length + self.config.rollout.max_response_length

    @property
    def n_rows(self) -> int | None:
        """Training rows, over-long prompts included; None: the files cannot be counted."""
        return count_rows(self.config.data.train_files)

    @property
    def publish(self) -> Forecast:
        """What the bridge will send."""
        device = "cpu" if self.device_bytes is None else "cuda"
        grid = policy_grid(self.config.policy, self.shape)
        engine = Engine(model=self.shape, tp_size=self.config.rollout.tensor_model_parallel_size)
        return forecast(grid, engine, planned_links(self.config, device, self.gpus_per_host))

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
    def cpu_parts(self) -> dict[str, int]:
        """On CPU: what this machine's memory is for -> bytes, while the policy learns."""
        ranks = sum(len(stage.ranks) * stage.memory.total for stage in self.stages)
        n_workers = len(self.engine_gpus)
        engines = n_workers * (self.engine.reserved + self.engine.packed)
        return {
            "policy": ranks + self.config.policy.world_size * RANK_BYTES,
            "engines": engines
            + n_workers * WORKER_BYTES
            + self.config.rollout.num_engines * ENGINE_BYTES,
            "other": OTHER_BYTES,
        }

    @property
    def hosts(self) -> list[HostMemory]:
        """Of each host: its GPUs are numbered on from those of the host before."""
        p, per_host = self.config.policy, self.gpus_per_host
        asleep = self.engine.parameters if self.config.trainer.placement == "colocated" else 0
        n_hosts = math.ceil(max(p.world_size, self.engine_gpus.stop) / per_host)
        found = [HostMemory() for _ in range(n_hosts)]
        for gpu in self.engine_gpus:
            found[gpu // per_host] += HostMemory(asleep=asleep)
        for stage in self.stages:
            for rank in stage.ranks:
                found[rank // per_host] += rank_host_memory(
                    self.config,
                    stage.memory,
                    n_parameters=stage.n_parameters,
                    n_in_experts=stage.n_in_experts,
                    largest=stage.largest,
                    replica=(rank - stage.ranks[0]) // p.tensor_model_parallel_size,
                )
        return found

    @property
    def peaks(self) -> dict[int, tuple[str, int, int]]:
        """GPU -> the state in which most is on it, with its policy and engine bytes."""
        return {
            gpu: max(((s, *held) for s, held in states.items()), key=lambda x: x[1] + x[2])
            for gpu, states in self.memory_by_gpu.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A host with GPUs, as far as memory goes; a DGX H100 unless something else is said."""

    gpu_gib: float = 80.0
    """Of each GPU."""
    gpus: int = 8
    host_gib: float = 2048.0


def made_plan(config: Config, shape: ModelShape, device: str, machine: Machine) -> RunPlan:
    """Of a configuration whose policy section leaves nothing open, for cpu or cuda."""
    tp_size = config.rollout.tensor_model_parallel_size
    grid = policy_grid(config.policy, shape)
    on_gpus = device == "cuda"
    n_bytes = int(machine.gpu_gib * GIB) if on_gpus else None
    n_parameters = worker_parameters(shape, tp_size)
    memory = engine_memory(config, shape, n_parameters=n_parameters, device_bytes=n_bytes)
    return RunPlan(
        config=config,
        shape=shape,
        n_parameters=_count(hf_shapes(shape)),
        stages=tuple(
            stage_of(config, shape, grid, number, on_gpus=on_gpus) for number in range(grid.pp_size)
        ),
        engine=memory,
        limits=engine_limits(config, memory, on_gpu=on_gpus),
        device_bytes=n_bytes,
        host_bytes=int(machine.host_gib * GIB) if on_gpus else psutil.virtual_memory().total,
        gpus_per_host=machine.gpus,
    )


def stage_of(
    config: Config, shape: ModelShape, grid: PolicyGrid, number: int, *, on_gpus: bool
) -> Stage:
    shapes = local_shapes(shape, grid, grid.rank(tp=0, dp=0, pp=number))
    n_parameters = _count(shapes)
    n_in_experts = _count({name: x for name, x in shapes.items() if ".experts." in name})
    return Stage(
        number=number,
        ranks=grid.holders(number, None, None),
        layers=tuple(i for i, stage in enumerate(grid.stage_of_layer) if stage == number),
        n_parameters=n_parameters,
        n_in_experts=n_in_experts,
        largest=max(map(math.prod, shapes.values())),
        memory=policy_memory(
            config,
            shape,
            n_parameters=n_parameters,
            n_in_experts=n_in_experts,
            stage=number,
            fused=on_gpus and config.model.dtype != "fp32",
        ),
    )


def planned_links(config: Config, device: str, gpus_per_host: int) -> Links:
    """Rank r on GPU r, the engines' workers one after the other on theirs; an engine's workers see
    each other's GPUs. On CPU everything is on this host."""
    r = config.rollout
    n_ranks, tp = config.policy.world_size, r.tensor_model_parallel_size
    first = first_engine_device(config.trainer.placement, n_ranks)

    def seat(gpu: int, seen: range = range(0)) -> Seat:
        if device == "cpu":
            return Seat(host="0")
        host = gpu // gpus_per_host
        peers = frozenset(str(g) for g in seen if g // gpus_per_host == host and g != gpu)
        return Seat(host=str(host), gpu=str(gpu), peers=peers)

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
