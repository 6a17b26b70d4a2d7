"""Megatron's Adam and learning-rate schedule from the policy section of the configuration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from gpg_megatron.config.sections import PolicyConfig
from gpg_megatron.host.device import Device
from gpg_megatron.policy.shards import optimizer_parts


def build_optimizer(
    config: PolicyConfig,
    chunks: Sequence[DistributedDataParallel],
    dtype: torch.dtype,
    device: Device,
) -> MegatronOptimizer:
    """Adam with decoupled weight decay; fp32 master weights when the parameters are bf16."""
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=config.use_distributed_optimizer,
        ),
        list(chunks),
        use_gloo_process_groups=device == "cuda",
    )
    if device == "cpu":
        # torch's, which reads memory once instead of once for each operation: a fifth of the time.
        for part in optimizer_parts(optimizer):
            for group in part.optimizer.param_groups:
                group["fused"] = True
    return optimizer


def build_scheduler(
    config: PolicyConfig, optimizer: MegatronOptimizer, total_updates: int
) -> OptimizerParamScheduler:
    """Warm-up, then the decay style, over all optimizer steps of the run."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0 if config.lr_warmup_steps else config.lr,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_steps,
        lr_decay_steps=max(total_updates, config.lr_warmup_steps + 1),
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
    )


def current_lr(optimizer: MegatronOptimizer) -> float:
    """The learning rate that the next step uses."""
    return float(optimizer.param_groups[0]["lr"])


def scale_step(optimizer: MegatronOptimizer, factor: float) -> None:
    """The next step moves the weights by factor times what Adam says; decay stays what it is. The
    scheduler takes it back when it goes on."""
    for group in optimizer.param_groups if factor != 1.0 else ():
        group["lr"] *= factor
        group["weight_decay"] /= factor


@torch.no_grad()
def adam_norm(optimizer: MegatronOptimizer, factor: float, *, n_steps: int) -> float:
    """Length of the next step over the learning rate, without decay, were the gradient `factor`
    times what it is. Collective; changes nothing, and needs as much memory as the gradients.

    Args:
        optimizer: with its gradients prepared, not clipped.
        n_steps: that Adam has done.
    """
    limit, norm = optimizer.config.clip_grad, factor * float(optimizer.get_grad_norm())
    if limit:
        factor *= min(1.0, limit / (norm + 1e-6))
    kept = []
    for part in optimizer_parts(optimizer):
        for group in part.optimizer.param_groups:
            (beta1, beta2), n = group["betas"], n_steps + 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                grad = parameter.grad.clone()
                kept.append((parameter.grad, grad))
                state = part.optimizer.state.get(parameter, {})
                first = (1 - beta1) * factor * grad
                second = (1 - beta2) * (factor * grad).square_()
                if "exp_avg" in state:
                    first += beta1 * state["exp_avg"]
                    second += beta2 * state["exp_avg_sq"]
                root = (second / (1 - beta2**n)).sqrt_() + group["eps"]
                # Megatron knows which ranks hold the same elements, of gradients.
                parameter.grad.copy_(first / (1 - beta1**n) / root)
    length = float(optimizer.get_grad_norm())
    for grad, before in kept:
        grad.copy_(before)
    return length
