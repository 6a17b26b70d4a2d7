"""config.json -> ModelShape, and the parallel sizes against it: values and messages."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from gpg_megatron.config.sections import Config, DataConfig, PolicyConfig, RolloutConfig
from gpg_megatron.errors import UserError
from gpg_megatron.model.shape import check_layout, load_model_shape, padded_vocab_size
from gpg_megatron.types import ModelShape, MoEShape

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
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
FLAGS = {
    "Qwen2ForCausalLM": {"qkv_bias": True, "qk_norm": False},
    "Qwen3ForCausalLM": {"qkv_bias": False, "qk_norm": True},
    "LlamaForCausalLM": {"qkv_bias": False, "qk_norm": False},
    "MistralForCausalLM": {"qkv_bias": False, "qk_norm": False},
    "Qwen2MoeForCausalLM": {
        "qkv_bias": True,
        "qk_norm": False,
        "moe": dataclasses.replace(EXPERTS, shared_ffn_size=72),
    },
    "Qwen3MoeForCausalLM": {"qkv_bias": False, "qk_norm": True, "moe": EXPERTS},
}
# What a family's configuration has besides the common keys.
OWN_KEYS = {
    "MistralForCausalLM": {"sliding_window": None},
    "Qwen2MoeForCausalLM": EXPERT_KEYS | {"shared_expert_intermediate_size": 72},
    "Qwen3MoeForCausalLM": EXPERT_KEYS,
}
MISTRAL = QWEN3 | {"architectures": ["MistralForCausalLM"], "sliding_window": None}
QWEN2_MOE = QWEN3 | OWN_KEYS["Qwen2MoeForCausalLM"] | {"architectures": ["Qwen2MoeForCausalLM"]}
QWEN3_MOE = QWEN3 | EXPERT_KEYS | {"architectures": ["Qwen3MoeForCausalLM"]}


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


def test_every_field(tmp_path) -> None:
    assert load_model_shape(write(tmp_path, QWEN3)) == SHAPE


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", FLAGS)
def test_what_transformers_writes(tmp_path, architecture, tied) -> None:
    import transformers

    family = architecture.removesuffix("ForCausalLM")
    config = getattr(transformers, f"{family}Config")(
        architectures=[architecture],
        num_hidden_layers=3,
        hidden_size=48,
        intermediate_size=80,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=500,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6,
        max_position_embeddings=4096,
        **OWN_KEYS.get(architecture, {}),
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
        ({"head_dim": None}, "head_dim", 12),
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
def test_variants(tmp_path, change, field, value) -> None:
    shape = load_model_shape(write(tmp_path, QWEN3 | change))
    assert shape == dataclasses.replace(SHAPE, **{field: value})


@pytest.mark.parametrize(
    ("absent", "field", "value"),
    [
        ("head_dim", "head_dim", 12),
        ("num_key_value_heads", "num_kv_heads", 4),
        ("tie_word_embeddings", "tied", False),
        ("rope_theta", "rope_theta", 1e4),
    ],
)
def test_defaults_of_absent_keys(tmp_path, absent, field, value) -> None:
    raw = {key: v for key, v in QWEN3.items() if key != absent}
    shape = load_model_shape(write(tmp_path, raw))
    assert shape == dataclasses.replace(SHAPE, **{field: value})


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"num_experts": None, "num_local_experts": 6}, "num_experts", 6),
        ({"num_experts_per_tok": 4}, "experts_per_token", 4),
        ({"norm_topk_prob": False}, "renormalised", False),
        ({"decoder_sparse_step": 1, "mlp_only_layers": []}, "num_experts", 12),
        ({"shared_expert_intermediate_size": 40}, "shared_ffn_size", 0),
        ({"qkv_bias": True, "router_aux_loss_coef": 0.1}, "num_experts", 12),
    ],
)
def test_variants_of_experts(tmp_path, change, field, value) -> None:
    """Qwen3-MoE has no shared expert, whatever its file says."""
    shape = load_model_shape(write(tmp_path, QWEN3_MOE | change))
    assert shape.moe == dataclasses.replace(EXPERTS, **{field: value})


def test_defaults_of_absent_keys_of_experts(tmp_path) -> None:
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
def test_a_missing_key_of_experts_is_named(tmp_path, key) -> None:
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
def test_a_missing_key_is_named(tmp_path, key) -> None:
    raw = {name: value for name, value in QWEN3.items() if name != key}
    message = refusal(write(tmp_path, raw))
    assert str(tmp_path / "config.json") in message and f"key '{key}' is missing" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope type llama3"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type yarn"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope type linear"),
        ({"attention_bias": True}, "attention_bias"),
        ({"architectures": ["LlamaForCausalLM"], "attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act other than silu"),
    ],
)
def test_an_unsupported_option_is_named(tmp_path, change, words) -> None:
    message = refusal(write(tmp_path, QWEN3 | change))
    assert message == f"{tmp_path / 'config.json'}: {words} is not supported"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (MISTRAL | {"sliding_window": 4096}, "sliding_window 4096 (other than null)"),
        (MISTRAL | {"attention_bias": True}, "attention_bias"),
        (QWEN3_MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step other than 1"),
        (QWEN3_MOE | {"mlp_only_layers": [0]}, "mlp_only_layers"),
        (QWEN3_MOE | {"attention_bias": True}, "attention_bias"),
        (QWEN3_MOE | {"num_experts_per_tok": 1}, "norm_topk_prob with one expert per token"),
        (QWEN2_MOE | {"mlp_only_layers": [1, 2]}, "mlp_only_layers"),
        (QWEN2_MOE | {"qkv_bias": False}, "qkv_bias other than true"),
        (QWEN2_MOE | {"use_sliding_window": True}, "use_sliding_window"),
    ],
)
def test_an_unsupported_option_of_a_family(tmp_path, raw, words) -> None:
    message = refusal(write(tmp_path, raw))
    assert message == f"{tmp_path / 'config.json'}: {words} is not supported"


def test_mistral_slides_unless_told_not_to(tmp_path) -> None:
    """Without the key transformers' own default is a window of 4096."""
    raw = {key: value for key, value in MISTRAL.items() if key != "sliding_window"}
    assert "sliding_window 4096" in refusal(write(tmp_path, raw))


def test_one_expert_per_token_without_scaling(tmp_path) -> None:
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
def test_an_unsupported_architecture(tmp_path, architectures, name) -> None:
    message = refusal(write(tmp_path, QWEN3 | {"architectures": architectures}))
    assert f"architecture {name} is not supported" in message
    assert all(known in message for known in FLAGS)


def test_what_is_missing_on_disk(tmp_path) -> None:
    nowhere = tmp_path / "nowhere"
    assert refusal(nowhere) == f"model.path: no such directory: {nowhere}"
    assert refusal(tmp_path) == f"model.path: {tmp_path} has no config.json"
    write(tmp_path, QWEN3)
    (tmp_path / "model.safetensors").unlink()
    assert refusal(tmp_path) == f"model.path: {tmp_path} has no *.safetensors files"


def test_broken_json_says_the_line(tmp_path) -> None:
    message = refusal(write(tmp_path, '{\n  "vocab_size": 5,\n  oops\n}'))
    assert message.startswith(f"{tmp_path / 'config.json'}:3: ")


def test_a_config_that_is_no_object(tmp_path) -> None:
    assert "config.json" in refusal(write(tmp_path, [QWEN3]))


def layout(
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    ep: int = 1,
    cp: int = 1,
    first: int | None = None,
    last: int | None = None,
    engine_tp: int = 1,
    prompt: int = 16,
    response: int = 16,
) -> Config:
    return Config(
        data=DataConfig(max_prompt_length=prompt),
        policy=PolicyConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            context_parallel_size=cp,
            data_parallel_size=dp,
            expert_model_parallel_size=ep,
            num_layers_in_first_pipeline_stage=first,
            num_layers_in_last_pipeline_stage=last,
        ),
        rollout=RolloutConfig(max_response_length=response, tensor_model_parallel_size=engine_tp),
    )


def model(**changes: Any) -> ModelShape:
    return dataclasses.replace(SHAPE, **changes)


def problem(config: Config, shape: ModelShape) -> str | None:
    """The message of the refusal; None when the layout is accepted."""
    try:
        check_layout(config, shape)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


def tp_config(section: str, size: int) -> Config:
    return layout(tp=size) if section == "policy" else layout(engine_tp=size)


SECTIONS = pytest.mark.parametrize("section", ["policy", "rollout"])


@SECTIONS
@pytest.mark.parametrize(
    ("heads", "kv_heads", "ffn", "size", "words"),
    [
        (12, 12, 48, 5, ["12 attention heads", "[1, 2, 3, 4, 6, 12]"]),
        (12, 12, 48, 24, ["12 attention heads", "[1, 2, 3, 4, 6, 12]"]),
        (12, 4, 48, 3, ["4 key-value heads", "one must divide the other"]),
        (12, 4, 48, 6, ["4 key-value heads", "one must divide the other"]),
        (8, 8, 30, 4, ["intermediate_size 30"]),
    ],
)
def test_tensor_parallel_refusals(section, heads, kv_heads, ffn, size, words) -> None:
    message = problem(
        tp_config(section, size), model(num_heads=heads, num_kv_heads=kv_heads, ffn_size=ffn)
    )
    assert message is not None and message.startswith(
        f"{section}.tensor_model_parallel_size={size} "
    )
    assert all(word in message for word in words), message


@SECTIONS
@pytest.mark.parametrize(
    ("heads", "kv_heads", "ffn", "size"),
    [(12, 4, 48, 1), (12, 4, 48, 2), (12, 4, 48, 4), (12, 4, 48, 12), (7, 7, 49, 7)],
)
def test_legal_tensor_parallel_sizes(section, heads, kv_heads, ffn, size) -> None:
    shape = model(num_heads=heads, num_kv_heads=kv_heads, ffn_size=ffn, head_dim=12)
    assert problem(tp_config(section, size), shape) is None


@SECTIONS
@pytest.mark.parametrize(
    ("heads", "kv_heads", "ffn"), [(14, 2, 4864), (9, 3, 1536), (12, 2, 8960), (28, 4, 18944)]
)
def test_sizes_called_legal_are_those_accepted(section, heads, kv_heads, ffn) -> None:
    """Real models: Qwen2.5 0.5B, SmolLM2 135M, Qwen2.5 1.5B and 7B."""
    shape = model(num_heads=heads, num_kv_heads=kv_heads, ffn_size=ffn, head_dim=64)
    message = problem(tp_config(section, 5), shape)
    assert message is not None
    listed = re.search(r"legal: (\[.*?\])", message)
    assert listed is not None, message
    accepted = [n for n in range(1, heads + 1) if problem(tp_config(section, n), shape) is None]
    assert ast.literal_eval(listed[1]) == accepted


def test_a_policy_size_that_does_not_divide_the_fused_projection() -> None:
    """3 heads + key + value of 32 rows are 160 rows, which Megatron refuses to cut into 3.

    The engine keeps a copy of the key-value head on each rank, and can."""
    shape = model(num_heads=3, num_kv_heads=1, head_dim=32, ffn_size=48)
    message = problem(layout(tp=3), shape)
    assert message is not None and message.startswith("policy.tensor_model_parallel_size=3 ")
    assert problem(layout(engine_tp=3), shape) is None


@SECTIONS
@pytest.mark.parametrize(
    ("experts", "size", "words"),
    [
        ({"ffn_size": 10}, 4, "moe_intermediate_size 10"),
        ({"shared_ffn_size": 10}, 4, "shared_expert_intermediate_size 10"),
    ],
)
def test_tensor_parallel_refusals_of_experts(section, experts, size, words) -> None:
    moe = dataclasses.replace(EXPERTS, **experts)
    message = problem(tp_config(section, size), model(num_kv_heads=4, moe=moe))
    assert message == (
        f"{section}.tensor_model_parallel_size={size} does not divide the model's {words}; "
        f"legal: [1, 2]"
    )


@SECTIONS
def test_the_dense_size_of_a_model_with_experts_is_not_used(section) -> None:
    shape = model(num_kv_heads=4, ffn_size=3, moe=EXPERTS)
    assert problem(tp_config(section, 4), shape) is None


def test_an_engine_with_more_ranks_than_experts() -> None:
    """vLLM refuses; Megatron cuts each expert."""
    shape = model(num_kv_heads=4, moe=dataclasses.replace(EXPERTS, num_experts=2))
    assert problem(layout(tp=4), shape) is None
    assert problem(layout(engine_tp=4), shape) == (
        "rollout.tensor_model_parallel_size=4 is more than the model's 2 experts; legal: [1, 2]"
    )


def test_expert_parallel_sizes() -> None:
    assert problem(layout(dp=8, ep=4), model(moe=EXPERTS)) is None
    assert problem(layout(dp=8, ep=8), model(moe=EXPERTS)) == (
        "policy.expert_model_parallel_size=8 does not divide the model's 12 experts; "
        "legal: [1, 2, 4]"
    )
    assert problem(layout(dp=2, ep=2), model()) == (
        "policy.expert_model_parallel_size=2, but Qwen3ForCausalLM has no experts; expected 1"
    )


def test_experts_do_not_share_rows() -> None:
    assert problem(layout(cp=2), model()) is None
    assert problem(layout(cp=2), model(moe=EXPERTS)) == (
        "policy.context_parallel_size=2, but Qwen3ForCausalLM has experts; expected 1"
    )


def stages_exist(layers: int, pp: int, first: int | None, last: int | None) -> bool:
    """By trying every even middle: all stages have layers, and they add up."""
    for middle in range(1, layers + 1):
        stages = [middle] * pp
        stages[0] = first or stages[0]
        stages[-1] = last or stages[-1]
        if sum(stages) == layers:
            return True
    return False


@pytest.mark.parametrize("pp", [2, 3, 4])
def test_pipeline_stages_against_brute_force(pp) -> None:
    ends = (None, 1, 2, 3, 4)
    outcomes = set()
    for layers, first, last in product(range(1, 11), ends, ends):
        exists = stages_exist(layers, pp, first, last)
        accepted = problem(layout(pp=pp, first=first, last=last), model(num_layers=layers)) is None
        assert accepted == exists, (layers, first, last)
        outcomes.add(accepted)
    assert outcomes == {True, False}


def test_a_single_stage_holds_all_layers() -> None:
    """Both ends are the same stage: 2 first and 2 last layers are not 4."""
    shape = model(num_layers=4)
    assert problem(layout(), shape) is None
    assert problem(layout(first=2), shape) is not None
    assert problem(layout(last=3), shape) is not None
    assert problem(layout(first=2, last=2), shape) is not None


def test_the_message_of_a_pipeline_that_does_not_fit() -> None:
    message = problem(layout(pp=4), model(num_layers=30))
    assert message is not None
    assert message.startswith("policy.pipeline_model_parallel_size=4 ")
    assert "30 layers" in message
    assert "policy.num_layers_in_first_pipeline_stage" in message
    assert "policy.num_layers_in_last_pipeline_stage" in message


def test_the_longest_sequence_against_max_position_embeddings() -> None:
    shape = model(max_position_embeddings=100)
    assert problem(layout(prompt=60, response=40), shape) is None
    message = problem(layout(prompt=60, response=41), shape)
    assert message == (
        "data.max_prompt_length + rollout.max_response_length = 101 is more than the model's "
        "max_position_embeddings 100"
    )


@pytest.mark.parametrize(
    ("vocab", "tp", "expected"),
    [
        (1, 1, 128),
        (128, 1, 128),
        (129, 1, 256),
        (128, 2, 256),
        (320, 3, 384),
        (151936, 1, 151936),
        (151936, 4, 152064),
        (49152, 8, 49152),
    ],
)
def test_padded_vocab_size(vocab, tp, expected) -> None:
    assert padded_vocab_size(model(vocab_size=vocab), tp) == expected
