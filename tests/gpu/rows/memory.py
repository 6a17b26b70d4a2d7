"""What a policy step takes on the device, against the dry run; and what offloading gives back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpg_megatron.config.sections import GIB
from gpg_megatron.host.device import Device
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.placement.memory import policy_memory
from tests.dist.checkpoint_problem import problem_of
from tests.dist.offload_worker import PARTS, Case, _bytes_by_part, compare
from tests.dist.problem import make_model
from tests.gpu.rows.device import seconds
from tests.gpu.rows.sized import forget_policy, sized_policy
from tests.gpu.rows.world import one_rank

WITHIN = (0.75, 1.1)
"""The allocator's peak in units of the dry run's sum."""


def peak(device: Device, folder: Path) -> str:
    """The allocator's peak of an update against the dry run's sum."""
    told, wrong = [], []
    with one_rank(device):
        for mode in ("none", "layers"):
            policy, batch, config = sized_policy(device, folder, recompute=mode)
            assert policy.train(batch).updated  # Adam makes its moments
            n = sum(shard.numel() for shard in policy.named_shards().values())
            shape = load_model_shape(folder, need_weights=False)
            expected = policy_memory(config, shape, n_parameters=n, stage=0, fused=True)
            torch.cuda.reset_peak_memory_stats()
            backward = _peak_before(policy._optimizer, partial(policy.train, batch))
            whole = torch.cuda.max_memory_allocated()
            ratio = whole / expected.total
            told.append(
                f"recompute {mode}: {backward / GIB:.2f} GiB until the gradient is there, "
                f"{whole / GIB:.2f} with Adam's step, dry run {expected.total / GIB:.2f} "
                f"({ratio:.2f})"
            )
            wrong += [ratio] if not WITHIN[0] <= ratio <= WITHIN[1] else []
            del policy, batch
            forget_policy()
    assert not wrong, "; ".join(told)
    return "; ".join(told)


def _peak_before(optimizer: Any, train: Callable[[], object]) -> int:
    """Train once; the allocator's peak when the optimizer begins its step."""
    step, peaks = optimizer.step, []

    def noted() -> Any:
        peaks.append(torch.cuda.max_memory_allocated())
        return step()

    optimizer.step = noted
    train()
    optimizer.step = step
    return int(peaks[0])


def offload(device: Device, folder: Path) -> str:
    """The parts of a policy to the host and back; then a whole run that moves every step."""
    with one_rank(device):
        told = _there_and_back(device, folder)
        forget_policy()
        problem = problem_of(Case().layout)
        make_model(problem, folder / problem.name)
        verdict = compare(folder, Case(dtype="bf16"), device)
    wrong = {k: verdict[k] for k in ("end", "published", "changed_by_moving") if verdict[k]}
    assert not wrong and verdict["results"], f"a run that moves is another one: {wrong}"
    return f"{told}; a run that moves in every step is that of one that stays, bit by bit"


def _there_and_back(device: Device, folder: Path) -> str:
    """Twice; the first time includes pinning."""
    policy, batch, _ = sized_policy(device, folder)
    assert policy.train(batch).updated
    before = {name: shard.cpu() for name, shard in policy.named_shards().items()}
    held = _bytes_by_part(policy)
    n_bytes, kept = sum(held.values()), held["parameters"] + held["optimizer"]
    taken = _taken(device)
    took = [seconds(lambda: policy.offload(PARTS), device)]
    given, left = taken - _taken(device), sum(_bytes_by_part(policy).values())
    took.append(seconds(lambda: policy.load(PARTS), device))
    took.append(seconds(lambda: policy.offload(PARTS), device))
    pinned = _pinned(device, kept)
    took.append(seconds(lambda: policy.load(PARTS), device))
    after = policy.named_shards()
    changed = [name for name, shard in before.items() if not torch.equal(shard, after[name].cpu())]
    assert not changed and not left, f"{changed[:3]} changed, {left} bytes left"
    rates = [f"{kept / 1e9 / s:.2g}" for s in took]
    told = f"out {rates[0]}, back {rates[1]}, again {rates[2]} and {rates[3]} GB/s"
    if device == "cpu":
        return told
    assert given > 0.95 * n_bytes, f"{given} of {n_bytes} bytes were given back"
    return f"{given / GIB:.2f} of {n_bytes / GIB:.2f} GiB given back; {pinned}; {told}"


def _taken(device: Device) -> int:
    """Bytes of the GPU that others cannot have and that this process uses; on the CPU nothing is
    known of that."""
    if device == "cpu":
        return 0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def _pinned(device: Device, kept: int) -> str:
    """What of the host is pinned, for so many bytes."""
    if device == "cpu":
        return ""
    total = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    assert total < 1.1 * kept + GIB, f"{total} bytes are pinned for {kept}"
    return f"{total / GIB:.2f} GiB pinned for {kept / GIB:.2f}"
