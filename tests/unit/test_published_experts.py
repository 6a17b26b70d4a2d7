"""The dry run of models with hundreds of experts, from config.json as it is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpg_megatron.config.loading import load_config
from gpg_megatron.errors import UserError
from gpg_megatron.model.shape import load_model_shape, shape_warnings
from gpg_megatron.start.dry_run import RunPlan, plan_run

ROOT = Path(__file__).resolve().parents[2]
GENERAL: dict[str, Any] = {
    "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
    "norm_topk_prob": True, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True,
}  # fmt: skip
FP8 = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
    "weight_block_size": [128, 128],
}  # fmt: skip
YARN = {"mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}
DEEPSEEK: dict[str, Any] = GENERAL | {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "ep_size": 1,
    "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512, "moe_layer_freq": 1,
    "moe_intermediate_size": 2048, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "quantization_config": FP8, "rms_norm_eps": 1e-06,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "v_head_dim": 128,
}  # fmt: skip
DEEPSEEK_V3 = DEEPSEEK | {
    "bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 3,
    "max_position_embeddings": 163840, "model_type": "deepseek_v3", "n_group": 8,
    "n_routed_experts": 256, "num_attention_heads": 128, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "rope_theta": 10000, "routed_scaling_factor": 2.5,
    "rope_scaling": YARN | {"beta_fast": 32, "beta_slow": 1, "factor": 40, "type": "yarn"},
    "topk_group": 4, "transformers_version": "4.33.1", "vocab_size": 129280,
}  # fmt: skip
KIMI_K2 = DEEPSEEK | {
    "aux_loss_alpha": 0.001, "bos_token_id": 163584, "eos_token_id": 163585,
    "first_k_dense_replace": 1, "max_position_embeddings": 131072, "model_type": "kimi_k2",
    "n_group": 1, "n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0, "pretraining_tp": 1, "rope_theta": 50000.0,
    "rope_scaling": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "type": "yarn"},
    "routed_scaling_factor": 2.827, "seq_aux": True, "topk_group": 1,
    "transformers_version": "4.48.3", "vocab_size": 163840,
}  # fmt: skip
GLM45_AIR = GENERAL | {
    "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True,
    "eos_token_id": [151329, 151336, 151338], "first_k_dense_replace": 1, "head_dim": 128,
    "hidden_size": 4096, "intermediate_size": 10944, "max_position_embeddings": 131072,
    "model_type": "glm4_moe", "moe_intermediate_size": 1408, "n_group": 1,
    "n_routed_experts": 128, "n_shared_experts": 1, "num_attention_heads": 96,
    "num_experts_per_tok": 8, "num_hidden_layers": 46, "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1, "pad_token_id": 151329, "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000,
    "routed_scaling_factor": 1.0, "topk_group": 1, "transformers_version": "4.54.0",
    "use_qk_norm": False, "vocab_size": 151552,
}  # fmt: skip
LAYOUT = (
    "policy.pipeline_model_parallel_size=1",
    "policy.tensor_model_parallel_size=8",
    "policy.data_parallel_size=32",
    "policy.expert_model_parallel_size=32",
    "rollout.tensor_model_parallel_size=8",
    "data.max_prompt_length=512",
    "rollout.max_response_length=512",
)


def write(directory: Path, raw: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def count_of_transformers(raw: dict[str, Any]) -> int:
    """Parameters, and the routers' biases, which are buffers there."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    known = {key: value for key, value in raw.items() if key != "quantization_config"}
    known |= {"model_type": raw["model_type"].replace("kimi_k2", "deepseek_v3")}
    config = CONFIG_MAPPING[known.pop("model_type")](**known)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    state = sum(x.numel() for n, x in model.named_buffers() if n.endswith("correction_bias"))
    return int(state + sum(p.numel() for p in model.parameters()))


MODELS = {"DeepSeek-V3": DEEPSEEK_V3, "Kimi-K2": KIMI_K2, "GLM-4.5-Air": GLM45_AIR}
BILLIONS = {"DeepSeek-V3": 671.0, "Kimi-K2": 1026.4, "GLM-4.5-Air": 106.9}


def planned(directory: Path, raw: dict[str, Any]) -> RunPlan:
    """In bf16, as gpg-convert leaves it; what is published in FP8 is refused."""
    if "quantization_config" in raw:
        with pytest.raises(UserError, match="quantised weights"):
            load_model_shape(write(directory, raw), need_weights=False)
    write(directory, {key: value for key, value in raw.items() if key != "quantization_config"})
    assert shape_warnings(directory) == []
    layout = ROOT / "configs" / "qwen3-8b_math_megatron.yaml"
    return plan_run(load_config(layout, [f"model.path={directory}", *LAYOUT]), device="cuda")


@pytest.mark.parametrize("name", MODELS)
def test_the_dry_run_of_the_first_layers(tmp_path: Path, name: str) -> None:
    raw = MODELS[name] | {"num_hidden_layers": 4}
    plan = planned(tmp_path, raw)
    assert plan.n_parameters == count_of_transformers(raw)
    assert plan.publish.sent == plan.publish.bound


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_dry_run_of_a_published_model(tmp_path: Path, name: str) -> None:
    plan = planned(tmp_path, MODELS[name])
    assert plan.n_parameters == count_of_transformers(MODELS[name])
    assert plan.n_parameters / 1e9 == pytest.approx(BILLIONS[name], abs=0.1)
    assert plan.publish.sent == plan.publish.bound
