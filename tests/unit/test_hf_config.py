"""config.json -> ModelShape: values and messages."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from gpg_megatron.errors import UserError
from gpg_megatron.model.families import FAMILIES
from gpg_megatron.model.shape import load_model_shape, shape_warnings
from gpg_megatron.shapes import DeltaShape, GroupRouting, LatentShape, ModelShape, MoEShape

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 500,
    "tie_word_embeddings": True,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-06,
    "max_position_embeddings": 4096,
}
SHAPE = ModelShape(
    architecture="Qwen3ForCausalLM",
    num_layers=3,
    hidden_size=48,
    ffn_size=80,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=500,
    tied=True,
    qkv_bias=False,
    qk_norm=True,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    max_position_embeddings=4096,
)
EXPERT_KEYS = {
    "num_experts": 12,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
EXPERTS = MoEShape(
    num_experts=12, experts_per_token=2, ffn_size=24, shared_ffn_size=0, renormalised=True
)
HYBRID_KEYS = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
NETS = DeltaShape(
    layers=(0, 2), key_heads=2, value_heads=6, key_dim=8, value_dim=12, kernel=4, fused=False
)
HYBRID = {"qk_norm": True, "output_gate": True, "centred_norms": True, "rotary_dim": 4} | {
    "delta": NETS
}
ROUTED_KEYS = {
    "n_routed_experts": 12,
    "n_shared_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "routed_scaling_factor": 1.5,
    "n_group": 3,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT_KEYS = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
}
ROUTED = dataclasses.replace(
    EXPERTS,
    shared_ffn_size=72,
    dense_layers=(0,),
    routing=GroupRouting(has_bias=True, n_groups=3, chosen_groups=1, scale=1.5),
)
FLAGS: dict[str, dict[str, Any]] = {
    "Qwen2ForCausalLM": {"qkv_bias": True, "qk_norm": False},
    "Qwen3ForCausalLM": {"qkv_bias": False, "qk_norm": True},
    "LlamaForCausalLM": {"qkv_bias": False, "qk_norm": False},
    "MistralForCausalLM": {"qkv_bias": False, "qk_norm": False},
    "Glm4ForCausalLM": {
        "qkv_bias": True,
        "qk_norm": False,
        "post_norms": True,
        "fused_gate_up": True,
        "rotary_dim": 8,
        "rotary_neighbours": True,
    },
    "Qwen2MoeForCausalLM": {
        "qkv_bias": True,
        "qk_norm": False,
        "moe": dataclasses.replace(EXPERTS, shared_ffn_size=72),
    },
    "Qwen3MoeForCausalLM": {"qkv_bias": False, "qk_norm": True, "moe": EXPERTS},
    "Qwen3NextForCausalLM": HYBRID
    | {
        "delta": dataclasses.replace(NETS, fused=True),
        "moe": dataclasses.replace(EXPERTS, shared_ffn_size=72),
    },
    "Qwen3_5ForCausalLM": HYBRID,
    "Qwen3_5MoeForCausalLM": HYBRID
    | {"ffn_size": 24, "moe": dataclasses.replace(EXPERTS, shared_ffn_size=72)},
    "Glm4MoeForCausalLM": {"qk_norm": True, "rotary_dim": 8, "moe": ROUTED, "extra_layers": 1},
    "DeepseekV3ForCausalLM": {
        "qk_norm": False,
        "num_kv_heads": 4,
        "head_dim": 24,
        "rotary_dim": 8,
        "rotary_neighbours": True,
        "latent": LatentShape(q_rank=20, kv_rank=12, rope_dim=8, value_dim=14, score_scale=1.0),
        "moe": ROUTED,
        "extra_layers": 1,
    },
    "DeepseekV2ForCausalLM": {
        "qk_norm": False,
        "num_kv_heads": 4,
        "head_dim": 24,
        "rotary_dim": 8,
        "rotary_neighbours": True,
        "latent": LatentShape(q_rank=0, kv_rank=12, rope_dim=8, value_dim=14, score_scale=1.0),
        "moe": dataclasses.replace(
            ROUTED,
            renormalised=False,
            routing=GroupRouting(has_bias=False, n_groups=3, chosen_groups=1, scale=1.5),
        ),
    },
}
# What a family's configuration has besides the common keys.
OWN_KEYS: dict[str, dict[str, Any]] = {
    "MistralForCausalLM": {"sliding_window": None},
    "Qwen2MoeForCausalLM": EXPERT_KEYS | {"shared_expert_intermediate_size": 72},
    "Qwen3MoeForCausalLM": EXPERT_KEYS,
    "Qwen3NextForCausalLM": HYBRID_KEYS | EXPERT_KEYS | {"shared_expert_intermediate_size": 72},
    "Qwen3_5ForCausalLM": HYBRID_KEYS,
    "Qwen3_5MoeForCausalLM": HYBRID_KEYS | EXPERT_KEYS | {"shared_expert_intermediate_size": 72},
    "Glm4MoeForCausalLM": ROUTED_KEYS | {"use_qk_norm": True},
    "DeepseekV3ForCausalLM": ROUTED_KEYS
    | LATENT_KEYS
    | {"q_lora_rank": 20, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "DeepseekV2ForCausalLM": ROUTED_KEYS
    | LATENT_KEYS
    | {"q_lora_rank": None, "topk_method": "group_limited_greedy"},
}


OF_IMAGES = {"rope_theta": 5, "mrope_section": [11, 11, 10], "mrope_interleaved": True}


def of_family(architecture: str, **changes: Any) -> dict[str, Any]:
    """QWEN3, as a model of another family."""
    named = {"architectures": [architecture], "model_type": FAMILIES[architecture].model_type}
    return QWEN3 | OWN_KEYS.get(architecture, {}) | named | changes


LLAMA, MISTRAL = of_family("LlamaForCausalLM"), of_family("MistralForCausalLM")
QWEN2 = of_family("Qwen2ForCausalLM")
WINDOW = {"use_sliding_window": True, "sliding_window": 64}
SLIDING = ["sliding_attention"] * 3
SOME_LAYERS = (
    "a sliding window in some layers only (use_sliding_window, max_window_layers, layer_types)"
)
QWEN3_5, QWEN3_NEXT = of_family("Qwen3_5ForCausalLM"), of_family("Qwen3NextForCausalLM")
DEEPSEEK = of_family("DeepseekV3ForCausalLM")
DEEPSEEK_V2 = of_family("DeepseekV2ForCausalLM")
GLM4_MOE = of_family("Glm4MoeForCausalLM")
QWEN2_MOE, QWEN3_MOE = of_family("Qwen2MoeForCausalLM"), of_family("Qwen3MoeForCausalLM")


def write(directory: Path, content: Any) -> Path:
    """A directory with this config.json and an (empty) checkpoint."""
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / "config.json").write_text(text)
    (directory / "model.safetensors").touch()
    return directory


def refusal(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model_shape(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_field(tmp_path: Path) -> None:
    assert load_model_shape(write(tmp_path, QWEN3)) == SHAPE


@pytest.mark.parametrize(
    ("architecture", "tied"),
    [
        (x, tied)
        for x in FLAGS
        for tied in (True, False)
        if (x, tied) != ("Qwen3NextForCausalLM", True)
    ],
)
def test_what_transformers_writes(tmp_path: Path, architecture: Any, tied: Any) -> None:
    import transformers

    family = architecture.removesuffix("ForCausalLM")
    name = f"{family}TextConfig"
    config = getattr(transformers, name, getattr(transformers, f"{family}Config"))(
        architectures=[architecture],
        num_hidden_layers=3,
        hidden_size=48,
        intermediate_size=80,
        num_attention_heads=4,
        vocab_size=500,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6,
        max_position_embeddings=4096,
        **{"num_key_value_heads": 2, "head_dim": 16} | OWN_KEYS.get(architecture, {}),
    )
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    expected = dataclasses.replace(
        SHAPE, architecture=architecture, tied=tied, **FLAGS[architecture]
    )
    assert load_model_shape(tmp_path) == expected


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"num_key_value_heads": None}, "num_kv_heads", 4),
        ({"tie_word_embeddings": False}, "tied", False),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta", 5e5),
        ({"rope_scaling": {"type": "default"}}, "rope_theta", 1e6),
        ({"rope_scaling": None}, "rope_theta", 1e6),
        ({"use_sliding_window": False, "sliding_window": 32}, "head_dim", 16),
        ({"attention_bias": False, "mlp_bias": False}, "qkv_bias", False),
        ({"hidden_act": "silu"}, "ffn_size", 80),
    ],
)
def test_variants(tmp_path: Path, change: Any, field: Any, value: Any) -> None:
    shape = load_model_shape(write(tmp_path, QWEN3 | change))
    assert shape == dataclasses.replace(SHAPE, **{field: value})


@pytest.mark.parametrize(
    ("raw", "absent", "field", "value"),
    [
        (QWEN3, "head_dim", "head_dim", 128),
        (QWEN3_MOE, "head_dim", "head_dim", 12),
        (QWEN2, "head_dim", "head_dim", 12),
        (LLAMA, "head_dim", "head_dim", 12),
        (LLAMA, "num_key_value_heads", "num_kv_heads", 4),
        (QWEN3_MOE, "num_key_value_heads", "num_kv_heads", 4),
        (QWEN3, "tie_word_embeddings", "tied", False),
        (QWEN3, "rope_theta", "rope_theta", 1e4),
    ],
)
def test_defaults_of_absent_keys(
    tmp_path: Path, raw: Any, absent: Any, field: Any, value: Any
) -> None:
    """Those of each family: Qwen3 has heads of 128, Qwen3-MoE four heads of keys."""
    shape = load_model_shape(write(tmp_path, {k: v for k, v in raw.items() if k != absent}))
    expected = load_model_shape(write(tmp_path, raw))
    assert shape == dataclasses.replace(expected, **{field: value})


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"num_local_experts": 6}, "num_experts", 6),
        ({"num_experts_per_tok": 4}, "experts_per_token", 4),
        ({"norm_topk_prob": False}, "renormalised", False),
        ({"decoder_sparse_step": 1, "mlp_only_layers": []}, "num_experts", 12),
        ({"decoder_sparse_step": 2}, "dense_layers", (0, 2)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [2, 0]}, "dense_layers", (0, 2)),
        ({"mlp_only_layers": [2]}, "dense_layers", (2,)),
        ({"shared_expert_intermediate_size": 40}, "shared_ffn_size", 0),
        ({"qkv_bias": True, "router_aux_loss_coef": 0.1}, "num_experts", 12),
    ],
)
def test_variants_of_experts(tmp_path: Path, change: Any, field: Any, value: Any) -> None:
    """Qwen3-MoE has no shared expert, whatever its file says."""
    shape = load_model_shape(write(tmp_path, QWEN3_MOE | change))
    assert shape.moe == dataclasses.replace(EXPERTS, **{field: value})


def test_defaults_of_absent_keys_of_experts(tmp_path: Path) -> None:
    """transformers does not scale the weights unless it is told to."""
    raw = {k: v for k, v in QWEN3_MOE.items() if k not in ("norm_topk_prob", "intermediate_size")}
    shape = load_model_shape(write(tmp_path, raw))
    assert shape.moe == dataclasses.replace(EXPERTS, renormalised=False)
    assert shape.ffn_size == EXPERTS.ffn_size


@pytest.mark.parametrize(
    "key",
    [
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "num_attention_heads",
    ],
)
def test_a_missing_key_of_experts_is_named(tmp_path: Path, key: Any) -> None:
    raw = {name: value for name, value in QWEN2_MOE.items() if name != key}
    assert refusal(write(tmp_path, raw)) == f"{tmp_path / 'config.json'}: key '{key}' is missing"


@pytest.mark.parametrize(
    "key",
    [
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "vocab_size",
        "rms_norm_eps",
        "max_position_embeddings",
    ],
)
def test_a_missing_key_is_named(tmp_path: Path, key: Any) -> None:
    raw = {name: value for name, value in QWEN3.items() if name != key}
    message = refusal(write(tmp_path, raw))
    assert str(tmp_path / "config.json") in message and f"key '{key}' is missing" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "rope type dynamic"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope type longrope"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act other than silu"),
    ],
)
def test_an_unsupported_option_is_named(tmp_path: Path, change: Any, words: Any) -> None:
    message = refusal(write(tmp_path, QWEN3 | change))
    assert message == f"{tmp_path / 'config.json'}: {words} is not supported"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (MISTRAL | {"attention_bias": True}, "attention_bias"),
        (LLAMA | {"attention_bias": True, "qkv_bias": False}, "qkv_bias beside attention_bias"),
        (LLAMA | {"qkv_bias": True}, "qkv_bias"),
        (LLAMA | {"sliding_window": 32}, "sliding_window 32 (other than null)"),
        (QWEN3_MOE | {"attention_bias": True}, "attention_bias"),
        (QWEN3_MOE | {"num_experts_per_tok": 1}, "norm_topk_prob with one expert per token"),
        (QWEN2_MOE | {"qkv_bias": False}, "qkv_bias other than true"),
        (
            QWEN2_MOE | {"use_sliding_window": True},
            SOME_LAYERS,
        ),
        (QWEN3_MOE | WINDOW | {"layer_types": ["full_attention"] * 3}, SOME_LAYERS),
        (QWEN2 | WINDOW | {"max_window_layers": 1}, SOME_LAYERS),
        (QWEN3 | WINDOW | {"layer_types": [*SLIDING[:2], "full_attention"]}, SOME_LAYERS),
        (QWEN3 | {"layer_types": SLIDING}, "layer_types other than full_attention"),
        (LLAMA | {"layer_types": SLIDING}, "layer_types other than full_attention"),
        (
            QWEN3_5 | {"layer_types": SLIDING},
            "layer_types other than linear_attention and full_attention",
        ),
        (
            QWEN3_5 | {"layer_types": None, "full_attention_interval": 4},
            "layer_types without both of linear_attention and full_attention",
        ),
        (QWEN3_5 | {"attn_output_gate": False}, "attn_output_gate other than true"),
        (QWEN3_NEXT, "tie_word_embeddings"),
        (QWEN3 | {"rope_parameters": OF_IMAGES}, "rope_parameters.mrope_section"),
    ],
)
def test_an_unsupported_option_of_a_family(tmp_path: Path, raw: Any, words: Any) -> None:
    message = refusal(write(tmp_path, raw))
    assert message == f"{tmp_path / 'config.json'}: {words} is not supported"


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"layer_types": None, "full_attention_interval": 2}, "layers", (0, 2)),
        ({"layer_types": None, "full_attention_interval": 3}, "layers", (0, 1)),
        ({"linear_conv_kernel_dim": 2}, "kernel", 2),
        ({"rope_parameters": OF_IMAGES}, "kernel", 4),
    ],
)
def test_variants_of_gated_delta_nets(tmp_path: Path, change: Any, field: Any, value: Any) -> None:
    """Angles by position in an image are those of text where there is no image."""
    shape = load_model_shape(write(tmp_path, QWEN3_5 | change))
    assert shape.delta == dataclasses.replace(NETS, **{field: value})
    assert shape.rope_theta == (5 if "rope_parameters" in change else 1e6)
    assert shape_warnings(tmp_path) == []


def test_heads_of_gated_delta_nets_that_cannot_be(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, QWEN3_5 | {"linear_num_value_heads": 5}))
    assert message.endswith(": linear_num_key_heads 2 does not divide linear_num_value_heads 5")
    message = refusal(write(tmp_path, QWEN3_5 | {"num_hidden_layers": 4}))
    assert message.endswith(": layer_types has 3 entries; num_hidden_layers is 4")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mlp_only_layers": [3]}, "mlp_only_layers has 3; expected layers 0 to 2"),
        ({"mlp_only_layers": [True]}, "mlp_only_layers has true; expected layers 0 to 2"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0; expected 1 to 10000"),
        (
            {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
            "decoder_sparse_step and mlp_only_layers leave no layer with experts",
        ),
        ({"mlp_only_layers": [1], "intermediate_size": ...}, "key 'intermediate_size' is missing"),
    ],
)
def test_layers_without_experts_that_cannot_be(tmp_path: Path, change: Any, words: Any) -> None:
    raw = {key: value for key, value in (QWEN3_MOE | change).items() if value is not ...}
    assert refusal(write(tmp_path, raw)) == f"{tmp_path / 'config.json'}: {words}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"first_k_dense_replace": 3}, "first_k_dense_replace is 3; expected 0 to 2"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor is 0.0; expected a number above 0"),
        (
            {"n_group": 12},
            "n_group 12 does not divide n_routed_experts 12 into groups of 2 or more",
        ),
        (
            {"topk_group": 4},
            "topk_group is 4; expected at most n_group 3, and groups with at least "
            "num_experts_per_tok 2 experts",
        ),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok 1 is not supported"),
        ({"norm_topk_prob": False}, "norm_topk_prob other than true is not supported"),
        ({"num_nextn_predict_layers": -1}, "num_mtp_layers is -1; expected 0 to 10000"),
        ({"head_dim": ...}, "key 'head_dim' is missing"),
    ],
)
def test_routing_that_cannot_be(tmp_path: Path, change: Any, words: Any) -> None:
    raw = {key: value for key, value in (GLM4_MOE | change).items() if value is not ...}
    assert refusal(write(tmp_path, raw)) == f"{tmp_path / 'config.json'}: {words}"


YARN: dict[str, Any] = {
    "type": "yarn",
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2; expected 4, those of q"),
        (
            {"v_head_dim": 25},
            "v_head_dim is 25; expected at most qk_nope_head_dim + qk_rope_head_dim = 24",
        ),
        ({"head_dim": 16}, "head_dim is 16; expected 8, what rotates"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7; rotary embeddings need an even number"),
        ({"scoring_func": ...}, "key 'scoring_func' is missing"),
        ({"topk_method": "greedy"}, "topk_method other than noaux_tc is not supported"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps other than 1e-06 is not supported"),
        ({"topk_group": None}, "topk_group is null; expected a whole number"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope type linear with latent attention is not supported",
        ),
        (
            {"rope_scaling": {**YARN, "mscale_all_dim": None}},
            "rope_scaling has only one of mscale and mscale_all_dim; expected both or none",
        ),
        (
            {"rope_scaling": {**YARN, "attention_factor": 1.0}},
            "rope_scaling.attention_factor or truncate with latent attention is not supported",
        ),
    ],
)
def test_latent_attention_that_cannot_be(tmp_path: Path, change: Any, words: Any) -> None:
    raw = {key: value for key, value in (DEEPSEEK | change).items() if value is not ...}
    assert refusal(write(tmp_path, raw)) == f"{tmp_path / 'config.json'}: {words}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm_topk_prob": True}, "norm_topk_prob is not supported"),
        (
            {"topk_method": "greedy"},
            "topk_method greedy with topk_group below n_group is not supported",
        ),
        (
            {"topk_method": "noaux_tc"},
            "topk_method (another choice than greedy or group_limited_greedy) is not supported",
        ),
        ({"scoring_func": "sigmoid"}, "scoring_func other than softmax is not supported"),
        ({"n_group": None}, "n_group is null; expected a whole number"),
        ({"n_group": ...}, "key 'n_group' is missing"),
        ({"num_experts": None}, "num_experts beside n_routed_experts is not supported"),
        ({"hidden_size": 50}, "num_attention_heads 4 does not divide hidden_size 50"),
        ({"mlp_bias": True}, "mlp_bias is not supported"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps other than 1e-06 is not supported"),
    ],
)
def test_a_deepseek_v2_that_cannot_be(tmp_path: Path, change: Any, words: Any) -> None:
    raw = {key: value for key, value in (DEEPSEEK_V2 | change).items() if value is not ...}
    assert refusal(write(tmp_path, raw)) == f"{tmp_path / 'config.json'}: {words}"


def test_a_deepseek_v2_may_choose_among_all_experts(tmp_path: Path) -> None:
    """As DeepSeek-V2-Lite does; one expert of a token has a weight that is learned."""
    raw = DEEPSEEK_V2 | {"topk_method": "greedy", "n_group": 1, "num_experts_per_tok": 1}
    shape = load_model_shape(write(tmp_path, raw))
    assert shape.moe is not None and shape.moe.routing is not None
    assert (shape.moe.routing.n_groups, shape.moe.routing.chosen_groups) == (1, 1)


def test_the_scores_of_latent_attention_are_scaled_by_yarn(tmp_path: Path) -> None:
    """(0.1 ln 40 + 1) ** 2, and Kimi's name for the same model."""
    raw = DEEPSEEK | {"rope_scaling": YARN, "q_lora_rank": None, "model_type": "kimi_k2"}
    shape = load_model_shape(write(tmp_path, raw))
    assert shape.latent is not None and shape.latent.q_rank == 0
    assert shape.latent.score_scale == pytest.approx(1.8738, abs=1e-4)


def test_mistral_slides_unless_told_not_to(tmp_path: Path) -> None:
    """Without the key transformers' own default is a window of 4096."""
    raw = {key: value for key, value in MISTRAL.items() if key != "sliding_window"}
    assert load_model_shape(write(tmp_path, raw)).window == 4096
    message = refusal(write(tmp_path, MISTRAL | {"sliding_window": 0}))
    assert message.endswith(": sliding_window is 0; expected 1 or more")


def test_one_expert_per_token_without_scaling(tmp_path: Path) -> None:
    raw = QWEN3_MOE | {"num_experts_per_tok": 1, "norm_topk_prob": False}
    shape = load_model_shape(write(tmp_path, raw))
    assert shape.moe is not None and shape.moe.experts_per_token == 1


@pytest.mark.parametrize(
    ("architectures", "name"),
    [
        (["GPT2LMHeadModel"], "GPT2LMHeadModel"),
        (["MixtralForCausalLM"], "MixtralForCausalLM"),
        ([], "(none)"),
        (None, "(none)"),
    ],
)
def test_an_unsupported_architecture(tmp_path: Path, architectures: Any, name: Any) -> None:
    message = refusal(write(tmp_path, QWEN3 | {"architectures": architectures}))
    assert f"architecture {name} is not supported" in message
    assert all(known in message for known in FLAGS)


def test_what_is_missing_on_disk(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert refusal(nowhere) == f"model.path: no such directory: {nowhere}"
    assert refusal(tmp_path) == f"model.path: {tmp_path} has no config.json"
    write(tmp_path, QWEN3)
    (tmp_path / "model.safetensors").unlink()
    assert refusal(tmp_path) == f"model.path: {tmp_path} has no *.safetensors files"


def test_broken_json_says_the_line(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, '{\n  "vocab_size": 5,\n  oops\n}'))
    assert message.startswith(f"{tmp_path / 'config.json'}:3: ")


def test_a_config_that_is_no_object(tmp_path: Path) -> None:
    assert "config.json" in refusal(write(tmp_path, [QWEN3]))
