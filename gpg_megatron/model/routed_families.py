"""The families that choose experts as DeepSeek's models do."""

from __future__ import annotations

from dataclasses import replace
from types import NoneType

from gpg_megatron.model.hf_keys import (
    ANYTHING,
    COMMON,
    COUNT,
    EXTRA,
    FLAG,
    FREE,
    INT,
    LAST_TOKENS,
    MAX_SIZE,
    NO_FLAG,
    NULL,
    ONE,
    SIZE,
    Family,
    Key,
    Missing,
    size,
)

# Which experts a token goes to. Files have num_nextn_predict_layers, which transformers also calls
# num_mtp_layers.
ROUTING = {
    "moe_intermediate_size": SIZE,
    "n_routed_experts": COUNT,
    "n_shared_experts": COUNT,
    "num_experts_per_tok": COUNT,
    "norm_topk_prob": Key(types=(bool,), default=True, only=(True,)),
    "routed_scaling_factor": Key(types=(float,), default=Missing),
    "n_group": COUNT,
    "topk_group": COUNT,
    "first_k_dense_replace": Key(types=INT, default=Missing),
    "output_router_logits": FLAG,
    "num_mtp_layers": Key(types=INT, default=1),
}
EXTRA_LAYERS = {
    "num_nextn_predict_layers": Key(types=INT),
    # transformers' other name for n_routed_experts.
    "num_local_experts": NULL,
}

# transformers' class of DeepSeek-V3 allows null for these, which its code could not use.
ROUTING_OR_NULL = ROUTING | {
    name: replace(ROUTING[name], types=(*ROUTING[name].types, NoneType))
    for name in (
        "n_group", "topk_group", "num_experts_per_tok", "norm_topk_prob", "first_k_dense_replace"
    )
}  # fmt: skip

# Of attention over compressed keys and values.
LATENT = {
    "q_lora_rank": Key(types=(int, NoneType), default=Missing, most=MAX_SIZE),
    "kv_lora_rank": SIZE,
    "qk_nope_head_dim": SIZE,
    "qk_rope_head_dim": SIZE,
    # The engine has no biases.
    "attention_bias": NO_FLAG,
    # The norms of the compressed have 1e-6 in transformers, and this key in the engine.
    "rms_norm_eps": Key(types=(float,), default=Missing, only=(1e-6,)),
    "pretraining_tp": Key(types=(int, NoneType), default=1),
}
LATENT_EXTRA = {
    "moe_layer_freq": ONE,
    "moe_router_dtype": Key(types=ANYTHING, only=(None, "float32")),
    "index_topk": NULL,
    "sliding_window": NULL,
    **dict.fromkeys(
        ("auto_map", "aux_loss_alpha", "ep_size", "head_dim", "qk_head_dim", "qkv_bias", "seq_aux"),
        FREE,
    ),
}

ROUTED_FAMILIES = {
    "Glm4MoeForCausalLM": Family(
        model_type="glm4_moe",
        declared=COMMON
        | ROUTING
        | {
            "num_key_value_heads": size(8),
            "attention_bias": FLAG,
            "use_qk_norm": FLAG,
        },
        extra=EXTRA
        | EXTRA_LAYERS
        | {
            # The engine fails without it, and slides if the file says so.
            "head_dim": Key(types=INT, default=Missing, most=MAX_SIZE),
            "sliding_window": NULL,
            "partial_rotary_factor": FREE,
            "qkv_bias": FREE,
        },
        rotary_part=0.5,
        flags={"qkv_bias": "attention_bias", "qk_norm": "use_qk_norm"},
        routing="sigmoid",
    ),
    "DeepseekV3ForCausalLM": Family(
        model_type="deepseek_v3",
        # Its own code, which is DeepSeek-V3's; transformers has none.
        other_types=("kimi_k2",),
        declared=COMMON
        | ROUTING_OR_NULL
        | LATENT
        | {
            "num_key_value_heads": Key(types=(int, NoneType), default=128, most=MAX_SIZE),
            "v_head_dim": Key(types=(int, NoneType), default=Missing, most=MAX_SIZE),
            # The engine rotates neighbours.
            "rope_interleave": Key(types=(bool, NoneType), default=True, only=(True,)),
            "attention_dropout": Key(types=(int, float, NoneType), default=0.0),
            "bos_token_id": Key(types=(int, NoneType), default=0),
            "eos_token_id": Key(types=(int, list, NoneType), default=1),
        },
        extra=EXTRA
        | EXTRA_LAYERS
        | LATENT_EXTRA
        | {
            # The engine's words for what transformers' code does whatever the file says.
            "scoring_func": Key(types=(str,), default=Missing, only=("sigmoid",)),
            "topk_method": Key(types=(str,), default=Missing, only=("noaux_tc",)),
        },
        has=frozenset({"rotary_neighbours"}),
        routing="sigmoid",
        latent=True,
    ),
    "DeepseekV2ForCausalLM": Family(
        model_type="deepseek_v2",
        declared=COMMON
        | LAST_TOKENS
        | {name: key for name, key in ROUTING_OR_NULL.items() if name != "num_mtp_layers"}
        | LATENT
        | {
            "num_key_value_heads": Key(types=(int, NoneType), most=MAX_SIZE),
            "v_head_dim": SIZE,
            "head_dim": Key(types=(int, NoneType), most=MAX_SIZE),
            "mlp_bias": NO_FLAG,
            "attention_dropout": Key(types=(float, NoneType), default=0.0),
            "first_k_dense_replace": Key(types=INT, default=0),
            # The engine scales the weights of the chosen then, transformers never.
            "norm_topk_prob": Key(types=(bool, NoneType), default=False, only=(False, None)),
            "topk_method": Key(
                types=(str, NoneType),
                default="greedy",
                only=("greedy", "group_limited_greedy"),
                what="another choice than greedy or group_limited_greedy",
            ),
        },
        extra=EXTRA
        | LATENT_EXTRA
        | {
            # transformers has it whatever the file says; the engine reads the file.
            "scoring_func": Key(types=(str,), only=("softmax",)),
            # transformers' other name for n_routed_experts.
            "num_experts": NULL,
        },
        has=frozenset({"rotary_neighbours"}),
        routing="softmax",
        latent=True,
    ),
}
