"""config.json as published with models: shapes and no warning; and what a file may not be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpg_megatron.errors import UserError
from gpg_megatron.model.shape import load_model_shape, shape_warnings
from tests.unit.published import QWEN3_30B_A3B

GENERAL = {"initializer_range": 0.02, "use_cache": True, "hidden_act": "silu"}
QWEN = GENERAL | {
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "rms_norm_eps": 1e-06, "torch_dtype": "bfloat16", "use_sliding_window": False,
}  # fmt: skip
QWEN2_7B_INSTRUCT = QWEN | {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944,
    "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2",
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
    "transformers_version": "4.41.2", "vocab_size": 152064,
}  # fmt: skip
QWEN25_72B = QWEN | {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 8192, "intermediate_size": 29568,
    "max_position_embeddings": 131072, "max_window_layers": 80, "model_type": "qwen2",
    "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": 131072,
    "tie_word_embeddings": False, "transformers_version": "4.40.1", "use_mrope": False,
    "vocab_size": 152064,
}  # fmt: skip
QWEN3_8B = QWEN | {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128,
    "hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 40960,
    "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32,
    "num_hidden_layers": 36, "num_key_value_heads": 8, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
    "transformers_version": "4.51.0", "vocab_size": 151936,
}  # fmt: skip
QWEN15_MOE = QWEN | {
    "architectures": ["Qwen2MoeForCausalLM"], "decoder_sparse_step": 1, "hidden_size": 2048,
    "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
    "model_type": "qwen2_moe", "moe_intermediate_size": 1408, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 16, "output_router_logits": False,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
    "tie_word_embeddings": False, "transformers_version": "4.39.0.dev0", "vocab_size": 151936,
}  # fmt: skip
LLAMA2_7B = GENERAL | {
    "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096, "intermediate_size": 11008,
    "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
    "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "vocab_size": 32000,
}  # fmt: skip
TINY_LLAMA = GENERAL | {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_size": 2048, "intermediate_size": 5632,
    "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 22, "num_key_value_heads": 4, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.35.0",
    "vocab_size": 32000,
}  # fmt: skip
MISTRAL_7B_V03 = GENERAL | {
    "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.42.0.dev0", "vocab_size": 32768,
}  # fmt: skip
LLAMA31_8B = GENERAL | {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3", "vocab_size": 128256,
}  # fmt: skip
SMOLLM2_135M = GENERAL | {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 0, "eos_token_id": 0, "hidden_size": 576, "initializer_range": 0.041666666,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192,
    "mlp_bias": False, "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
    "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
    "vocab_size": 49152,
}  # fmt: skip


WHOLE = "expected a whole number (without point or quotes)"


def write(directory: Path, content: bytes | dict[str, Any]) -> Path:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (directory / "config.json").write_bytes(text)
    return directory


@pytest.mark.parametrize(
    ("raw", "head_dim", "rope_theta", "tied"),
    [
        (QWEN2_7B_INSTRUCT, 128, 1e6, False),
        (QWEN25_72B, 128, 1e6, False),
        (QWEN3_8B, 128, 1e6, False),
        (QWEN3_30B_A3B, 128, 1e6, False),
        (QWEN15_MOE, 128, 1e6, False),
        (LLAMA2_7B, 128, 1e4, False),
        (TINY_LLAMA, 64, 1e4, False),
        (MISTRAL_7B_V03, 128, 1e6, False),
        (LLAMA31_8B, 128, 5e5, False),
        (SMOLLM2_135M, 64, 1e5, True),
    ],
)
def test_a_published_file(
    tmp_path: Path, raw: Any, head_dim: Any, rope_theta: Any, tied: Any
) -> None:
    shape = load_model_shape(write(tmp_path, raw), need_weights=False)
    assert shape_warnings(tmp_path) == []
    assert (shape.head_dim, shape.rope_theta, shape.tied) == (head_dim, rope_theta, tied)
    assert shape.num_layers == raw["num_hidden_layers"] and shape.ffn_size > shape.hidden_size
    assert shape.num_kv_heads == raw["num_key_value_heads"]
    assert shape.num_experts == raw.get("num_experts", 0)


def refusal(directory: Path) -> str:
    """What is wrong, without the file's name."""
    with pytest.raises(UserError) as caught:
        load_model_shape(directory, need_weights=False)
    message, where = str(caught.value), str(directory / "config.json")
    assert message.startswith(where) and "\n" not in message
    return message.removeprefix(where)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "4"}, f'hidden_size is "4"; {WHOLE}'),
        ({"hidden_size": 128.0}, f"hidden_size is 128.0; {WHOLE}"),
        ({"num_hidden_layers": True}, f"num_hidden_layers is true; {WHOLE}"),
        ({"hidden_size": [4]}, f"hidden_size is a list; {WHOLE}"),
        ({"vocab_size": 0}, "vocab_size is 0; expected 1 to 2147483647"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1; expected 1 to 10000"),
        ({"rms_norm_eps": 1}, "rms_norm_eps is 1; expected a number with a point or exponent"),
        ({"head_dim": None}, f"head_dim is null; {WHOLE}"),
        ({"head_dim": 7}, "the size of a head is 7; rotary embeddings need an even number"),
        (
            {"num_key_value_heads": 5},
            "num_key_value_heads 5 does not divide num_attention_heads 32",
        ),
        ({"rope_theta": None}, "rope_theta is null; expected a number above 0"),
        ({"rope_theta": "1e6"}, 'rope_theta is "1e6"; expected a number above 0'),
        ({"rope_scaling": "yarn"}, 'rope_scaling is "yarn"; expected an object or null'),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1 is not supported"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor other than 1 is not supported",
        ),
        (
            {"rope_scaling": {"type": "default", "mrope_section": [1]}},
            "rope_scaling.mrope_section is not supported",
        ),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config (quantised weights) is not supported",
        ),
        (
            {"architectures": "Qwen3ForCausalLM"},
            'architectures is "Qwen3ForCausalLM"; expected a list with a name',
        ),
        ({"model_type": "qwen2"}, 'model_type is "qwen2"; expected "qwen3" for Qwen3ForCausalLM'),
        (
            {"max_sequence_length": 99},
            "max_sequence_length is 99; expected max_position_embeddings 40960 or more",
        ),
        (
            {"layer_types": ["sliding_attention"] * 36},
            "layer_types other than full_attention is not supported",
        ),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries; num_hidden_layers is 36"),
    ],
)
def test_a_value_that_cannot_be_meant(tmp_path: Path, change: Any, message: Any) -> None:
    assert refusal(write(tmp_path, QWEN3_8B | change)) == f": {message}"


def test_of_two_ropes_the_older_name_counts(tmp_path: Path) -> None:
    """As in transformers: rope_scaling, and in it the file's rope_theta."""
    both = {"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": {"rope_type": "default"}}
    shape = load_model_shape(write(tmp_path, QWEN3_8B | both), need_weights=False)
    assert shape.rope_theta == 1e6


def test_a_model_type_and_a_default_that_are_not_there(tmp_path: Path) -> None:
    raw = {k: v for k, v in QWEN3_8B.items() if k != "model_type"}
    words = ': model_type is missing; expected "qwen3" for Qwen3ForCausalLM'
    assert refusal(write(tmp_path, raw)) == words
    raw = {k: v for k, v in QWEN25_72B.items() if k != "num_key_value_heads"}
    words = ": num_key_value_heads 32 (the family's default) does not divide num_attention_heads 40"
    assert refusal(write(tmp_path, raw | {"num_attention_heads": 40})) == words


def test_unknown_keys_are_named_once(tmp_path: Path) -> None:
    own = {"zebra": 1, "a\nb": {}, "rope_scaling": {"type": "default", "factor": 4.0}}
    assert shape_warnings(write(tmp_path, QWEN3_8B | own)) == [
        f"{tmp_path / 'config.json'}: unknown keys, which have no effect here: "
        f"a\\nb, zebra, rope_scaling.factor"
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, ": nested too deeply"),
        (b'{"a": ' * 100_000, ": nested too deeply"),
        (b'{"vocab_size": ' + b"7" * 5000 + b"}", ": Exceeds the limit (4300 digits) for integer"),
        (b'{"x": NaN}', ": NaN is not a number in JSON"),
        (b'{"x": [-Infinity]}', ": -Infinity is not a number in JSON"),
        (b'{"x": "\\ud800"}', ": a lone surrogate"),
        (b'{"x": "\xff"}', ": not UTF-8 at byte 7"),
        (b'{\n"x": 1,\n}', ":3: "),
        (b"", ":1: "),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", ": a git-lfs pointer"),
        (b"[1]", ": expected a JSON object"),
    ],
)
def test_a_file_that_is_no_object(tmp_path: Path, content: Any, message: Any) -> None:
    assert refusal(write(tmp_path, content)).startswith(message)


def test_a_directory_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    assert refusal(tmp_path) == ": cannot be read: Is a directory"


def test_a_quantisation_beside_it(tmp_path: Path) -> None:
    (write(tmp_path, QWEN3_8B) / "hf_quant_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"hf_quant_config\.json: quantised weights are not"):
        load_model_shape(tmp_path, need_weights=False)
