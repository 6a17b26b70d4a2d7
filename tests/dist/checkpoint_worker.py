"""One rank: the checkpoint tests of this world size; verdicts go to FOLDER/verdicts/.

torchrun ... -m tests.dist.checkpoint_worker FOLDER first|changed|family [PROBLEM]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from gpg_megatron.host.device import Device, init_process_group
from gpg_megatron.layout.hf_io import load_hf
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.policy.on_cpu import quiet_megatron
from gpg_megatron.policy.policy import Policy
from tests.dist.checkpoint_problem import (
    CHANGED,
    CONVERTED,
    EXACT,
    FAMILIES,
    FAMILY_VARIANT,
    HALF,
    N_STEPS,
    Variant,
    changed_name,
    problem_of,
    run_config,
    run_name,
)
from tests.dist.checkpoint_run import PolicyRun
from tests.dist.problem import Layout, Problem, config_of, make_samples


def main() -> None:
    folder = Path(sys.argv[1])
    quiet_megatron()
    # As on a machine with a GPU: what counts is the policy's device.
    torch.cuda.is_available = lambda: True
    init_process_group("cpu", 120)
    size = dist.get_world_size()
    if sys.argv[2] == "first":
        for variant in EXACT:
            if variant[0].world_size == size:
                verdict = exact(folder, variant, "cpu")
                _write(folder, run_name(variant, "exact"), verdict)
        for layout in CONVERTED:
            if layout.world_size == size:
                _converted(folder, layout)
    elif sys.argv[2] == "family":
        problem = next(x for x in FAMILIES if x.name == sys.argv[3])
        verdict = exact(folder, FAMILY_VARIANT, "cpu", problem)
        _write(folder, run_name(FAMILY_VARIANT, "exact", problem), verdict)
    else:
        for first, second in CHANGED:
            if second[0].world_size == size:
                _changed(folder, first, second)
    dist.destroy_process_group()


def exact(
    folder: Path, variant: Variant, device: Device, other: Problem | None = None
) -> dict[str, Any]:
    """2N steps without a break, against N, a resume, and N more.

    other: in place of the layout's own problem.
    """
    problem = other or problem_of(variant[0])
    samples = make_samples(problem)

    def run(name: str, to_step: int) -> tuple[list[Any], list[Any], dict[str, Any], dict[str, Any]]:
        config = run_config(variant, problem, folder, run_name(variant, name, other))
        torch.manual_seed(3)
        run = PolicyRun(config, samples, device)
        begin = run.state() if run.step else {}
        draws = []
        results = run.advance(to_step, lambda _: draws.append(torch.rand(1).item()))
        run.checkpoints.wait()
        end = run.state()
        parallel_state.destroy_model_parallel()
        return results, draws, begin, end

    right, right_draws, _, whole = run("whole", N_STEPS)
    _, _, _, saved = run("cut", HALF)
    found, draws, begin, resumed = run("cut", N_STEPS)
    return {
        "resumed_at": N_STEPS - len(found),
        "restored": _different(saved, begin),
        "end": _different(whole, resumed),
        "results": [repr(r) for r in found] == [repr(r) for r in right[HALF:]],
        "draws": draws == right_draws[HALF:],
        "moments": sum(name.startswith("moment.") for name in begin),
        "version": found[-1].version,
        "second_half": _numbers(right[HALF:]),
    }


def _converted(folder: Path, layout: Layout) -> None:
    """The shards from a converted checkpoint against those from the Hugging Face files."""
    for problem in (problem_of(Layout()), problem_of(Layout(dp=2, ep=2))):
        directory = folder / problem.name
        shape = load_model_shape(directory)
        policy = Policy(config_of(problem, layout, directory), shape, "cpu")
        load_hf(directory, policy.named_shards(), shape, policy.position)
        right = {name: t.clone() for name, t in policy.named_shards().items()}
        for tensor in policy.named_shards().values():
            tensor.fill_(7.0)
        policy.load_weights(folder / f"{problem.name}-converted")
        verdict = {"different": _different(right, policy.named_shards()), "tensors": len(right)}
        _write(folder, f"{layout.name}-{problem.name}-converted", verdict)
        parallel_state.destroy_model_parallel()


def _changed(folder: Path, first: Variant, second: Variant) -> None:
    """Go on from the middle of a whole run, under another layout."""
    problem = problem_of(first[0])
    name = changed_name(first, second)
    middle = folder / run_name(first, "whole") / "checkpoints" / f"step_{HALF}"
    config = run_config(second, problem, folder, name, resume=str(middle))
    run = PolicyRun(config, make_samples(problem))
    begin = run.step
    results = run.advance(N_STEPS)
    run.checkpoints.wait()
    parallel_state.destroy_model_parallel()
    _write(folder, name, {"resumed_at": begin, "results": _numbers(results)})


def _numbers(results: list[Any]) -> list[list[float]]:
    return [[r.version, r.loss, r.grad_norm, r.lr] for r in results]


def _different(right: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names that are not the same, bit by bit."""
    if right.keys() != found.keys():
        return sorted(right.keys() ^ found.keys())
    return [name for name in right if not torch.equal(right[name], found[name])]


def _write(folder: Path, name: str, verdict: dict[str, Any]) -> None:
    path = folder / "verdicts" / f"{name}-rank{dist.get_rank()}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(verdict))


if __name__ == "__main__":
    main()
