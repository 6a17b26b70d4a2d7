"""Every family: those of hf_keys.py and routed_families.py, and here those that have gated delta
nets."""

from __future__ import annotations

from functools import partial

from gpg_megatron.model.hf_keys import (
    ATTENTION_FAMILIES,
    BOOL,
    COMMON,
    EXPERTS,
    EXTRA,
    FREE,
    INT,
    MAX_COUNT,
    NO,
    NO_FLAG,
    NULL,
    SIZE,
    Family,
    Key,
    size,
)
from gpg_megatron.model.routed_families import ROUTED_FAMILIES

_DELTA = COMMON | {
    "num_key_value_heads": size(4),
    "attention_bias": NO_FLAG,
    "head_dim": size(256),
    "linear_conv_kernel_dim": size(4),
    "linear_key_head_dim": size(128),
    "linear_value_head_dim": size(128),
    "linear_num_key_heads": size(16),
    "linear_num_value_heads": size(32),
    "layer_types": Key(types=(list, type(None))),
}
_DELTA_EXTRA = EXTRA | {
    "full_attention_interval": Key(types=INT, most=MAX_COUNT),
    "partial_rotary_factor": FREE,
    # transformers has these whatever the file says; the engine reads the file.
    "attn_output_gate": Key(types=BOOL, only=(True,)),
    "output_gate_type": Key(types=(str,), only=("silu", "swish")),
    "layer_scale": NO,
    "qkv_bias": NO,
    "sliding_window": NULL,
    # Of the engine's state, and of layers that predict further tokens, which are not trained.
    "mamba_ssm_dtype": FREE,
    "mtp_num_hidden_layers": FREE,
    "mtp_use_dedicated_embeddings": FREE,
}
_SHARED_EXPERT = {"shared_expert_intermediate_size": SIZE}
_EVERY_LAYER = {key: EXPERTS[key] for key in EXPERTS if key in (
    "moe_intermediate_size", "num_experts_per_tok", "num_experts", "output_router_logits",
    "router_aux_loss_coef",
)}  # fmt: skip
_HAS = frozenset({"qk_norm", "output_gate", "centred_norms"})
# Angles by position in an image: of text they are all the same.
_IMAGE_ANGLES = frozenset({"mrope_section", "mrope_interleaved"})

_hybrid = partial(Family, extra=_DELTA_EXTRA, has=_HAS, delta=True, rotary_part=0.25)

FAMILIES = (
    ATTENTION_FAMILIES
    | ROUTED_FAMILIES
    | {
        "Qwen3NextForCausalLM": _hybrid(
            model_type="qwen3_next",
            declared=_DELTA
            | EXPERTS
            | _SHARED_EXPERT
            | {
                "num_key_value_heads": size(2),
                "norm_topk_prob": Key(types=BOOL, default=True),
                # The engine's code has an output layer of its own in any case.
                "tie_word_embeddings": NO_FLAG,
            },
            experts=True,
            shared_expert=True,
            fused_delta=True,
        ),
        "Qwen3_5ForCausalLM": _hybrid(
            model_type="qwen3_5_text",
            declared=_DELTA,
            unused_angles=_IMAGE_ANGLES,
        ),
        "Qwen3_5MoeForCausalLM": _hybrid(
            model_type="qwen3_5_moe_text",
            declared={key: row for key, row in _DELTA.items() if key != "intermediate_size"}
            | _EVERY_LAYER
            | _SHARED_EXPERT
            | {"num_key_value_heads": size(2)},
            extra=_DELTA_EXTRA | {"norm_topk_prob": Key(types=BOOL, only=(True,))},
            experts=True,
            shared_expert=True,
            unused_angles=_IMAGE_ANGLES,
        ),
    }
)
