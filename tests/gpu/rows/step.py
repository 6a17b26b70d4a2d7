"""Policy steps: against transformers in float64, in bf16, with recomputation, on two ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from gpg_megatron.batching.updates import split_updates
from gpg_megatron.host.device import Device
from tests.dist.bf16_worker import train
from tests.dist.layout_worker import solve
from tests.dist.problem import (
    N_UPDATES,
    PROBLEMS,
    Layout,
    Problem,
    config_of,
    make_model,
    make_samples,
    problems_of,
    reference_name,
)
from tests.dist.ranks import run_ranks
from tests.dist.reference import make_reference, save_reference
from tests.gpu.rows.sized import forget_policy, sized_policy
from tests.gpu.rows.world import one_rank

TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}
"""Largest relative difference in fp32, of log-probs, losses, norms, gradients and weights."""

ON_TWO_RANKS = ("qwen2-untied", "qwen3-tied", "qwen3moe-tied")
"""Sequence parallelism and overlapped sums; a distributed optimizer and a tied head; experts."""


def fp32(device: Device, folder: Path) -> str:
    """The updates of every test problem on one rank."""
    verdicts = {}
    with one_rank(device):
        for problem in problems_of(Layout()):
            write_problem(problem, Layout(), folder / problem.name)
            verdict = solve(Layout(), problem, folder / problem.name, device)
            parallel_state.destroy_model_parallel()
            verdicts[problem.name] = asdict(verdict)
    return judged(verdicts, device)


def two_ranks(layout: Layout, device: Device, folder: Path) -> str:
    """The same on two ranks, each with a device of its own."""
    problems = [problem for problem in problems_of(layout) if problem.name in ON_TWO_RANKS]
    for problem in problems:
        write_problem(problem, layout, folder / problem.name)
    worker = "tests.dist.layout_worker"
    said = run_ranks(folder, worker, layout.world_size, device, layout.name, device=device)
    print(said)
    verdicts = {}
    for problem in problems:
        for rank in range(layout.world_size):
            path = folder / layout.name / problem.name / f"rank{rank}.json"
            assert path.exists(), f"{path.name} of {problem.name} is missing; see the log"
            verdicts[f"{problem.name} on rank {rank}"] = json.loads(path.read_text())
    return judged(verdicts, device)


def tp2(device: Device, folder: Path) -> str:
    """Tensor parallelism."""
    return two_ranks(Layout(tp=2), device, folder)


def pp2(device: Device, folder: Path) -> str:
    """Pipeline parallelism."""
    return two_ranks(Layout(pp=2), device, folder)


def vpp2(device: Device, folder: Path) -> str:
    """Interleaved pipeline stages."""
    return two_ranks(Layout(pp=2, vpp=2), device, folder)


def dp2(device: Device, folder: Path) -> str:
    """Data parallelism."""
    return two_ranks(Layout(dp=2), device, folder)


def write_problem(problem: Problem, layout: Layout, directory: Path) -> None:
    """The model, and what a layout has to compute, by transformers on the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nothing here is large enough to share
    make_model(problem, directory)
    updates = split_updates(make_samples(problem), N_UPDATES)
    reference = make_reference(config_of(problem, layout, directory), updates)
    save_reference(reference, directory / reference_name(problem, layout))
    torch.set_num_threads(threads)


def judged(verdicts: Mapping[str, Mapping[str, Any]], device: Device) -> str:
    """The largest error of all; raises where one is too large."""
    errors = {f"{name}: {k}": e for name, v in verdicts.items() for k, e in v["errors"].items()}
    where = max(errors, key=lambda key: errors[key])
    limit = TOLERANCE[device]
    assert errors[where] <= limit, f"relative error {errors[where]:.1e} in {where}"
    for name, verdict in verdicts.items():
        wrong = [key for key in ("changed_by_skipping", "changed_by_bad") if verdict[key]]
        assert not wrong and not verdict["padding"], f"{name}: {wrong}, {verdict['padding']}"
    number = f"{len(errors)} numbers and tensors of {len(verdicts)} runs"
    return f"{number}, largest relative error {errors[where]:.1e} ({where}), limit {limit:.0e}"


def bf16(device: Device, folder: Path) -> str:
    """Sixteen small updates."""
    return _bf16(device, folder, "plain")


def sharded_optimizer(device: Device, folder: Path) -> str:
    """The same with the distributed optimizer, of one rank."""
    return _bf16(device, folder, "distributed")


def _bf16(device: Device, folder: Path, optimizer: str) -> str:
    make_model(PROBLEMS[0], folder / "model")
    with one_rank(device):
        seen: dict[str, Any] = train(folder / "model", optimizer, Layout(), device)
    assert seen["gradient dtypes"] == ["torch.float32"], seen
    assert seen["weight dtypes"] == ["torch.bfloat16"], seen
    assert seen.get("master dtypes", ["torch.float32"]) == ["torch.float32"], seen
    assert not seen.get("weights that are not the rounded master"), seen
    assert seen["cosine"] > 0.99 and seen["moved"] > 0.5, seen
    return (
        f"gradients in fp32, cosine with those of fp32 {seen['cosine']:.5f}; steps of "
        f"{seen['step in units of the last place']:.2f} of the last place moved "
        f"{seen['moved']:.0%} of the weights"
    )


def recompute(device: Device, folder: Path) -> str:
    """The gradient of one update when activations are kept and when they are computed again."""
    kept, told = torch.empty(0), []
    with one_rank(device):
        for mode in ("none", "attention", "layers"):
            policy, batch, _ = sized_policy(device, folder, recompute=mode)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            assert policy.train(batch).updated
            parameters = policy._models[0].parameters()
            gradient = torch.cat([p.main_grad.flatten().cpu() for p in parameters])
            kept = gradient if mode == "none" else kept
            gap = float((gradient - kept).norm() / kept.norm())
            assert gap < 1e-2 and math.isfinite(gap), f"{mode}: another gradient, {gap:.1e}"
            told.append(f"{mode} {_peak(device)}difference {gap:.1e}")
            del policy, batch, parameters
            forget_policy()
    return "; ".join(told)


def _peak(device: Device) -> str:
    if device == "cpu":
        return ""
    return f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB, "
