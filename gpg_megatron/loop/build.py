"""Makes the parts of a run, and ends them with it.

policy, weights -> engines ready, scorers, logs -> bridge
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist

from gpg_megatron.batching.updates import BatchPlan
from gpg_megatron.bridge.bridge import PolicySide, WeightBridge
from gpg_megatron.checkpoint.marker import read_marker
from gpg_megatron.checkpoint.resume import ResumePoint, find_resume_point
from gpg_megatron.config.loading import config_yaml
from gpg_megatron.config.sections import Config
from gpg_megatron.data.curriculum import open_stream
from gpg_megatron.host.beats import Beats
from gpg_megatron.host.collectives import OnRank0, broadcast, kept_on_rank0, on_rank0
from gpg_megatron.host.device import Device
from gpg_megatron.host.leaving import LeaveRequest
from gpg_megatron.host.peak import peak_flops_per_s
from gpg_megatron.host.words import end_with_words
from gpg_megatron.layout.hf_io import load_hf
from gpg_megatron.layout.topology import policy_grid
from gpg_megatron.loop.checkpoints import (
    RunCheckpoints,
    check_bytes,
    layout_of,
    saving_of,
)
from gpg_megatron.loop.collector import Collector, rules_of
from gpg_megatron.loop.engines import make_room
from gpg_megatron.loop.generating import Generating
from gpg_megatron.loop.guard import Guard
from gpg_megatron.loop.handover import Handover
from gpg_megatron.loop.inputs import is_converted, load_inputs
from gpg_megatron.loop.rank0 import Rank0
from gpg_megatron.loop.rollouts import Rollouts
from gpg_megatron.loop.state import read_state
from gpg_megatron.loop.trainer import Run, Schedule
from gpg_megatron.model.flops import token_costs
from gpg_megatron.model.hub import local_directory
from gpg_megatron.observe.gpus import GpuWatch
from gpg_megatron.observe.loggers import RunLogger
from gpg_megatron.observe.progress import Progress
from gpg_megatron.observe.trace import trace_of
from gpg_megatron.observe.watchdog import Watchdog
from gpg_megatron.placement.states import Placement, State
from gpg_megatron.policy.policy import Policy
from gpg_megatron.policy.transformer_engine import has_transformer_engine
from gpg_megatron.reward.pool import RewardPool
from gpg_megatron.rollout.fleet import Fleet
from gpg_megatron.shapes import ModelShape
from gpg_megatron.types import DTYPES

Part = TypeVar("Part", RewardPool, RunLogger, Progress, GpuWatch)
WATCHDOG_LIMIT_S = 300.0


@contextmanager
def build_run(
    config: Config, shape: ModelShape, device: Device, run_id: str, fleet: Fleet | None
) -> Iterator[Run]:
    """A run's parts on this rank; all of them end with the context. Collective.

    Args:
        fleet: on rank 0, the engines, which are starting.
    """
    group = dist.new_group(timeout=_rank0_limit(config), backend="gloo")
    ask_rank0: OnRank0 = partial(on_rank0, group=group)
    with ExitStack() as ends:
        watchdog = ends.enter_context(closing(_watchdog(config.policy.timeout_s)))
        ask_rank0(lambda: make_room(config, fleet, device) if fleet else None)
        handover = Handover(fleet, lambda: policy, ask_rank0, group, watchdog)
        placement = Placement(config.trainer.placement, handover)
        placement.enter(State.POLICY)
        policy = Policy(config, shape, device)
        point = ask_rank0(lambda: _resume_point(config, shape))
        load_policy(policy, config, shape, point)
        pids = _pids()
        rank0 = kept_on_rank0(
            lambda: open_rank0(config, shape, device, fleet, pids, ends), ask_rank0
        )
        # While the engines have nothing to do: they would take the cores that are measured.
        peak = _peak_of_all_ranks(device, DTYPES[config.model.dtype])
        if rank0 is not None:
            rank0.message(f"policy and engines ready in {_seconds_of_this_process():.0f} s")
            rank0.say_what_was_decided()
        generating = Generating(fleet, ask_rank0)
        rollouts = open_rollouts(config, rank0, watchdog, generating, group, point)
        placement.enter(State.SYNC)
        bridge = _open_bridge(config, shape, policy, fleet, run_id, group)
        yield Run(
            schedule=_schedule(config, point),
            algorithm=config.algorithm,
            plan=_batch_plan(config, shape, policy),
            policy=policy,
            placement=placement,
            bridge=ends.enter_context(closing(bridge)),
            rollouts=rollouts,
            checkpoints=RunCheckpoints(saving_of(config, shape), ask_rank0, rollouts.state),
            guard=_guard(config, rank0),
            watchdog=watchdog,
            on_rank0=ask_rank0,
            generating=generating,
            rank0=rank0,
            peak_flops_per_s=peak,
            trace=trace_of(config.trainer, dist.get_rank()),
            stop_on=config.trainer.stop_on,
            asked_to_leave=LeaveRequest(config.trainer.output_dir, config.trainer.max_hours),
        )


# ---- policy ---------------------------------------------------------------------------------


def _resume_point(config: Config, shape: ModelShape) -> ResumePoint | None:
    point, warnings = find_resume_point(config, shape)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return point


def load_policy(
    policy: Policy, config: Config, shape: ModelShape, point: ResumePoint | None
) -> None:
    """The weights of model.path; a run that is resumed goes on with its checkpoint's."""
    needs_reference = config.algorithm.kl_coef > 0.0
    if point is None or needs_reference:
        _load_model(policy, config, shape)
    if needs_reference:
        policy.keep_reference()
    if point is not None:
        check_bytes(point.directory, point.marker)
        same = point.marker.layout == layout_of(config.policy)
        policy.resume(point.directory, version=point.marker.version, same_ranks=same)


def _load_model(policy: Policy, config: Config, shape: ModelShape) -> None:
    """From a converted model, or from Hugging Face files."""
    path = local_directory(config.model)
    if is_converted(config):
        check_bytes(path, read_marker(path))
        policy.load_weights(path)
    else:
        load_hf(path, policy.named_shards(), shape, policy.position)
        policy.weights_loaded()


def _open_bridge(
    config: Config,
    shape: ModelShape,
    policy: Policy,
    fleet: Fleet | None,
    run_id: str,
    group: dist.ProcessGroup,
) -> WeightBridge:
    side = PolicySide(
        shards=policy.named_shards(),
        model=shape,
        grid=policy_grid(config.policy, shape, transformer_engine=has_transformer_engine()),
        rank=policy.position.rank,
    )
    dtype = DTYPES[config.rollout.dtype]
    return WeightBridge(side, fleet, config.bridge, wire_dtype=dtype, run_id=run_id, group=group)


# ---- rank 0 ---------------------------------------------------------------------------------


def open_rank0(
    config: Config,
    shape: ModelShape,
    device: Device,
    fleet: Fleet | None,
    pids: Sequence[int],
    ends: ExitStack,
) -> Rank0:
    """Returns when the engines are ready. ends: closes what is opened."""
    assert fleet is not None

    def opened(part: Part) -> Part:
        return ends.enter_context(closing(part))

    inputs = load_inputs(config, shape)
    fleet.wait_ready()
    longest, t = config.rollout.max_response_length, config.trainer
    return Rank0(
        config=config,
        inputs=inputs,
        fleet=fleet,
        pool=opened(RewardPool(config.reward, max_response_length=longest)),
        logger=opened(RunLogger(t.output_dir, config.logging, config_yaml(config))),
        progress=opened(Progress(t.total_training_steps)),
        pids=pids,
        gpu_metrics=opened(GpuWatch()).take if device == "cuda" else dict,
    )


def open_rollouts(
    config: Config,
    rank0: Rank0 | None,
    watchdog: Watchdog,
    ask_rank0: OnRank0,
    group: dist.ProcessGroup,
    point: ResumePoint | None,
) -> Rollouts:
    """The batches of the run, from where the resume point left them."""

    def open_collector() -> Collector:
        assert rank0 is not None
        stream = open_stream(
            rank0.inputs.train_prompts,
            per_file=rank0.inputs.per_file,
            weights=config.data.train_weights,
            seed=config.trainer.seed,
            shuffle=config.data.shuffle,
            curriculum=config.data.curriculum,
            group_size=config.rollout.n,
        )
        rules, flights = rules_of(config, rank0.fleet.room), rank0.fleet.flights()
        collector = Collector(config, rules, stream, flights, rank0.pool, watchdog)
        if point is not None:
            by_id = {prompt.id: prompt for prompt in rank0.inputs.train_prompts}
            collector.restore(read_state(point.directory, point.marker.step), by_id)
            rank0.message(f"resumed from {point.directory}")
        return collector

    collector = kept_on_rank0(open_collector, ask_rank0)
    ahead = config.trainer.max_staleness > 0
    return Rollouts(
        collector,
        ask_rank0,
        partial(broadcast, group=group),
        watchdog,
        ahead=ahead,
        stops=config.validation.alone,
    )


def _watchdog(silent_s: float) -> Watchdog:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return Watchdog(
        rank=rank,
        limit_s=WATCHDOG_LIMIT_S,
        ranks=Beats(rank, world_size) if world_size > 1 else None,
        silent_s=silent_s,
        give_up=end_with_words,
    )


def _pids() -> list[int]:
    """Of the other ranks. Collective."""
    pids: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    return pids[1:]


# ---- plain values ---------------------------------------------------------------------------


def _seconds_of_this_process() -> float:
    began: float = psutil.Process().create_time()
    return time.time() - began


def _rank0_limit(config: Config) -> timedelta:
    """Longer than anything that rank 0 does alone may take; its own limits come first."""
    r = config.rollout
    draws = 1 + config.algorithm.max_redraws
    seconds = r.startup_timeout_s + 2 * draws * r.generate_timeout_s
    return timedelta(seconds=seconds + draws * config.reward.outage_limit_s)


def _peak_of_all_ranks(device: Device, dtype: torch.dtype) -> float:
    """Collective. Operations per second that all policy ranks together could do at best; they
    measure at once, because those of one host share its cores."""
    dist.all_reduce(torch.zeros(1))  # waits for all; a barrier would use the GPU
    total = torch.tensor(peak_flops_per_s(device, dtype), dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def _schedule(config: Config, point: ResumePoint | None) -> Schedule:
    t = config.trainer
    return Schedule(
        done=point.marker.step if point else 0,
        last=t.total_training_steps,
        evaluate_first=config.validation.before_train,
        evaluate_every=t.test_freq,
    )


def _batch_plan(config: Config, shape: ModelShape, policy: Policy) -> BatchPlan:
    at, p = policy.position, config.policy
    return BatchPlan(
        algorithm=config.algorithm,
        n_updates=config.trainer.updates_per_batch,
        max_tokens=p.row_tokens,
        max_response_length=config.rollout.max_response_length,
        dp_rank=at.dp_rank,
        dp_size=at.dp_size,
        costs=token_costs(shape),
        share_prompts=p.share_prompts,
    )


def _guard(config: Config, rank0: Rank0 | None) -> Guard:
    coarser = "bf16" if "bf16" in (config.model.dtype, config.rollout.dtype) else "fp32"
    return Guard(
        tolerance=config.bridge.canary_tolerance,
        coarser=DTYPES[coarser],
        # With top_p or top_k the engine's log-probs are those of a cut distribution.
        judges_rollouts=not config.rollout.truncates,
        draws_ahead=config.trainer.max_staleness > 0,
        max_bad_steps=config.trainer.max_bad_steps,
        samples_file=Path(config.trainer.output_dir) / "bad_samples.jsonl",
        say=rank0.message if rank0 is not None else lambda text: None,
        is_rank0=rank0 is not None,
    )
