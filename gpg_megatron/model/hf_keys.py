"""What each key of config.json is to us: a row for each key, a table for each family.

Types and defaults of the rows are those of transformers' configuration classes (5.x); a test
compares them. What a class does not declare it keeps as an attribute, and some of those are read by
the model's code, there or in vLLM: EXTRA and the `extra` of a family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Final, Literal

MAX_SIZE = 2**31 - 1
MAX_COUNT = 10_000
"""Of layers and of experts."""


class Missing:
    """The default of a key that must be given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of config.json."""

    types: tuple[type, ...]
    """Exactly these: JSON's true is no int and 4 is no float."""
    default: object = None
    """Missing: transformers has a default, which is no model that anybody has; or an engine reads
    it and transformers does not."""
    only: tuple[object, ...] = ()
    """The values with which the model computes what we compute; empty: all."""
    most: int = 0
    """0: not a size. Otherwise sizes are 1 to this."""
    of: tuple[type, ...] = ()
    """What a list may have in it; empty: anything."""
    what: str = ""
    """What the key asks for, where its name does not say it."""


INT, FLOAT, BOOL = (int,), (float,), (bool,)
ANYTHING: Final = (NoneType, bool, int, float, str, list, dict)
OR_NULL: Final = (NoneType,)
SIZE = Key(types=INT, default=Missing, most=MAX_SIZE)
COUNT = Key(types=INT, default=Missing, most=MAX_COUNT)
FREE = Key(types=ANYTHING)
NULL = Key(types=ANYTHING, only=(None,))
NO = Key(types=ANYTHING, only=(False, None))
ONE = Key(types=ANYTHING, only=(1, None))
ZERO = Key(types=ANYTHING, only=(0, None))
FLAG = Key(types=BOOL, default=False)
NO_FLAG = Key(types=BOOL, default=False, only=(False,))
DTYPES = ("float32", "float16", "bfloat16", "float64", "float", "half", "double")
DTYPE = Key(
    types=(str, *OR_NULL),
    only=(None, *DTYPES),
    what="weights of another type than float64, float32, float16 or bfloat16",
)
QUANTISED = Key(types=ANYTHING, only=(None,), what="quantised weights")
NESTED = Key(types=ANYTHING, only=(None,), what="a model inside the model")


def size(default: int) -> Key:
    """A number of elements that transformers has a usual one for."""
    return Key(types=INT, default=default, most=MAX_SIZE)


def _sizes_or_null(default: int | None) -> Key:
    return Key(types=(*INT, *OR_NULL), default=default, most=MAX_SIZE)


def _free(*types: type, default: object = None) -> Key:
    return Key(types=types, default=default)


# Declared by transformers' class of every family. The first rows are the base class's, which does
# not check their types.
COMMON: dict[str, Key] = {
    "transformers_version": FREE,
    "architectures": FREE,
    "dtype": DTYPE,
    "output_hidden_states": FREE,
    "return_dict": FREE,
    "chunk_size_feed_forward": FREE,
    "is_encoder_decoder": NO,
    "id2label": _free(dict, NoneType),
    "label2id": FREE,
    "problem_type": FREE,
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": COUNT,
    "num_attention_heads": SIZE,
    "num_key_value_heads": _sizes_or_null(32),
    "hidden_act": Key(types=(str,), default="silu", only=("silu",)),
    "max_position_embeddings": SIZE,
    "initializer_range": _free(float, default=0.02),
    "rms_norm_eps": Key(types=FLOAT, default=Missing),
    "use_cache": _free(bool, default=True),
    "tie_word_embeddings": FLAG,
    "rope_parameters": _free(dict, NoneType),
    # Only when transformers trains, which it does not do here.
    "attention_dropout": _free(float, int, default=0.0),
    "pad_token_id": _free(int, NoneType),
    "bos_token_id": _free(int, NoneType),
    "eos_token_id": Key(types=(int, list, NoneType), of=INT),
}
WINDOWS = {
    "use_sliding_window": FLAG,
    "sliding_window": _free(int, NoneType, default=4096),
}
LAYER_WINDOWS = WINDOWS | {
    "max_window_layers": _free(int, default=28),
    "layer_types": _free(list, NoneType),
}
LAST_TOKENS = {
    "bos_token_id": _free(int, NoneType, default=1),
    "eos_token_id": Key(types=(int, list, NoneType), default=2, of=INT),
}
EXPERTS = {
    "decoder_sparse_step": Key(types=INT, default=1, most=MAX_COUNT),
    "moe_intermediate_size": SIZE,
    "num_experts_per_tok": COUNT,
    "num_experts": COUNT,
    "norm_topk_prob": FLAG,
    "output_router_logits": FLAG,
    "router_aux_loss_coef": _free(float, default=0.001),
    "mlp_only_layers": _free(list, NoneType),
    # Where no layer uses it, a file need not have it.
    "intermediate_size": Key(types=INT, most=MAX_SIZE),
}

# Not declared, so transformers takes any value. What the models' code there or vLLM's reads, and
# what other families' files say of a computation that these have not.
EXTRA: dict[str, Key] = {
    **dict.fromkeys(("quantization_config", "compression_config", "quantization"), QUANTISED),
    **dict.fromkeys(("text_config", "llm_config", "decoder", "generator", "text_encoder"), NESTED),
    **dict.fromkeys(
        (
            "ada_rms_norm_t_cond", "add_cross_attention", "attention_bias",
            "attn_temperature_tuning", "bias", "mlp_bias", "parallel_attn", "qk_layernorm",
            "qk_norm", "rope_interleaved", "tie_encoder_decoder", "use_mrope",
            "use_parallel_residual", "use_qk_norm", "use_sliding_window",
        ),
        NO,
    ),
    **dict.fromkeys(
        (
            "alibi", "attention_chunk_size", "attention_multiplier", "attn_logit_softcapping",
            "attn_type_list", "block_configs", "clip_qkv", "configuration_files",
            "dual_chunk_attention_config", "final_logit_softcapping", "llama_4_scaling",
            "logits_soft_cap", "mlp_layer_types", "mrope_section", "no_rope_layer_interval",
            "no_rope_layers", "per_layer_config", "query_pre_attn_scalar", "rotary_emb_base",
            "rope_local_base_freq", "speculators_config", "xdrope_section",
        ),
        NULL,
    ),
    **dict.fromkeys(
        (
            "embedding_multiplier", "logit_scale", "logits_scaling", "n_group",
            "partial_rotary_factor", "residual_multiplier", "rotary_emb_fraction", "rotary_pct",
            "routed_scaling_factor", "topk_group",
        ),
        ONE,
    ),
    **dict.fromkeys(
        ("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"), ZERO
    ),
    "is_causal": Key(types=ANYTHING, only=(True,)),
    "pruned_heads": Key(types=ANYTHING, only=({}, None)),
    "torch_dtype": DTYPE,
    "head_dim": _sizes_or_null(None),
    "layer_types": _free(list, NoneType),
    "original_max_position_embeddings": FREE,
    "rope_scaling": FREE,
    "rope_theta": FREE,
    # What a file says of itself, of generation (generation_config.json has the word) or of tools.
    **dict.fromkeys(
        (
            "_attn_implementation", "_name_or_path", "attn_implementation", "is_llama_config",
            "max_window_layers", "model_type", "name_or_path", "num_labels", "output_attentions",
            "pretraining_tp", "sliding_window", "transformers.js_config", "unsloth_fixed",
            "unsloth_version", "do_sample", "length_penalty", "max_length", "max_new_tokens",
            "min_length", "num_beams", "repetition_penalty", "temperature", "top_k", "top_p",
        ),
        FREE,
    ),
}  # fmt: skip
LENGTHS = frozenset((
    "max_seq_len", "max_seq_length", "max_sequence_length", "max_target_positions",
    "model_max_length", "n_positions", "seq_len", "seq_length",
))  # fmt: skip
"""vLLM takes the smallest of these and max_position_embeddings."""
# vLLM's code of Llama, which also runs Mistral, heeds these; transformers' does not.
LLAMA_ENGINE = {"qkv_bias": NO, "sliding_window": NULL}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What an architecture has that its config.json does not spell out, and its keys."""

    model_type: str
    declared: Mapping[str, Key]
    """By the family's configuration class in transformers."""
    extra: Mapping[str, Key]
    """What else may be in the file; what is in neither is unknown."""
    has: frozenset[str] = frozenset()
    """Flags of ModelShape that its code sets, whatever the file says."""
    rotary_part: float | None = None
    """Of a head's elements those that are rotated, where the file does not say; None: always
    all."""
    slides: Callable[[int, int], bool] | None = None
    """(layer, max_window_layers) -> whether the layer has the window, where the file has no
    layer_types; None: all have."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """Field of ModelShape -> the key that says it, for biases and norms that a model may have."""
    experts: bool = False
    """In every layer, or in some: decoder_sparse_step, mlp_only_layers."""
    shared_expert: bool = False
    delta: bool = False
    """A gated delta net in most layers."""
    fused_delta: bool = False
    """With its input projections in two tensors, by key head."""
    unused_angles: frozenset[str] = frozenset()
    """Keys about the rotary angles of what is not text."""
    routing: Literal["sigmoid", "softmax"] | None = None
    """Experts in all layers but the first few, chosen as DeepSeek-V3 or as DeepSeek-V2 does."""
    latent: bool = False
    """Attention over compressed keys and values."""
    other_types: tuple[str, ...] = ()
    """Further model_types of the same code."""


def _last_layers_slide(layer: int, max_window_layers: int) -> bool:
    return layer >= max_window_layers


def _every_second_slides(layer: int, max_window_layers: int) -> bool:
    return layer % 2 == 0 and layer < max_window_layers


# A further family also needs its rows in layout/families.py; families.py has the others.
ATTENTION_FAMILIES = {
    "Qwen2ForCausalLM": Family(
        model_type="qwen2",
        declared=COMMON | LAYER_WINDOWS,
        # The model's code has biases whatever the file says.
        extra=EXTRA | {"attention_bias": FREE, "qkv_bias": FREE},
        slides=_last_layers_slide,
        has=frozenset({"qkv_bias"}),
    ),
    "Qwen3ForCausalLM": Family(
        model_type="qwen3",
        declared=COMMON | LAYER_WINDOWS | {"attention_bias": NO_FLAG, "head_dim": size(128)},
        extra=EXTRA | {"qkv_bias": FREE},
        slides=_last_layers_slide,
        has=frozenset({"qk_norm"}),
    ),
    "LlamaForCausalLM": Family(
        model_type="llama",
        declared=COMMON
        | LAST_TOKENS
        | {
            "num_key_value_heads": _sizes_or_null(None),
            "head_dim": _sizes_or_null(None),
            "attention_bias": FLAG,
            "mlp_bias": FLAG,
            "attention_dropout": _free(int, float, NoneType, default=0.0),
            "pretraining_tp": _free(int, NoneType, default=1),
        },
        extra=EXTRA | LLAMA_ENGINE,
        flags={
            "qkv_bias": "attention_bias",
            "output_bias": "attention_bias",
            "mlp_bias": "mlp_bias",
        },
    ),
    "MistralForCausalLM": Family(
        model_type="mistral",
        declared=COMMON
        | LAST_TOKENS
        | {
            "num_key_value_heads": size(8),
            "head_dim": _sizes_or_null(None),
            "sliding_window": _free(int, NoneType, default=4096),
        },
        extra=EXTRA | LLAMA_ENGINE,
    ),
    "Glm4ForCausalLM": Family(
        model_type="glm4",
        declared=COMMON
        | {
            "num_key_value_heads": size(2),
            "head_dim": size(128),
            "attention_bias": Key(types=BOOL, default=True),
            "pad_token_id": _free(int, NoneType, default=151329),
        },
        # The engine slides if the file says so, transformers does not.
        extra=EXTRA | {"partial_rotary_factor": FREE, "qkv_bias": FREE, "sliding_window": NULL},
        has=frozenset({"post_norms", "fused_gate_up", "rotary_neighbours"}),
        rotary_part=0.5,
        flags={"qkv_bias": "attention_bias"},
    ),
    "Qwen2MoeForCausalLM": Family(
        model_type="qwen2_moe",
        declared=COMMON
        | LAYER_WINDOWS
        | EXPERTS
        | {
            # Declared as if it might be null, which the model's code cannot divide by.
            "num_key_value_heads": size(16),
            "shared_expert_intermediate_size": SIZE,
            "qkv_bias": Key(types=BOOL, default=True, only=(True,)),
        },
        extra=EXTRA | {"attention_bias": FREE},
        slides=_every_second_slides,
        has=frozenset({"qkv_bias"}),
        experts=True,
        shared_expert=True,
    ),
    "Qwen3MoeForCausalLM": Family(
        model_type="qwen3_moe",
        declared=COMMON
        | WINDOWS
        | EXPERTS
        | {
            "num_key_value_heads": size(4),
            "attention_bias": NO_FLAG,
        },
        # The class's other name for num_experts, and the one that it writes.
        extra=EXTRA
        | {
            "num_local_experts": Key(types=INT, most=MAX_COUNT),
            "qkv_bias": FREE,
            "shared_expert_intermediate_size": FREE,
        },
        has=frozenset({"qk_norm"}),
        experts=True,
    ),
}
