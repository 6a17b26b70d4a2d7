"""Log-probabilities of fixed prompts, from transformers and from Megatron's model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from gpg_megatron.batching.updates import pack
from gpg_megatron.checkpoint.marker import HF_FILES
from gpg_megatron.config.sections import Config, ModelConfig, RolloutConfig, TrainerConfig
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.policy.on_cpu import hide_gpu_libraries, quiet_megatron
from gpg_megatron.types import MicroBatch, TrainSample


def prompts(hf: Path, count: int, length: int) -> torch.Tensor:
    """[count, length] token ids, the same for every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(load_model_shape(hf).vocab_size, (count, length), generator=generator)


@torch.no_grad()
def hf_logprobs(hf: Path, ids: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
    """fp32 [count, length - 1]: of every token after the first; and the model's type."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, local_files_only=True, dtype="auto").eval()
    logits = model(ids).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2), model.dtype


def megatron_logprobs(megatron: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same from Megatron's model in this process, which becomes a world of one rank."""
    quiet_megatron()
    hide_gpu_libraries()
    from gpg_megatron.policy.policy import Policy

    path = megatron / HF_FILES
    config = Config(
        model=ModelConfig(path=str(path), dtype="bf16" if dtype == torch.bfloat16 else "fp32"),
        rollout=RolloutConfig(temperature=1.0),
        trainer=TrainerConfig(device="cpu"),
    )
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        policy = Policy(config, load_model_shape(path, need_weights=False), "cpu")
        policy.load_weights(megatron)
        (logprobs,) = policy.logprobs([_batch(ids)])
    finally:
        dist.destroy_process_group()
    return logprobs.view(len(ids), -1)


def _batch(ids: torch.Tensor) -> MicroBatch:
    """Every token after the first of its sequence is a response token."""
    samples = [
        TrainSample(
            prompt_id=str(number),
            group=number,
            index=0,
            prompt_token_ids=row[:1],
            response_token_ids=row[1:],
            rollout_logprobs=np.zeros(len(row) - 1, np.float32),
            advantage=1.0,
            version=0,
            live=True,
            score=1.0,
        )
        for number, row in enumerate(ids.to(torch.int32).numpy())
    ]
    return pack(samples, [1.0] * len(samples))
