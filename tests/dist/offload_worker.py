"""One rank: train with every part handed back between the steps, and without; compare.

    torchrun ... -m tests.dist.offload_worker FOLDER

FOLDER/<problem>/ holds the model; verdicts go to FOLDER/<case>-rank<r>.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from gpg_megatron.config.sections import Config, ModelConfig
from gpg_megatron.host import pinned
from gpg_megatron.host.device import Device, init_process_group
from gpg_megatron.policy.on_cpu import quiet_megatron
from gpg_megatron.policy.policy import Policy
from gpg_megatron.types import PolicyPart, StepResult
from tests.dist.checkpoint_problem import N_STEPS, problem_of, run_config
from tests.dist.checkpoint_run import PolicyRun
from tests.dist.problem import Layout, make_samples

PARTS: tuple[PolicyPart, ...] = ("parameters", "gradients", "optimizer")
PIECE_BYTES = 9_001
"""Of a piece of host memory: no multiple of any tensor's size, so that tensors are cut."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """How a policy is laid out."""

    layout: Layout = field(default_factory=Layout)
    distributed: bool = False
    """The optimizer."""
    dtype: Literal["fp32", "bf16"] = "fp32"

    @property
    def name(self) -> str:
        """For example tp2-pp2-distributed-bf16."""
        return f"{self.layout.name}{'-distributed' if self.distributed else ''}-{self.dtype}"


CASES = (
    Case(),
    Case(dtype="bf16"),
    Case(layout=Layout(dp=2), distributed=True),
    Case(layout=Layout(dp=2), distributed=True, dtype="bf16"),
    Case(layout=Layout(dp=2, ep=2), distributed=True),
    Case(layout=Layout(tp=2, pp=2), dtype="bf16"),
    Case(layout=Layout(tp=2, pp=2, vpp=2), distributed=True),
)


def main() -> None:
    folder = Path(sys.argv[1])
    quiet_megatron()
    init_process_group("cpu", 120)
    pinned.PIECE_BYTES = PIECE_BYTES
    for case in (case for case in CASES if case.layout.world_size == dist.get_world_size()):
        path = folder / f"{case.name}-rank{dist.get_rank()}.json"
        path.write_text(json.dumps(compare(folder, case, "cpu")))
    dist.destroy_process_group()


def compare(folder: Path, case: Case, device: Device) -> dict[str, Any]:
    """What a policy that moves does otherwise than one that stays."""
    staying, results, right = _run(folder, case, device, "staying", _save)
    parallel_state.destroy_model_parallel()
    seen: dict[str, Any] = {}
    moving, found, state = _run(folder, case, device, "moving", lambda run: _hand_over(run, seen))
    try:
        moving.policy.offload(PARTS)
        moving.policy.train(moving.batch_of(1))
        seen["refusal"] = "none"
    except AssertionError as error:
        seen["refusal"] = str(error)
    parallel_state.destroy_model_parallel()
    samples = make_samples(problem_of(case.layout))
    resumed = PolicyRun(_config(folder, case, "moving"), samples, device)
    saved = _state(resumed)
    parallel_state.destroy_model_parallel()
    return seen | {
        "results": [repr(r) for r in results] == [repr(r) for r in found],
        "end": _different(right, state),
        "resumed_at": resumed.step,
        "saved": _different(state, saved),
        "moments": sum(name.startswith("moment.") for name in right),
        "version": staying.policy.version,
    }


def _config(folder: Path, case: Case, name: str) -> Config:
    problem = problem_of(case.layout)
    config = run_config((case.layout, case.distributed), problem, folder, f"{case.name}-{name}")
    return replace(config, model=ModelConfig(path=config.model.path, dtype=case.dtype))


def _run(
    folder: Path, case: Case, device: Device, name: str, between: Callable[[PolicyRun], None]
) -> tuple[PolicyRun, list[StepResult], dict[str, torch.Tensor]]:
    """Train with `between` after every step, which also saves; the run, its results, its end."""
    run = PolicyRun(_config(folder, case, name), make_samples(problem_of(case.layout)), device)
    results = []
    while run.step < N_STEPS:
        run.step += 1
        results.append(run.policy.train(run.batch_of(run.step)))
        between(run)
    run.checkpoints.wait()
    return run, results, _state(run)


def _state(run: PolicyRun) -> dict[str, torch.Tensor]:
    """Weights, moments and what Adam updates: master weights, where there are any."""
    masters = {
        f"master.{i}": p.detach().clone()
        for i, p in enumerate(
            p
            for part in run.policy._optimizer.chained_optimizers
            for group in part.optimizer.param_groups
            for p in group["params"]
        )
    }
    return run.state() | masters


def _save(run: PolicyRun) -> None:
    run.checkpoints.save_at(run.step, run.policy, {})


def _hand_over(run: PolicyRun, seen: dict[str, Any]) -> None:
    """A round as colocated placement makes it: publish, roll out, save, roll out, train."""
    policy = run.policy
    before = {name: shard.clone() for name, shard in policy.named_shards().items()}
    aliases = policy.named_shards()  # as the bridge holds them
    resident = _bytes_by_part(policy)
    with _allocations() as pieces:
        policy.offload(("gradients", "optimizer"))
    published = _different(before, aliases)
    policy.offload(("parameters",))
    left = _bytes_by_part(policy)
    if run.checkpoints.saves_at(run.step, leaves=False):
        policy.load(("parameters", "optimizer"))
        _save(run)
        policy.offload(("parameters", "optimizer"))
    policy.load(PARTS)
    seen.setdefault("published", []).extend(published)
    seen.setdefault("changed_by_moving", []).extend(_different(before, aliases))
    seen["resident"], seen["left"], seen["pieces"] = resident, left, pieces
    gradients = [p.main_grad for m in policy._models for p in m.parameters()]
    seen["gradients_left"] = any(bool(gradient.any()) for gradient in gradients)


@contextmanager
def _allocations() -> Iterator[list[int]]:
    """Sizes of the pieces of host memory that are allocated meanwhile."""
    sizes: list[int] = []
    allocate = pinned.host_piece

    def noted(n_bytes: int, device: Device) -> torch.Tensor:
        sizes.append(n_bytes)
        return allocate(n_bytes, device)

    pinned.host_piece = noted
    try:
        yield sizes
    finally:
        pinned.host_piece = allocate


def _bytes_by_part(policy: Policy) -> dict[str, int]:
    """Bytes of the storages that the tensors of each part lie in, found by walking Megatron's own
    objects."""
    of_model = [p for model in policy._models for p in model.parameters()]
    buffers = [b for ddp in policy._chunks for b in (*ddp.buffers, *ddp.expert_parallel_buffers)]
    buckets = [bucket for buffer in buffers for bucket in buffer.buckets]
    parameters = [*of_model, *(b.param_data for b in buffers)]
    gradients = [p.main_grad for p in of_model]
    gradients += [b.grad_data for b in (*buffers, *buckets)]
    return {
        "parameters": _n_bytes(p for p in parameters if p is not None),
        "gradients": _n_bytes(gradients),
        "optimizer": _n_bytes(_moments_and_masters(policy)),
    }


def _moments_and_masters(policy: Policy) -> Iterator[torch.Tensor]:
    models = {p.untyped_storage()._cdata for m in policy._models for p in m.parameters()}
    for part in policy._optimizer.chained_optimizers:
        for group in part.optimizer.param_groups if part.optimizer else ():
            for p in group["params"]:
                if p.untyped_storage()._cdata not in models:
                    yield p
                state = part.optimizer.state[p]
                yield from (state[key] for key in ("exp_avg", "exp_avg_sq") if key in state)


def _n_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _different(right: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names that are not the same, bit by bit."""
    if right.keys() != found.keys():
        return sorted(right.keys() ^ found.keys())
    return [name for name in right if not torch.equal(right[name], found[name])]


if __name__ == "__main__":
    main()
