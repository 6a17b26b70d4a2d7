"""The dry run's plan as text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from operator import itemgetter

from gpg_megatron.bridge.links import Distance
from gpg_megatron.config.off_policy import summary
from gpg_megatron.config.sections import GIB
from gpg_megatron.placement.memory import micro_batches_per_update
from gpg_megatron.start.dry_run import gib, problems, sum_of
from gpg_megatron.start.host_memory import HostMemory
from gpg_megatron.start.run_plan import RunPlan
from gpg_megatron.types import DTYPES

_FROM = {
    Distance.GPU: "the worker's own GPU",
    Distance.PEER: "a GPU of its engine",
    Distance.HOST: "its host",
    Distance.NETWORK: "other hosts",
}


def lines(plan: RunPlan) -> list[str]:
    """What a run will do, what it needs, and last what would not fit."""
    found = [f"does not fit: {problem}" for problem in problems(plan)]
    text = _processes(plan) + _batches(plan) + _memory(plan) + _bridge(plan)
    return text.splitlines() + (found or ["fits       as far as is known"])


def _processes(plan: RunPlan) -> str:
    p, r, s = plan.config.policy, plan.config.rollout, plan.shape
    experts = f", {s.num_experts} experts" if s.moe else ""
    n_virtual = p.virtual_pipeline_model_parallel_size
    virtual = f" VPP{n_virtual}" if n_virtual > 1 else ""
    context = f" CP{p.context_parallel_size}" if p.context_parallel_size > 1 else ""
    expert = f" EP{p.expert_model_parallel_size}" if s.moe else ""
    workers = plan.engine_gpus
    text = f"""\
model      {s.architecture}, {plan.n_parameters / 1e9:.2f}e9 parameters, {s.num_layers} layers\
{experts}; policy {plan.config.model.dtype}, engines {r.dtype}
policy     {p.world_size} ranks: TP{p.tensor_model_parallel_size} \
PP{p.pipeline_model_parallel_size}{virtual}{context} DP{p.data_parallel_size}{expert}
engines    {r.num_engines} x TP{r.tensor_model_parallel_size} = {len(workers)} workers
scorers    {plan.config.reward.num_workers}
"""
    if plan.device_bytes is None:
        return text + "devices    CPU\n"
    shared = len(range(workers.start, min(workers.stop, p.world_size)))
    text += f"""\
devices    {len(plan.memory_by_gpu)} GPUs of {gib(plan.device_bytes)}, \
{plan.config.trainer.placement}: rank r on GPU r, workers from GPU {workers.start} on; \
{shared} GPUs hold a rank and a worker
"""
    for stage in plan.stages:
        text += (
            f"  stage {stage.number}: layers {_span(stage.layers)}, ranks {_span(stage.ranks)}\n"
        )
    return text


def _batches(plan: RunPlan) -> str:
    c, t = plan.config, plan.config.trainer
    n, batch, update = c.rollout.n, t.train_batch_size, t.prompts_per_update
    epoch = "unknown: data.train_files cannot be counted here"
    if plan.n_rows is not None:
        epoch = (
            f"{plan.n_rows:,} prompts = {plan.n_rows / batch:.2f} rollout batches = "
            f"{plan.n_rows / update:.2f} updates; the run is "
            f"{t.total_training_steps * batch / plan.n_rows:.2f} epochs"
        )
    return f"""\
rollout    {batch:,} prompts x {n} = {batch * n:,} responses of at most \
{c.rollout.max_response_length:,} tokens
updates    {t.updates_per_batch} per rollout batch, {update:,} prompts = {update * n:,} responses \
each; {t.total_updates:,} in {t.total_training_steps:,} steps
           {summary(c.objective, c.sampled)}
           at most {micro_batches_per_update(c)} micro-batches of \
{c.policy.row_tokens:,} tokens per data-parallel rank and update
epoch      {epoch}
"""


def _memory(plan: RunPlan) -> str:
    names = (
        "parameters", "gradients", "optimizer", "activations", "logits", "projection", "total",
    )  # fmt: skip
    text = f"memory     {'GiB per rank':<16}" + "".join(f"{name:>12}" for name in names) + "\n"
    for stage in plan.stages:
        numbers = "".join(f"{getattr(stage.memory, name) / GIB:12.2f}" for name in names)
        text += f"           {f'policy stage {stage.number}':<16}{numbers}\n"
    e = plan.engine
    text += f"""\
           computed again in the backward pass: {plan.config.policy.recompute}
           engine worker: {gib(e.reserved)} = parameters {gib(e.parameters)} + \
KV cache {gib(max(0, e.kv_cache))}: {e.kv_tokens:,} tokens, \
{e.kv_tokens // plan.longest:,} sequences of full length
           engine step: at most {plan.limits.max_num_seqs:,} sequences and \
{plan.limits.max_num_batched_tokens:,} tokens
"""
    if plan.device_bytes is None:
        total, there = gib(sum(plan.cpu_parts.values())), gib(plan.host_bytes)
        return f"{text}           all processes: {sum_of(plan.cpu_parts)} = {total} of {there}\n"
    if plan.config.trainer.placement == "colocated":
        fullest = max(plan.peaks, key=lambda gpu: sum(plan.peaks[gpu][1:]))
        states = plan.memory_by_gpu[fullest].items()
        held = ", ".join(f"{state} {gib(sum(parts))}" for state, parts in states)
        text += f"           GPU {fullest} by state: {held}\n"
    return text + _hosts(plan)


def _hosts(plan: RunPlan) -> str:
    parts = ("offloaded", "reference", "asleep", "written")
    head = "".join(f"{name:>12}" for name in (*parts, *HostMemory().states))
    text = f"hosts      {'GiB per host':<16}{head}\n"
    for host, alike in groupby(enumerate(plan.hosts), key=itemgetter(1)):
        values = (*(getattr(host, name) for name in parts), *host.states.values())
        numbers = "".join(f"{value / GIB:12.2f}" for value in values)
        name = f"host {_span([number for number, _ in alike])}"
        text += f"           {name:<16}{numbers}\n"
    return text


def _bridge(plan: RunPlan) -> str:
    f, r = plan.publish, plan.config.rollout
    item = DTYPES[r.dtype].itemsize
    ways = ", ".join(
        f"{gib(n * item)} {way} from {_FROM[distance]}" for (distance, way), n in f.by_way.items()
    )
    return f"""\
bridge     {plan.config.bridge.transport}: {gib(f.sent * item)} per publish \
(bound {gib(f.bound * item)}), {gib(f.sent * item / r.num_engines)} to each engine in \
{f.n_routes:,} rectangles
           {f.n_senders} ranks send, the most {gib(f.most_sent * item)} \
({f.most_sent / f.share:.2f} of an equal share); a worker receives at most {gib(f.received * item)}
           {ways}
"""


def _span(numbers: Sequence[int]) -> str:
    """Of ascending numbers: 0-3, 8-11."""
    gaps = [i for i, n in enumerate(numbers) if i and n != numbers[i - 1] + 1]
    runs = [numbers[i:j] for i, j in pairwise([0, *gaps, len(numbers)])]
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
