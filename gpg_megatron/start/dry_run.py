"""gpg-train --dry-run: what a configuration will do, from the model's config.json alone.

Nothing is started, no weights are read, no GPU is needed. What would not fit is said last.
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
from gpg_megatron.bridge.forecast import Forecast, forecast, worker_elements
from gpg_megatron.config.sections import GIB, Config
from gpg_megatron.layout.topology import PolicyGrid, local_shapes, policy_grid
from gpg_megatron.model.layout_rules import check_layout
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.placement.devices import first_engine_device
from gpg_megatron.placement.memory import (
    EngineMemory,
    PolicyMemory,
    engine_memory,
    gpu_states,
    micro_batches_per_update,
    policy_memory,
)
from gpg_megatron.types import DTYPES, ModelShape

DEFAULT_GPU_GIB = 80.0


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
    publish: Forecast
    n_rows: int | None
    """Training rows, before over-long prompts are left out; None: the files cannot be counted."""
    device_bytes: int | None
    """Of each GPU; None: on CPU."""
    host_bytes: int
    """Of this machine."""

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
    r = config.rollout
    grid = policy_grid(config.policy, shape)
    engine = Engine(model=shape, tp_size=r.tensor_model_parallel_size)
    device_bytes = int(gpu_gib * GIB) if device == "cuda" else None
    workers = [worker_elements(engine, worker) for worker in range(engine.tp_size)]
    whole = PolicyGrid(tp_size=1, dp_size=1, pp_size=1, stage_of_layer=(0,) * shape.num_layers)
    padding = -shape.vocab_size % 128 * shape.hidden_size * (1 if shape.tied else 2)
    return RunPlan(
        config=config,
        shape=shape,
        n_parameters=_count(local_shapes(shape, whole, 0)) - padding,
        stages=tuple(_stage(config, shape, grid, number) for number in range(grid.pp_size)),
        engine=engine_memory(config, shape, n_parameters=max(workers), device_bytes=device_bytes),
        publish=forecast(grid, engine, r.num_engines),
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
    longest = config.data.max_prompt_length + config.rollout.max_response_length
    found = []
    if engine.kv_cache <= 0:
        found.append(
            f"engine: the weights take {_gib(engine.parameters)} of the {_gib(engine.reserved)} "
            f"that rollout.gpu_memory_utilization={config.rollout.gpu_memory_utilization:g} "
            f"gives each worker; raise it or rollout.tensor_model_parallel_size"
        )
    elif engine.kv_tokens < longest:
        found.append(
            f"engine: the cache holds {engine.kv_tokens:,} tokens, one sequence may have "
            f"{longest:,}; raise rollout.gpu_memory_utilization (on CPU rollout.kv_cache_gb)"
        )
    if plan.device_bytes is None:
        ranks = sum(len(stage.ranks) * stage.memory.total for stage in plan.stages)
        r = config.rollout
        engines = r.num_engines * r.tensor_model_parallel_size * engine.reserved
        if ranks + engines > plan.host_bytes:
            found.append(
                f"host: ranks {_gib(ranks)} + engines {_gib(engines)} are more than this "
                f"machine's {_gib(plan.host_bytes)}"
            )
        return found
    peaks = plan.peaks
    over = {g: policy + engine for g, (_, policy, engine) in peaks.items()}
    over = {gpu: n_bytes for gpu, n_bytes in over.items() if n_bytes > plan.device_bytes}
    if over:
        worst = max(over, key=lambda gpu: over[gpu])
        state, policy, engines = peaks[worst]
        when = f" in state {state}" if config.trainer.placement == "colocated" else ""
        found.append(
            f"{len(over)} of {len(peaks)} GPUs are too small; worst is GPU {worst}{when}: "
            f"policy {_gib(policy)} + engine {_gib(engines)} of {_gib(plan.device_bytes)}; lower "
            f"rollout.gpu_memory_utilization or policy.max_tokens_per_micro_batch, or raise the "
            f"parallel sizes"
        )
    return found


def lines(plan: RunPlan) -> list[str]:
    """The plan as text."""
    return [
        *_model_lines(plan),
        *_process_lines(plan),
        *_batch_lines(plan),
        *_memory_lines(plan),
        *_bridge_lines(plan),
        *_verdict_lines(plan),
    ]


def _model_lines(plan: RunPlan) -> list[str]:
    s = plan.shape
    experts = f", {s.num_experts} experts" if s.moe else ""
    return [
        f"model      {s.architecture}, {plan.n_parameters / 1e9:.2f}e9 parameters, "
        f"{s.num_layers} layers{experts}; policy {plan.config.model.dtype}, engines "
        f"{plan.config.rollout.dtype}"
    ]


def _process_lines(plan: RunPlan) -> list[str]:
    p, r = plan.config.policy, plan.config.rollout
    context = f" CP{p.context_parallel_size}" if p.context_parallel_size > 1 else ""
    expert = f" EP{p.expert_model_parallel_size}" if plan.shape.moe else ""
    result = [
        f"policy     {plan.config.policy.world_size} ranks: TP{p.tensor_model_parallel_size} "
        f"PP{p.pipeline_model_parallel_size}{context} DP{p.data_parallel_size}{expert}",
        f"engines    {r.num_engines} x TP{r.tensor_model_parallel_size} = "
        f"{r.num_engines * r.tensor_model_parallel_size} workers",
        f"scorers    {plan.config.reward.num_workers}",
    ]
    if plan.device_bytes is None:
        return [*result, "devices    CPU"]
    n_gpus, workers = len(plan.memory_by_gpu), plan.engine_gpus
    shared = len(range(workers.start, min(workers.stop, plan.config.policy.world_size)))
    return [
        *result,
        f"devices    {n_gpus} GPUs of {_gib(plan.device_bytes)}, "
        f"{plan.config.trainer.placement}: rank r on GPU r, workers from GPU {workers.start} on; "
        f"{shared} GPUs hold a rank and a worker",
        *(
            f"  stage {stage.number}: layers {stage.layers[0]}-{stage.layers[-1]}, ranks "
            f"{_ranges(stage.ranks)}"
            for stage in plan.stages
        ),
    ]


def _batch_lines(plan: RunPlan) -> list[str]:
    c, t = plan.config, plan.config.trainer
    n, batch, update = c.rollout.n, t.train_batch_size, t.prompts_per_update
    result = [
        f"rollout    {batch:,} prompts x {n} = {batch * n:,} responses of at most "
        f"{c.rollout.max_response_length:,} tokens",
        f"updates    {t.updates_per_batch} per rollout batch, {update:,} prompts = "
        f"{update * n:,} responses each; {t.total_updates:,} in {t.total_training_steps:,} steps",
        f"           at most {micro_batches_per_update(c)} micro-batches of "
        f"{c.policy.max_tokens_per_micro_batch:,} tokens per data-parallel rank and update",
    ]
    if plan.n_rows is None:
        return [*result, "epoch      unknown: data.train_files cannot be counted here"]
    epochs = t.total_training_steps * batch / plan.n_rows
    return [
        *result,
        f"epoch      {plan.n_rows:,} prompts = {plan.n_rows / batch:.2f} rollout batches = "
        f"{plan.n_rows / update:.2f} updates; the run is {epochs:.2f} epochs",
    ]


def _memory_lines(plan: RunPlan) -> list[str]:
    names = ("parameters", "gradients", "optimizer", "activations", "logits", "total")
    head = "memory     " + "GiB per rank".ljust(16) + "".join(name.rjust(12) for name in names)
    rows = [
        "           "
        + f"policy stage {stage.number}".ljust(16)
        + "".join(f"{getattr(stage.memory, name) / GIB:12.2f}" for name in names)
        for stage in plan.stages
    ]
    e = plan.engine
    longest = plan.config.data.max_prompt_length + plan.config.rollout.max_response_length
    return [
        head,
        *rows,
        f"           engine worker: {_gib(e.reserved)} = parameters {_gib(e.parameters)} + "
        f"KV cache {_gib(max(0, e.kv_cache))}: {e.kv_tokens:,} tokens, "
        f"{e.kv_tokens // longest:,} sequences of full length",
        *_state_lines(plan),
    ]


def _state_lines(plan: RunPlan) -> list[str]:
    """Colocated on GPUs: what hands over to what, on the fullest GPU and on the hosts."""
    if plan.device_bytes is None or plan.config.trainer.placement != "colocated":
        return []
    fullest = max(plan.peaks, key=lambda gpu: sum(plan.peaks[gpu][1:]))
    states = plan.memory_by_gpu[fullest]
    ranks = sum(
        len(stage.ranks) * (stage.memory.parameters + stage.memory.optimizer)
        for stage in plan.stages
    )
    return [
        f"           GPU {fullest} by state: "
        + ", ".join(f"{state} {_gib(sum(held))}" for state, held in states.items()),
        f"           host memory of all ranks: {_gib(ranks)} for what is offloaded; and "
        f"{_gib(len(plan.engine_gpus) * plan.engine.parameters)} for the engines' weights while "
        f"the policy is saved",
    ]


def _bridge_lines(plan: RunPlan) -> list[str]:
    f, item = plan.publish, DTYPES[plan.config.rollout.dtype].itemsize
    n_engines = plan.config.rollout.num_engines
    return [
        f"bridge     {plan.config.bridge.transport}: {_gib(f.sent * item)} per publish "
        f"(bound {_gib(f.bound * item)}), {_gib(f.sent * item / n_engines)} to each engine in "
        f"{f.n_routes:,} rectangles",
        f"           {f.n_senders} ranks send, the most {_gib(f.most_sent * item)} "
        f"({f.most_sent / f.share:.2f} of an equal share); a worker receives at most "
        f"{_gib(f.received * item)}",
    ]


def _verdict_lines(plan: RunPlan) -> list[str]:
    found = problems(plan)
    return [f"does not fit: {problem}" for problem in found] or ["fits       as far as is known"]


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / GIB:.2f} GiB"


def _ranges(numbers: Sequence[int]) -> str:
    """0-3, 8-11."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
