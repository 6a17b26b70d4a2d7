"""config.json as it is published with large models, and for each a layout that fits its GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GENERAL: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
}
SIGMOID = GENERAL | {"norm_topk_prob": True, "torch_dtype": "bfloat16"}
FP8 = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
    "weight_block_size": [128, 128],
}  # fmt: skip
YARN = {"mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}
DEEPSEEK = SIGMOID | {
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
GLM45_AIR = SIGMOID | {
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
DEEPSEEK_V2_LITE = GENERAL | {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "aux_loss_alpha": 0.001,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1,
    "hidden_size": 2048, "intermediate_size": 10944, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408,
    "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": None,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax",
    "seq_aux": True, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1", "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
DEEPSEEK_V2 = DEEPSEEK_V2_LITE | {
    "ep_size": 1, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
    "n_group": 8, "n_routed_experts": 160, "num_attention_heads": 128, "num_hidden_layers": 60,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "routed_scaling_factor": 16.0,
    "topk_group": 3, "topk_method": "group_limited_greedy",
}  # fmt: skip
LLAMA33_70B = GENERAL | {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 128, "hidden_size": 8192,
    "intermediate_size": 28672, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 64, "num_hidden_layers": 80,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "torch_dtype": "bfloat16", "transformers_version": "4.47.0.dev0",
    "vocab_size": 128256,
}  # fmt: skip
QWEN3_30B_A3B = GENERAL | {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_size": 2048,
    "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
    "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
QWEN3_235B_A22B = QWEN3_30B_A3B | {
    "hidden_size": 4096, "intermediate_size": 12288, "max_window_layers": 94,
    "moe_intermediate_size": 1536, "num_attention_heads": 64, "num_hidden_layers": 94,
}  # fmt: skip
# The part for text, as AutoModelForCausalLM saves it.
QWEN35 = GENERAL | {
    "attention_bias": False, "attn_output_gate": True, "dtype": "bfloat16",
    "eos_token_id": 248044, "full_attention_interval": 4, "head_dim": 256,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
    "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 262144, "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
        "rope_theta": 10000000, "rope_type": "default",
    },
    "transformers_version": "5.2.0", "vocab_size": 248320,
}  # fmt: skip
QWEN35_27B = QWEN35 | {
    "architectures": ["Qwen3_5ForCausalLM"], "hidden_size": 5120, "intermediate_size": 17408,
    "linear_num_value_heads": 48, "model_type": "qwen3_5_text", "num_attention_heads": 24,
    "num_hidden_layers": 64, "num_key_value_heads": 4,
}  # fmt: skip
QWEN35_397B_A17B = QWEN35 | {
    "architectures": ["Qwen3_5MoeForCausalLM"], "hidden_size": 4096,
    "linear_num_value_heads": 64, "model_type": "qwen3_5_moe_text",
    "moe_intermediate_size": 1024, "num_attention_heads": 32, "num_experts": 512,
    "num_experts_per_tok": 10, "num_hidden_layers": 60, "num_key_value_heads": 2,
    "output_router_logits": False, "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 1024,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Large:
    """A model and where it is trained."""

    raw: dict[str, Any]
    billions: float
    """Parameters, as published."""
    tp: int
    pp: int
    dp: int
    ep: int
    engines: int
    engine_tp: int
    last: int | None = None
    """Layers of the last pipeline stage, where the stages are not even."""
    gpu_gib: int = 80

    @property
    def overrides(self) -> list[str]:
        """Of a configuration."""
        sizes = {
            "policy.tensor_model_parallel_size": self.tp,
            "policy.pipeline_model_parallel_size": self.pp,
            "policy.data_parallel_size": self.dp,
            "policy.expert_model_parallel_size": self.ep,
            "policy.num_layers_in_last_pipeline_stage": self.last or "null",
            "rollout.num_engines": self.engines,
            "rollout.tensor_model_parallel_size": self.engine_tp,
        }
        return [f"{key}={value}" for key, value in sizes.items()]


LARGE = {
    "Llama-3.3-70B": Large(LLAMA33_70B, 70.6, 8, 2, 4, 1, 8, 8),
    "Qwen3-30B-A3B": Large(QWEN3_30B_A3B, 30.5, 4, 1, 8, 8, 8, 4),
    "Qwen3-235B-A22B": Large(QWEN3_235B_A22B, 235.1, 4, 2, 16, 16, 8, 16),
    "Qwen3.5-27B": Large(QWEN35_27B, 26.9, 4, 2, 4, 1, 8, 4),
    "Qwen3.5-397B-A17B": Large(QWEN35_397B_A17B, 396.3, 4, 4, 16, 16, 16, 16),
    "GLM-4.5-Air": Large(GLM45_AIR, 106.9, 8, 1, 32, 32, 32, 8),
    "DeepSeek-V2-Lite": Large(DEEPSEEK_V2_LITE, 15.7, 4, 1, 4, 4, 4, 4),
    "DeepSeek-V2": Large(DEEPSEEK_V2, 235.7, 8, 4, 8, 8, 16, 16),
    "DeepSeek-V3": Large(DEEPSEEK_V3, 671.0, 8, 4, 16, 16, 32, 16, last=13, gpu_gib=141),
    "Kimi-K2": Large(KIMI_K2, 1026.4, 8, 4, 16, 16, 16, 32, last=13, gpu_gib=141),
}
