"""One rank: solve every problem in every layout of this world size and compare.

    torchrun ... -m tests.dist.layout_worker FOLDER

FOLDER/<problem>/ holds the model and reference.pt; the rank's verdicts go to
FOLDER/<layout>/<problem>/rank<r>.json.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from gpg_megatron import platform

platform.quiet_megatron()

from megatron.core import parallel_state  # noqa: E402

from gpg_megatron.batching import make_batches, pack  # noqa: E402
from gpg_megatron.bridge.families import pieces_of  # noqa: E402
from gpg_megatron.bridge.hf_io import load_hf  # noqa: E402
from gpg_megatron.bridge.layout import Shard  # noqa: E402
from gpg_megatron.hf_config import load_model_shape  # noqa: E402
from gpg_megatron.policy.policy import Policy  # noqa: E402
from gpg_megatron.types import ModelShape, TrainSample  # noqa: E402
from tests.dist.problem import (  # noqa: E402
    LAYOUTS,
    PROBLEMS,
    Layout,
    Problem,
    config_of,
    make_samples,
)
from tests.dist.reference import load_reference  # noqa: E402

COLLECTIVE_LIMIT_S = 60


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one rank saw of one problem in one layout."""

    errors: dict[str, float]
    """Largest relative error of each quantity, against the reference."""
    versions: list[int]
    """After each update."""
    updated: list[bool]
    """What each update says it did."""
    skipped_changed: list[str]
    """Shards that differ after an update without a live sample."""
    padding: float
    """Largest |gradient| or |weight| in a row that belongs to no token."""
    uncovered: list[str]
    """Tensors of the model of which all ranks together miss a part."""


def main() -> None:
    """Join the world and write the verdicts."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    platform.init_process_group("cpu", COLLECTIVE_LIMIT_S)
    for layout in LAYOUTS:
        if layout.world_size == dist.get_world_size():
            for problem in PROBLEMS:
                verdict = _solve(layout, problem, folder / problem.name)
                path = folder / layout.name / problem.name / f"rank{dist.get_rank()}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(asdict(verdict)))
                parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _solve(layout: Layout, problem: Problem, directory: Path) -> Verdict:
    """The log-probs, then every update, each compared with the reference."""
    config, shape = config_of(problem, layout, directory), load_model_shape(directory)
    policy = Policy(config, shape, device="cpu")
    at = policy.position
    load_hf(directory, policy.named_shards(), shape, at)
    policy.weights_loaded()
    reference = load_reference(directory / "reference.pt")
    samples = make_samples(problem)
    compare = Comparison(policy, shape, reference.updates[0].weights)
    errors = {"logprobs": _relative_error(_logprobs(policy, samples), reference.logprobs)}
    expected = iter(reference.updates)
    versions, updated, changed = [], [], []
    batches = make_batches(samples, config, dp_rank=at.dp_rank, dp_size=at.dp_size)
    for step, batch in enumerate(batches):
        before = {name: shard.clone() for name, shard in policy.named_shards().items()}
        result = policy.train(batch)
        versions.append(result.version)
        updated.append(result.updated)
        if not result.updated:
            shards = policy.named_shards()
            changed += [name for name in shards if not torch.equal(shards[name], before[name])]
            continue
        right = next(expected)
        errors[f"loss of update {step}"] = abs(result.loss / right.loss - 1)
        errors[f"grad_norm of update {step}"] = abs(result.grad_norm / right.grad_norm - 1)
        for name, error in compare.errors(compare.gradients(), right.grads).items():
            errors[f"gradient of {name} in update {step}"] = error
        for name, error in compare.errors(policy.named_shards(), right.weights).items():
            errors[f"{name} after update {step}"] = error
    assert next(expected, None) is None
    return Verdict(
        errors=errors,
        versions=versions,
        updated=updated,
        skipped_changed=changed,
        padding=compare.padding,
        uncovered=compare.uncovered(),
    )


def _logprobs(policy: Policy, samples: list[TrainSample]) -> torch.Tensor:
    """float64 [response tokens of all samples], in their order; three to a micro-batch."""
    chunks = [samples[i : i + 3] for i in range(0, len(samples), 3)]
    packed = [pack(chunk, [0.0] * len(chunk)) for chunk in chunks]
    return torch.cat(policy.logprobs(packed)).double()


class Comparison:
    """Holds a rank's shards against whole tensors in Hugging Face coordinates."""

    def __init__(self, policy: Policy, shape: ModelShape, like: Mapping[str, torch.Tensor]) -> None:
        self.policy = policy
        self.shape = shape
        self.padding = 0.0
        self._seen = {name: torch.zeros(whole.shape) for name, whole in like.items()}

    def gradients(self) -> dict[str, torch.Tensor]:
        """Global Megatron name -> the gradient that the last update used.

        Megatron clips in place, and clears the gradients only when the next update begins.
        """
        parameters = self.policy._ddp.module.parameters()
        names = self.policy.named_shards()
        return {n: p.main_grad for n, p in zip(names, parameters, strict=True)}

    def errors(
        self, shards: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]
    ) -> dict[str, float]:
        """Hugging Face name -> relative error of the part that this rank holds."""
        worst: dict[str, float] = {}
        at = self.policy.position
        for name, tensor in shards.items():
            padding = tensor.clone()
            shard = Shard(tuple(tensor.shape), at.tp_rank, at.tp_size)
            for piece in pieces_of(name, shard, self.shape):
                whole = right[piece.hf_name]
                gap = tensor[piece.local.slices].double() - whole[piece.hf.slices]
                error = _no_nan(gap.abs().max() / whole.abs().max())
                worst[piece.hf_name] = max(worst.get(piece.hf_name, 0.0), error)
                padding[piece.local.slices] = 0.0
                self._seen[piece.hf_name][piece.hf.slices] = 1.0
            self.padding = max(self.padding, _no_nan(padding.abs().max()))
        return worst

    def uncovered(self) -> list[str]:
        """Collective. Tensors of which all ranks together have not shown every element."""
        for seen in self._seen.values():
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return [name for name, seen in self._seen.items() if not seen.all()]


def _relative_error(value: torch.Tensor, right: torch.Tensor) -> float:
    """Largest |difference| over the largest |right value|."""
    return _no_nan((value - right).abs().max() / right.abs().max())


def _no_nan(value: torch.Tensor) -> float:
    """nan would lose every comparison, and so pass for a small error."""
    return math.inf if value.isnan() else value.item()


if __name__ == "__main__":
    main()
