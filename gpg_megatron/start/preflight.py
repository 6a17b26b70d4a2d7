"""Everything that is known about a run before it starts: said here, or by gpg-train --check."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass

from gpg_megatron.checkpoint.resume import ResumePoint, find_resume_point
from gpg_megatron.config.sections import Config
from gpg_megatron.errors import UserError
from gpg_megatron.host.leaving import forget_request
from gpg_megatron.host.reaper import new_run_id
from gpg_megatron.loop.inputs import Inputs, check_model, check_output, load_inputs
from gpg_megatron.reward.sources import scorer_name
from gpg_megatron.shapes import ModelShape
from gpg_megatron.start.room import check_room, check_scratch, room_here


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """What was found."""

    shape: ModelShape
    inputs: Inputs
    point: ResumePoint | None
    """None: the run begins at the beginning."""


def check_devices(config: Config, n_ranks: int) -> None:
    """A policy rank of this host takes the device of its local number. Raises UserError."""
    import torch

    from gpg_megatron.host.device import resolve_device

    if resolve_device(config.trainer.device) != "cuda":
        return
    if (count := torch.cuda.device_count()) < n_ranks:
        raise UserError(
            f"this host is to run {n_ranks} policy ranks, and torch sees {count} CUDA devices; "
            "expected one for each (in a SLURM job: one task on each node, with all of its GPUs)"
        )


def preflight(config: Config, n_ranks: int) -> Preflight:
    """All checks, the quick ones first; warnings are printed. Nothing is started, but for a
    scoring process that tries a custom reward function.

    Args:
        n_ranks: policy ranks of this host.

    Raises:
        UserError
    """
    from gpg_megatron.host.device import resolve_device

    check_output(config)
    check_scratch(new_run_id())
    shape = check_model(config)
    on_cpu = resolve_device(config.trainer.device) == "cpu"
    check_room(config, shape, room_here(config), n_ranks=n_ranks, on_cpu=on_cpu)
    inputs = load_inputs(config, shape)
    point, _ = find_resume_point(config, shape)  # the rank that resumes warns
    for line in inputs.warnings:
        print(f"warning: {line}", file=sys.stderr)
    return Preflight(shape=shape, inputs=inputs, point=point)


def may_start(config: Config, n_ranks: int, *, attempt: int) -> bool:
    """preflight, and whether there is something to do. Who asked an earlier run of the directory to
    leave did not mean this one; who asks between two attempts does. Raises UserError."""
    found = preflight(config, n_ranks)
    if not attempt:
        forget_request(config.trainer.output_dir)
    return has_work(config, found)


def has_work(config: Config, found: Preflight) -> bool:
    """False, and a line, when the run has come to its end already."""
    total, point = config.trainer.total_training_steps, found.point
    if point is None or point.marker.step < total:
        return True
    print(f"nothing to do: {point.directory} has trainer.total_training_steps={total} behind it")
    return False


def summary(config: Config, found: Preflight) -> list[str]:
    """What gpg-train --check prints."""
    inputs, point = found.inputs, found.point
    prompts = (*inputs.train_prompts, *inputs.val_prompts)
    scorers = Counter(scorer_name(p.data_source, config.reward) for p in prompts)
    longest = max(len(p.token_ids) for p in prompts)
    begin = "the beginning"
    if point is not None:
        begin = f"step {point.marker.step}, {point.directory}"
    return [
        f"model      {found.shape.architecture}, {found.shape.num_layers} layers, vocabulary of "
        f"{found.shape.vocab_size:,}",
        f"prompts    {len(inputs.train_prompts):,} to train on, {len(inputs.val_prompts):,} held "
        f"out, {inputs.n_filtered:,} too long; the longest has {longest:,} tokens",
        f"scorers    {', '.join(f'{name} {n:,}' for name, n in sorted(scorers.items()))}",
        f"goes from  {begin} to step {config.trainer.total_training_steps}",
        "checked    nothing is known that would keep the run from starting",
    ]
