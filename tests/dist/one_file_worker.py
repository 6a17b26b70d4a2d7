"""One rank of the policy that makes the updates of examples/gpg_in_one_file.py.

    torchrun ... -m tests.dist.one_file_worker FOLDER

FOLDER/model is the Hugging Face directory; rank 0 writes FOLDER/policy.pt, a list with a
dictionary for each update: alpha, n_micro_batches, loss, grad_norm, and grads (after clipping)
and weights as whole tensors under their Hugging Face names.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpg_megatron.algorithm.advantages import assign_advantages
from gpg_megatron.batching.updates import make_batches
from gpg_megatron.config.sections import Config
from gpg_megatron.host.device import init_process_group
from gpg_megatron.layout.boxes import Shard
from gpg_megatron.layout.families import pieces_of
from gpg_megatron.layout.hf_io import load_hf
from gpg_megatron.layout.topology import hf_shapes
from gpg_megatron.model.flops import token_costs
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.policy.policy import Policy
from gpg_megatron.shapes import ModelShape
from gpg_megatron.types import Completion, Prompt, Reward, ScoredGroup, VersionSpan
from tests.dist.one_file_problem import Rollout, config_of, rollouts
from tests.dist.problem import plan_of
from tests.samples import float32, int32


def main() -> None:
    folder = Path(sys.argv[1])
    init_process_group("cpu", 120)
    config, shape = config_of(folder / "model"), load_model_shape(folder / "model")
    policy = Policy(config, shape, device="cpu")
    load_hf(folder / "model", policy.named_shards(), shape, policy.position)
    policy.weights_loaded()
    updates = [_update(policy, config, shape, rollout) for rollout in rollouts()]
    if dist.get_rank() == 0:
        torch.save(updates, folder / "policy.pt")
    dist.destroy_process_group()


def _update(policy: Policy, config: Config, shape: ModelShape, rollout: Rollout) -> dict[str, Any]:
    groups = [_group(rollout, index) for index in range(len(rollout.prompts))]
    samples, stats = assign_advantages(groups, config.algorithm)
    (batch,) = make_batches(samples, plan_of(config, token_costs(shape), 0))
    (result,) = policy.learn([batch])
    shards = policy.named_shards()
    # Megatron clips in place, and clears gradients only when the next update begins.
    parameters = policy._models[0].parameters()
    grads = {name: p.main_grad for name, p in zip(shards, parameters, strict=True)}
    return {
        "alpha": stats.alpha,
        "loss": result.loss,
        "n_micro_batches": len(batch.micro_batches),
        "grad_norm": result.grad_norm,
        "grads": _whole(grads, policy, shape),
        "weights": _whole(shards, policy, shape),
    }


def _group(rollout: Rollout, index: int) -> ScoredGroup:
    return ScoredGroup(
        prompt=Prompt(
            id=str(index),
            token_ids=int32(rollout.prompts[index]),
            messages=(),
            ground_truth="",
            data_source="",
        ),
        completions=tuple(
            Completion(
                prompt_id=str(index),
                index=i,
                token_ids=int32(tokens),
                logprobs=float32((0.0,) * len(tokens)),  # GPG without a correction reads none
                finish_reason="stop",
                text="",
                versions=(VersionSpan(version=0, start=0, end=len(tokens)),),
            )
            for i, tokens in enumerate(rollout.answers[index])
        ),
        rewards=tuple(Reward(score=r, accuracy=r, parts={}) for r in rollout.rewards[index]),
    )


def _whole(
    shards: Mapping[str, torch.Tensor], policy: Policy, shape: ModelShape
) -> dict[str, torch.Tensor]:
    """Collective. Shards of all ranks -> whole tensors, Hugging Face names; what several ranks hold
    is their mean."""
    total = {name: torch.zeros(size) for name, size in hf_shapes(shape).items()}
    holders = {name: torch.zeros(size) for name, size in hf_shapes(shape).items()}
    for name, tensor in shards.items():
        shard = Shard(tuple(tensor.shape), policy.position.tp_rank, policy.position.tp_size)
        for piece in pieces_of(name, shard, shape):
            total[piece.hf_name][piece.hf.slices] += tensor[piece.local.slices]
            holders[piece.hf_name][piece.hf.slices] += 1.0
    for tensor in (*total.values(), *holders.values()):
        dist.all_reduce(tensor)
    return {name: total[name] / holders[name] for name in total}


if __name__ == "__main__":
    main()
