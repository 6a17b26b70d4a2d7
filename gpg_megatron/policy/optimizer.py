"""Megatron's Adam and learning-rate schedule from the policy section of the configuration."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from gpg_megatron.config.sections import PolicyConfig
from gpg_megatron.host.device import Device


def build_optimizer(
    config: PolicyConfig, model: DistributedDataParallel, dtype: torch.dtype, device: Device
) -> MegatronOptimizer:
    """Adam with decoupled weight decay; fp32 master weights when the parameters are bf16."""
    return get_megatron_optimizer(
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
        [model],
        use_gloo_process_groups=device == "cuda",
    )


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
