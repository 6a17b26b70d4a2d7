"""One of two data-parallel ranks that trains in bf16.

    torchrun ... -m tests.dist.bf16_worker FOLDER

FOLDER/model holds the model; what the rank saw goes to FOLDER/rank<r>.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from gpg_megatron.batching.updates import make_batches
from gpg_megatron.config.sections import Config, ModelConfig
from gpg_megatron.host.device import Device, init_process_group
from gpg_megatron.layout.hf_io import load_hf
from gpg_megatron.model.flops import token_costs
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.policy.policy import Policy
from gpg_megatron.types import TrainBatch
from tests.dist.problem import PROBLEMS, Layout, config_of, make_samples, plan_of

LR = 4e-5
N_UPDATES = 16


def main() -> None:
    """Train with and without the distributed optimizer; compare the first gradient with fp32's."""
    folder = Path(sys.argv[1])
    # As on a machine with a GPU: what counts is the policy's device.
    torch.cuda.is_available = lambda: True
    init_process_group("cpu", 120)
    layout = Layout(dp=2)
    seen = {name: train(folder / "model", name, layout, "cpu") for name in ("plain", "distributed")}
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def train(
    model: Path, optimizer: str, layout: Layout, device: Device
) -> dict[str, float | list[str]]:
    """What a rank sees with this optimizer: plain or distributed."""
    config = config_of(PROBLEMS[0], layout, model)
    config = replace(
        config,
        policy=replace(
            config.policy,
            lr=LR,
            weight_decay=0.0,
            adam_eps=1e-8,
            use_distributed_optimizer=optimizer == "distributed",
        ),
    )
    gradient, _ = _first_gradient(config, model, device)
    low = replace(config, model=ModelConfig(path=str(model), dtype="bf16"))
    low_gradient, policy = _first_gradient(low, model, device, updates=N_UPDATES)
    (ddp,), matrix = policy._chunks, "decoder.layers.0.mlp.linear_fc1.weight"
    weight = policy.named_shards()[matrix]
    (start,) = [x for name, x in _start(policy, model).items() if name == matrix]
    seen: dict[str, float | list[str]] = {
        "cosine": float(torch.cosine_similarity(gradient, low_gradient, dim=0)),
        "gradient dtypes": sorted({str(b.grad_data.dtype) for b in ddp.buffers}),
        "weight dtypes": sorted({str(x.dtype) for x in policy.named_shards().values()}),
        "moved": float((weight != start).float().mean()),
        "step in units of the last place": float(LR / (start.abs().float().median() * 2**-8)),
    }
    if optimizer == "plain":
        pairs = [(p, p.main_param) for p in ddp.module.parameters()]
        seen["master dtypes"] = sorted({str(master.dtype) for _, master in pairs})
        seen["weights that are not the rounded master"] = [
            str(i) for i, (p, master) in enumerate(pairs) if not torch.equal(p, master.bfloat16())
        ]
    parallel_state.destroy_model_parallel()
    return seen


def _first_gradient(
    config: Config, model: Path, device: Device, updates: int = 1
) -> tuple[torch.Tensor, Policy]:
    """The gradient of the first update, all ranks' parts of it, and the policy after all."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    policy = Policy(config, load_model_shape(model), device)
    _start(policy, model)
    policy.weights_loaded()
    batch = _batch(config, policy)
    policy.train(batch)
    gradient = torch.cat([p.main_grad.flatten().clone() for p in policy._models[0].parameters()])
    for _ in range(updates - 1):
        policy.train(batch)
    return gradient, policy


def _start(policy: Policy, model: Path) -> dict[str, torch.Tensor]:
    """Load the weights into the policy or, once it has trained, into copies of its shards."""
    shards = policy.named_shards()
    target = {name: x.clone() for name, x in shards.items()} if policy.version else shards
    load_hf(model, target, load_model_shape(model), policy.position)
    return target


def _batch(config: Config, policy: Policy) -> TrainBatch:
    costs = token_costs(load_model_shape(config.model.path))
    plan = plan_of(config, costs, policy.position.dp_rank)
    return make_batches(make_samples(PROBLEMS[0]), plan)[0]


if __name__ == "__main__":
    main()
