"""One rank: solve the problems in every layout of this world size and compare.

    torchrun ... -m tests.dist.layout_worker FOLDER cpu|cuda [LAYOUT]

FOLDER/<problem>/ holds the model and reference.pt; the rank's verdicts go to
FOLDER/<layout>/<problem>/rank<r>.json. LAYOUT: this one only, with the problems of which there is a
model.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from gpg_megatron.batching.updates import make_batches, pack
from gpg_megatron.checkpoint.stored_layout import stored_parameters
from gpg_megatron.config.sections import Config
from gpg_megatron.host.device import Device, init_process_group
from gpg_megatron.layout.boxes import Shard
from gpg_megatron.layout.families import pieces_of
from gpg_megatron.layout.hf_io import load_hf
from gpg_megatron.layout.topology import check_shards, policy_grid
from gpg_megatron.model.flops import token_costs
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.policy.policy import Policy
from gpg_megatron.policy.shards import parameter_regions
from gpg_megatron.shapes import ModelShape
from gpg_megatron.types import StepResult, TrainBatch, TrainSample
from tests.dist.problem import (
    LAYOUTS,
    PROBLEMS,
    Layout,
    Problem,
    config_of,
    make_samples,
    plan_of,
    problems_of,
    reference_name,
)
from tests.dist.reference import Update, load_reference

COLLECTIVE_LIMIT_S = 120
SAMPLES_PER_PACK = 10
LOGITS_CHUNK_BYTES = 6000


@dataclass(kw_only=True)
class Verdict:
    """What one rank saw of one problem in one layout."""

    layers: int
    """Layers that this rank holds."""
    stored_otherwise: list[str]
    """Shards whose key or extent in a checkpoint is not what conversion writes."""
    errors: dict[str, float]
    """Largest relative error of each quantity, against the reference."""
    versions: list[int] = field(default_factory=list)
    """After each update."""
    updated: list[bool] = field(default_factory=list)
    """What each update says it did."""
    changed_by_skipping: list[str] = field(default_factory=list)
    """Shards that differ after an update that says it did nothing."""
    changed_by_looking: list[str] = field(default_factory=list)
    """Shards that differ after the log-probs that the updates are held against were computed."""
    changed_by_bad: list[str] = field(default_factory=list)
    """What an update with a loss that is no number changed, before the others."""
    changed_by_held: list[str] = field(default_factory=list)
    """The same of two updates of answers that the policy has left behind."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    """Of each update."""
    padding: float = 0.0
    """Largest |gradient| or |weight| in a row that belongs to no token."""
    uncovered: list[str] = field(default_factory=list)
    """Tensors of the model of which all ranks together miss a part."""


def main() -> None:
    """Join the world and write the verdicts."""
    folder, device = Path(sys.argv[1]), cast(Device, sys.argv[2])
    init_process_group(device, COLLECTIVE_LIMIT_S)
    for layout in (x for x in LAYOUTS if x.world_size == dist.get_world_size()):
        problems = problems_of(layout)
        if only := sys.argv[3:]:
            models = [p for p in PROBLEMS if (folder / p.name / reference_name(p, layout)).exists()]
            problems = models if layout.name in only else []
        for problem in problems:
            verdict = solve(layout, problem, folder / problem.name, device)
            parallel_state.destroy_model_parallel()
            path = folder / layout.name / problem.name / f"rank{dist.get_rank()}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(verdict)))
    dist.destroy_process_group()


def solve(layout: Layout, problem: Problem, directory: Path, device: Device) -> Verdict:
    """The log-probs, then every update, each compared with the reference."""
    config, shape = config_of(problem, layout, directory), load_model_shape(directory)
    policy = Policy(config, shape, device)
    at = policy.position
    n_stages = parallel_state.get_pipeline_model_parallel_world_size()
    assert (at.tp_size, n_stages, at.dp_size) == (layout.tp, layout.pp, layout.dp)
    grid = policy_grid(config.policy, shape)
    shapes = {name: tuple(shard.shape) for name, shard in policy.named_shards().items()}
    check_shards(shapes, shape, grid, at.rank)
    load_hf(directory, policy.named_shards(), shape, at)
    policy.weights_loaded()
    # A few tokens' logits: the smallest chunk of the configuration would hold all of them.
    for model in policy._models:
        model.logits_chunk_bytes = LOGITS_CHUNK_BYTES

    if problem.algorithm.kl_coef:
        policy.keep_reference()
    reference = load_reference(directory / reference_name(problem, layout))
    compare = Comparison(policy, shape, like=reference.updates[0].weights)
    expected = iter(reference.updates)
    samples = make_samples(problem)
    logprobs = _logprobs(policy, samples, problem.share_prompts)
    verdict = Verdict(
        stored_otherwise=_stored_otherwise(policy, shape),
        layers=sum(name.endswith("linear_proj.weight") for name in policy.named_shards()),
        errors={"logprobs": _relative_error(logprobs, reference.logprobs)},
    )
    batches = _batches(policy, config, samples, shape)
    before = {name: shard.clone() for name, shard in policy.named_shards().items()}
    anchors = policy.anchors(batches)
    now = policy.named_shards()
    verdict.changed_by_looking = [n for n in now if _differs(now, before, n)]
    verdict.changed_by_bad = _train_badly(policy, config, samples, shape)
    verdict.changed_by_held = _train_too_far(policy, batches[0])
    for step, (batch, fixed) in enumerate(zip(batches, anchors, strict=True)):
        before = {name: shard.clone() for name, shard in policy.named_shards().items()}
        result = policy.train(batch, fixed)
        verdict.metrics.append(dict(result.metrics))
        verdict.versions.append(result.version)
        verdict.updated.append(result.updated)
        if result.updated:
            verdict.errors |= compare.update(step, result, next(expected))
        else:
            now = policy.named_shards()
            verdict.changed_by_skipping += [n for n in now if _differs(now, before, n)]
    verdict.padding = compare.padding
    verdict.uncovered = compare.uncovered()
    return verdict


def _stored_otherwise(policy: Policy, shape: ModelShape) -> list[str]:
    stored = {p.key: p.shape for p in stored_parameters(shape, policy.position.tp_size)}
    regions = parameter_regions(policy._models).values()
    shards = [shard for of_parameter in regions for shard in of_parameter]
    return [x.key for x in shards if stored.get(x.key) != tuple(x.global_shape)]


def _batches(
    policy: Policy, config: Config, samples: Sequence[TrainSample], shape: ModelShape
) -> list[TrainBatch]:
    plan = plan_of(config, token_costs(shape), policy.position.dp_rank)
    return make_batches(samples, plan)


def _train_badly(
    policy: Policy, config: Config, samples: Sequence[TrainSample], shape: ModelShape
) -> list[str]:
    """Names of what an update changes whose loss is no number on one of the ranks."""
    spoilt = [replace(samples[0], advantage=math.nan), *samples[1:]]
    batch = _batches(policy, config, spoilt, shape)[0]
    before = {name: shard.clone() for name, shard in policy.named_shards().items()}
    (result,) = policy.learn([batch])
    now = policy.named_shards()
    told = result.is_bad and not result.updated and result.version == policy.version == 0
    return [*(["what it says"] if not told else []), *(n for n in now if _differs(now, before, n))]


def _train_too_far(policy: Policy, batch: TrainBatch) -> list[str]:
    """Names of what two updates change that target_kl holds back: the second is not computed."""
    before = {name: shard.clone() for name, shard in policy.named_shards().items()}
    algorithm = policy._algorithm
    policy._algorithm = replace(algorithm, target_kl=1e-9)
    results = policy.learn([batch, batch])
    policy._algorithm = algorithm
    now = policy.named_shards()
    told = [(r.is_held, r.updated, r.is_bad, bool(r.metrics)) for r in results]
    right = told == [(True, False, False, True), (True, False, False, False)]
    unmoved = right and policy.version == 0
    return [*([] if unmoved else ["what it says"]), *(n for n in now if _differs(now, before, n))]


def _differs(
    now: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor], name: str
) -> bool:
    return not torch.equal(now[name], before[name])


def _logprobs(policy: Policy, samples: Sequence[TrainSample], share: bool) -> torch.Tensor:
    """float64 [response tokens of all samples], in their order."""
    chunks = [samples[i : i + SAMPLES_PER_PACK] for i in range(0, len(samples), SAMPLES_PER_PACK)]
    packed = [pack(chunk, [0.0] * len(chunk), share_prompts=share) for chunk in chunks]
    return torch.cat(policy.logprobs(packed)).double()


class Comparison:
    """Holds a rank's shards against whole tensors in Hugging Face coordinates."""

    def __init__(self, policy: Policy, shape: ModelShape, like: Mapping[str, torch.Tensor]) -> None:
        # With the distributed optimizer a rank has the sum of its part of the gradients only;
        # the weights that come of it are compared.
        self._whole_gradients = not policy._chunks[0].ddp_config.use_distributed_optimizer
        self.padding = 0.0
        self._policy = policy
        self._shape = shape
        self._seen = {name: torch.zeros(whole.shape) for name, whole in like.items()}

    def update(self, step: int, result: StepResult, right: Update) -> dict[str, float]:
        """What is compared -> relative error, for one optimizer step."""
        grads = self._errors(self._gradients(), right.grads) if self._whole_gradients else {}
        weights = self._errors(self._policy.named_shards(), right.weights)
        errors = {
            "loss": abs(result.loss / right.loss - 1.0),
            "grad_norm": abs(result.grad_norm / right.grad_norm - 1.0),
            **self._alpha_effective(result, right),
            **{f"gradient of {name}": error for name, error in grads.items()},
            **{f"updated {name}": error for name, error in weights.items()},
        }
        return {f"update {step}, {what}": error for what, error in errors.items()}

    def _alpha_effective(self, result: StepResult, right: Update) -> dict[str, float]:
        measured = result.metrics.get("group/alpha_effective")
        return {"alpha_effective": abs(measured / right.alpha_effective - 1)} if measured else {}

    def uncovered(self) -> list[str]:
        """Collective. Tensors of which all ranks together have not shown every element."""
        for seen in self._seen.values():
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return [name for name, seen in self._seen.items() if not seen.all()]

    def _gradients(self) -> dict[str, torch.Tensor]:
        """Global Megatron name -> the gradient that the last update used.

        Megatron clips in place, and clears gradients only when the next update begins.
        """
        names = {x.data_ptr(): name for name, x in self._policy.named_shards().items()}
        models = self._policy._models
        return {names[p.data_ptr()]: p.main_grad for m in models for p in m.parameters()}

    def _errors(
        self, shards: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]
    ) -> dict[str, float]:
        """Hugging Face name -> error of the part that this rank holds."""
        worst: dict[str, float] = {}
        at = self._policy.position
        for name, on_device in shards.items():
            tensor = on_device.cpu()
            padding = tensor.clone()
            shard = Shard(tuple(tensor.shape), at.tp_rank, at.tp_size)
            for piece in pieces_of(name, shard, self._shape):
                whole = right[piece.hf_name]
                gap = tensor[piece.local.slices].double() - whole[piece.hf.slices]
                error = _no_nan(gap.abs().max() / whole.abs().max())
                worst[piece.hf_name] = max(worst.get(piece.hf_name, 0.0), error)
                padding[piece.local.slices] = 0.0
                self._seen[piece.hf_name][piece.hf.slices] = 1.0
            self.padding = max(self.padding, _no_nan(padding.abs().max()))
        return worst


def _relative_error(value: torch.Tensor, right: torch.Tensor) -> float:
    """Largest |difference| over the largest |right value|."""
    return _no_nan((value - right).abs().max() / right.abs().max())


def _no_nan(value: torch.Tensor) -> float:
    """nan loses every comparison, and so would pass for a small error."""
    return math.inf if value.isnan() else value.item()


if __name__ == "__main__":
    main()
