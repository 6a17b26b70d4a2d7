"""A policy of a size that says something about the device, with random weights, and an update."""

from __future__ import annotations

import gc
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from gpg_megatron.batching.updates import make_batches
from gpg_megatron.config.sections import (
    Config,
    DataConfig,
    ModelConfig,
    PolicyConfig,
    RolloutConfig,
    TrainerConfig,
)
from gpg_megatron.host.device import Device
from gpg_megatron.model.flops import token_costs
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.policy.policy import Policy
from gpg_megatron.types import TrainBatch
from tests.dist.problem import plan_of
from tests.samples import train_sample

SHAPES: dict[Device, dict[str, Any]] = {
    # Qwen2.5-0.5B
    "cuda": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
    },
    "cpu": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 8192,
        "max_position_embeddings": 2048,
    },
}
N_PROMPTS, N_SAMPLES = 4, 8
LENGTHS: dict[Device, tuple[int, int]] = {"cuda": (512, 240), "cpu": (32, 24)}
"""Of a prompt and of each response: one micro-batch holds all of them, and is full."""
FEW_TOKENS = 400
"""The samples' token ids are below."""


def sized_config(device: Device, folder: Path, **policy: Any) -> Config:
    """Of a run with such a model in bf16; writes its config.json."""
    common = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True}
    family = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"}
    text = SHAPES[device] | common | family
    (folder / "config.json").write_text(json.dumps(text))
    prompt, response = LENGTHS[device]
    tokens = N_PROMPTS * (prompt - 1 + N_SAMPLES * response)
    return Config(
        data=DataConfig(max_prompt_length=prompt),
        model=ModelConfig(path=str(folder), dtype="bf16"),
        policy=replace(PolicyConfig(max_tokens_per_micro_batch=tokens), **policy),
        rollout=RolloutConfig(n=N_SAMPLES, max_response_length=response),
        trainer=TrainerConfig(train_batch_size=N_PROMPTS, device=device),
    )


def sized_policy(device: Device, folder: Path, **policy: Any) -> tuple[Policy, TrainBatch, Config]:
    """The same weights and the same update every time. The world must exist.

    Args:
        policy: keys of the section policy.
    """
    config = sized_config(device, folder, **policy)
    shape = load_model_shape(folder, need_weights=False)
    built = Policy(config, shape, device)
    generator = torch.Generator(device).manual_seed(5)
    for name, shard in built.named_shards().items():
        if name.endswith("norm.weight"):
            shard.fill_(1.0)
        else:
            shard.normal_(0.0, 0.02, generator=generator)
    built.weights_loaded()
    rng = random.Random(3)
    n_prompt, n_response = LENGTHS[device]
    samples = []
    for group in range(N_PROMPTS):
        prompt = [rng.randrange(FEW_TOKENS) for _ in range(n_prompt)]
        for index in range(N_SAMPLES):
            response = [rng.randrange(FEW_TOKENS) for _ in range(n_response)]
            advantage = 0.5 if index % 2 else -0.5
            samples.append(
                train_sample(prompt, response, group=group, index=index, advantage=advantage)
            )
    (batch,) = make_batches(samples, plan_of(config, token_costs(shape), 0))
    assert len(batch.micro_batches) == 1
    return built, batch, config


def forget_policy() -> None:
    """After the last name of one is gone: the next has the device for itself."""
    parallel_state.destroy_model_parallel()
    gc.collect()  # parts of a policy know each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
