"""The memory arithmetic against models that Megatron really builds, and by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.large_layouts import QWEN2_7B, QWEN3_30B, QWEN25_72B
from gpg_megatron.config.loading import load_config
from gpg_megatron.config.sections import (
    GIB,
    Config,
    ModelConfig,
    PolicyConfig,
    RolloutConfig,
    TrainerConfig,
)
from gpg_megatron.layout.topology import PolicyGrid, local_shapes
from gpg_megatron.model.pipeline import passes_in_flight, pipeline_stages
from gpg_megatron.placement.memory import (
    activation_bytes,
    engine_memory,
    logit_bytes,
    micro_batches_per_update,
    policy_memory,
)
from gpg_megatron.shapes import LatentShape, ModelShape
from tests.unit.meta_small import SMALL, megatron_says

ROOT = Path(__file__).resolve().parents[2]
# Model, TP, PP and virtual stages; the last has two or three layers in each run.
CASES = {"7b:2:2:1": QWEN2_7B, "72b:8:4:1": QWEN25_72B, "7b:2:4:3": QWEN2_7B}


@pytest.fixture(scope="module")
def built() -> dict[str, dict[str, Any]]:
    names = [f"{case}:{stage}" for case in CASES for stage in range(int(case.split(":")[2]))]
    found: dict[str, dict[str, Any]] = megatron_says("built", *names)
    return found


@pytest.mark.parametrize("case", CASES)
def test_layers_parameters_gradients_and_optimizer_of_every_stage(
    built: dict[str, dict[str, Any]], case: str
) -> None:
    shape, (tp, pp, virtual) = CASES[case], map(int, case.split(":")[1:])
    policy = PolicyConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=virtual,
        max_tokens_per_micro_batch=16384,
    )
    config = replace(Config(), policy=policy, model=ModelConfig(dtype="bf16"))
    stages = pipeline_stages(policy, shape.num_layers)
    grid = PolicyGrid(tp_size=tp, dp_size=1, pp_size=pp, stage_of_layer=stages)
    for stage in range(pp):
        real = built[f"{case}:{stage}"]
        shapes = local_shapes(shape, grid, grid.rank(tp=0, dp=0, pp=stage))
        n_parameters = sum(math.prod(x) for x in shapes.values())
        memory = policy_memory(config, shape, n_parameters=n_parameters, stage=stage)
        assert real == {
            "layers": [i for i, at in enumerate(stages) if at == stage],
            "ahead": passes_in_flight(policy, stage, 100 * pp) - 1,
            "elements": n_parameters,
            "parameters": memory.parameters,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
        }


@pytest.mark.parametrize("tp", [1, 2])
def test_what_autograd_keeps_of_a_layer(tp: int) -> None:
    shape = replace(QWEN2_7B, **SMALL)
    policy = PolicyConfig(tensor_model_parallel_size=tp)
    for dtype, real in megatron_says("kept", str(tp)).items():
        model = ModelConfig(dtype="bf16" if dtype == "bfloat16" else "fp32")
        assert activation_bytes(replace(Config(), policy=policy, model=model), shape) == real


def config_of(**policy: Any) -> Config:
    return replace(
        Config(),
        policy=PolicyConfig(**policy),
        rollout=RolloutConfig(n=5, max_response_length=1024, tensor_model_parallel_size=2),
        trainer=TrainerConfig(train_batch_size=1024, mini_batch_size=256),
    )


def test_micro_batches() -> None:
    # 256 prompts x 5 responses over 2 replicas; 8192 tokens hold 4 sequences of 2048.
    config = config_of(data_parallel_size=2, max_tokens_per_micro_batch=8192)
    assert micro_batches_per_update(config) == 160
    alone = config_of(max_tokens_per_micro_batch=100)
    assert micro_batches_per_update(alone) == 1280


def test_earlier_stages_keep_more_micro_batches() -> None:
    config = config_of(pipeline_model_parallel_size=4, max_tokens_per_micro_batch=2048)
    kept = [
        policy_memory(config, QWEN2_7B, n_parameters=1, stage=stage).activations
        for stage in range(4)
    ]
    one = 2048 * 7 * activation_bytes(config, QWEN2_7B)
    assert kept == [4 * one, 3 * one, 2 * one, one]
    logits = [policy_memory(config, QWEN2_7B, n_parameters=1, stage=s).logits for s in range(4)]
    # 256 MiB of fp32 logits are those of 441 tokens; besides bf16, and the gradient in fp32.
    assert logits == [0, 0, 0, 441 * 152064 * 10] and logits[-1] == logit_bytes(config, QWEN2_7B)
    few = replace(config, policy=replace(config.policy, max_tokens_per_micro_batch=200))
    assert logit_bytes(few, QWEN2_7B) == 100 * 152064 * 10, "half of them are responses"


def test_what_reduces_activations() -> None:
    config = config_of(max_tokens_per_micro_batch=2048)

    def of(**changes: Any) -> int:
        changed = replace(config, policy=replace(config.policy, **changes))
        return policy_memory(changed, QWEN2_7B, n_parameters=1, stage=0).activations

    assert of() == 2048 * 28 * activation_bytes(config, QWEN2_7B)
    assert of(context_parallel_size=4) == of() // 4
    layer = activation_bytes(config, QWEN2_7B)
    assert of(recompute="layers") == 2048 * (28 * 2 * 3584 + layer)
    split = replace(config.policy, tensor_model_parallel_size=2, sequence_parallel=True)
    halved = replace(config, policy=split)
    assert activation_bytes(halved, QWEN2_7B) == pytest.approx(layer / 2, rel=1e-3)


def test_ranks_that_share_a_row_share_the_optimizer() -> None:
    config = config_of(
        use_distributed_optimizer=True,
        data_parallel_size=2,
        context_parallel_size=4,
        max_tokens_per_micro_batch=1024,
    )
    memory = policy_memory(config, QWEN2_7B, n_parameters=800, stage=0)
    assert memory.optimizer == 800 * 12 // 8


def test_experts_count_as_often_as_a_token_visits_them() -> None:
    config = config_of()
    assert QWEN3_30B.moe is not None
    moe = replace(QWEN3_30B.moe, experts_per_token=4)
    fewer = replace(QWEN3_30B, moe=moe)
    difference = activation_bytes(config, QWEN3_30B) - activation_bytes(config, fewer)
    assert difference == 2 * (3 * 4 * 768 + 4 * 2048)
    some = replace(fewer, moe=replace(moe, dense_layers=(0,)), ffn_size=6144)
    dense = activation_bytes(config, some) - activation_bytes(config, fewer)
    assert dense == 2 * (3 * 6144 - 3 * 4 * 768 - 4 * 2048), "the layer that keeps more"


def test_an_engine_worker() -> None:
    config = config_of()
    gpu = engine_memory(config, QWEN2_7B, n_parameters=10**9, device_bytes=10 * 2**30)
    assert gpu.reserved == int(0.6 * 10 * 2**30)
    assert gpu.parameters == 2 * 10**9
    assert gpu.kv_cache == gpu.reserved - gpu.parameters
    # Keys and values of 28 layers, 2 heads of 128 in bf16 on each of two workers.
    assert gpu.kv_bytes_per_token == 2 * 28 * 2 * 128 * 2
    assert gpu.kv_tokens == gpu.kv_cache // gpu.kv_bytes_per_token
    latent = LatentShape(q_rank=0, kv_rank=512, rope_dim=64, value_dim=128, score_scale=1.0)
    shape = replace(QWEN2_7B, latent=latent)
    compressed = engine_memory(config, shape, n_parameters=10**9, device_bytes=80 * 2**30)
    assert compressed.kv_bytes_per_token == 28 * (512 + 64) * 2  # on each of the two workers
    cpu = engine_memory(config, QWEN2_7B, n_parameters=10**9, device_bytes=None)
    assert cpu.reserved == 2 * 10**9 + 2**30
    small = engine_memory(config, QWEN2_7B, n_parameters=10**9, device_bytes=2**30)
    assert small.kv_cache < 0 and small.kv_tokens == 0


FAKE_CUDA = [  # GiB that a full micro-batch leaves on the device: rows of docs/gpu-status.md
    ("qwen2-7b_math_megatron", QWEN2_7B, 7935, 14, 11.39),
    ("qwen2.5-72b_math_megatron", QWEN25_72B, 2815, 20, 2.12),
]


@pytest.mark.parametrize(("name", "shape", "n_tokens", "n_layers", "seen"), FAKE_CUDA)
def test_fused_layers_keep_what_was_seen_on_a_device_without_values(
    name: str, shape: ModelShape, n_tokens: int, n_layers: int, seen: float
) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    planned = n_tokens * n_layers * activation_bytes(config, shape, fused=True) / GIB
    assert seen == pytest.approx(planned, rel=0.03)
