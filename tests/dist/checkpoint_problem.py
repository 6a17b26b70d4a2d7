"""What the checkpoint tests and their ranks agree on: runs, where they save, what they note."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gpg_megatron.config.sections import CheckpointConfig, Config, PolicyConfig, TrainerConfig
from tests.dist.problem import PROBLEMS, Layout, Problem, config_of

N_STEPS = 4
HALF = 2

Variant = tuple[Layout, bool]
"""Layout, and whether the optimizer is distributed."""

EXACT: tuple[Variant, ...] = (
    (Layout(), False),
    (Layout(), True),
    (Layout(tp=2, pp=2), False),
    (Layout(tp=2, pp=2), True),
    (Layout(dp=2), False),
    (Layout(dp=2), True),
    (Layout(tp=2, dp=2), True),
    (Layout(dp=2, ep=2), False),
    (Layout(pp=2, vpp=2), True),
)
"""Runs that are cut in half and resumed as they were."""

CHANGED: tuple[tuple[Variant, Variant], ...] = (
    ((Layout(tp=2, pp=2), False), (Layout(), False)),
    ((Layout(tp=2, pp=2), False), (Layout(tp=2, pp=2, vpp=2), False)),
    ((Layout(pp=2, vpp=2), True), (Layout(), True)),
    ((Layout(), False), (Layout(tp=2, pp=2), False)),
    ((Layout(tp=2, dp=2), True), (Layout(), True)),
    ((Layout(), True), (Layout(tp=2, dp=2), True)),
    ((Layout(dp=2), False), (Layout(tp=4), False)),
    ((Layout(dp=2, ep=2), False), (Layout(tp=2, dp=2, ep=2), False)),
    # Whether the optimizer is distributed, and whether experts are, may change.
    ((Layout(dp=2), True), (Layout(tp=2, pp=2), False)),
    ((Layout(dp=2), False), (Layout(tp=2, dp=2), True)),
    ((Layout(dp=2, ep=2), False), (Layout(), True)),
)
"""A whole run of EXACT, and the variant that goes on from the middle of it."""

FAMILIES = tuple(
    problem
    for problem in PROBLEMS
    if problem.family in ("Glm4Moe", "DeepseekV3", "Qwen3Next", "Qwen3_5") and not problem.replayed
)
"""Problems that are cut in half and resumed as FAMILY_VARIANT has them."""
FAMILY_VARIANT: Variant = (Layout(tp=2), False)

CONVERTED = (Layout(), Layout(pp=2, vpp=2), Layout(tp=2, pp=2), Layout(pp=2, first=1), Layout(tp=4))
"""Layouts that load a checkpoint whose files were split for TP 2 and PP 2."""


def problem_of(layout: Layout) -> Problem:
    """A model with experts where they are spread, else one with biases and a tied head."""
    name = "qwen3moe-tied" if layout.ep > 1 else "qwen2-tied"
    return next(p for p in PROBLEMS if p.name == name)


def run_name(variant: Variant, suffix: str, problem: Problem | None = None) -> str:
    """For example tp2-pp2-distopt-whole; with a problem that is not the layout's own, its name."""
    layout, distributed = variant
    if problem:
        return f"{problem.name}-{run_name(variant, suffix)}"
    return f"{layout.name}{'-distopt' if distributed else ''}-{suffix}"


def changed_name(first: Variant, second: Variant) -> str:
    """Of the run that goes on under the second variant."""
    return f"{run_name(first, 'to')}-{run_name(second, 'changed')}"


def run_config(
    variant: Variant, problem: Problem, folder: Path, name: str, resume: str = "auto"
) -> Config:
    """Saves after every second step; steps are updates of the problem, over and over."""
    layout, distributed = variant
    config = config_of(problem, layout, folder / problem.name)
    policy: PolicyConfig = dataclasses.replace(
        config.policy,
        use_distributed_optimizer=distributed,
        lr_warmup_steps=3,
        lr_decay_style="cosine",
    )
    trainer: TrainerConfig = dataclasses.replace(
        config.trainer, total_training_steps=N_STEPS, output_dir=str(folder / name)
    )
    return dataclasses.replace(
        config,
        policy=policy,
        trainer=trainer,
        checkpoint=CheckpointConfig(save_freq=HALF, resume=resume),
    )
