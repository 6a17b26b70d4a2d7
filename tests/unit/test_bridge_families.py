"""The table of parameters against names written by hand and against transformers' own files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from gpg_megatron.errors import UserError
from gpg_megatron.layout.boxes import Shard
from gpg_megatron.layout.families import pieces_of
from gpg_megatron.layout.topology import hf_shapes
from gpg_megatron.shapes import ModelShape

# All different, so that no dimension can be taken for another.
LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, PADDED_VOCAB = 2, 24, 40, 4, 2, 8, 50, 128
FLAGS: dict[str, dict[str, Any]] = {
    "Qwen2ForCausalLM": {"qkv_bias": True, "qk_norm": False},
    "Qwen3ForCausalLM": {"qkv_bias": False, "qk_norm": True},
    "LlamaForCausalLM": {"qkv_bias": True, "qk_norm": False, "output_bias": True, "mlp_bias": True},
}
CASES = [(architecture, tied) for architecture in FLAGS for tied in (True, False)]

# The second table is once in each layer, under "decoder.layers.N.".
MEGATRON_SHAPES = {
    "embedding.word_embeddings.weight": (PADDED_VOCAB, HIDDEN),
    "decoder.final_layernorm.weight": (HIDDEN,),
    "output_layer.weight": (PADDED_VOCAB, HIDDEN),
}
MEGATRON_LAYER_SHAPES = {
    "input_layernorm.weight": (HIDDEN,),
    "self_attention.linear_qkv.weight": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    "self_attention.linear_qkv.bias": ((HEADS + 2 * KV_HEADS) * HEAD_DIM,),
    "self_attention.q_layernorm.weight": (HEAD_DIM,),
    "self_attention.k_layernorm.weight": (HEAD_DIM,),
    "self_attention.linear_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
    "self_attention.linear_proj.bias": (HIDDEN,),
    "pre_mlp_layernorm.weight": (HIDDEN,),
    "mlp.linear_fc1.weight": (2 * FFN, HIDDEN),
    "mlp.linear_fc2.weight": (HIDDEN, FFN),
    "mlp.linear_fc1.bias": (2 * FFN,),
    "mlp.linear_fc2.bias": (HIDDEN,),
}


def model_shape(architecture: str, *, tied: bool = False) -> ModelShape:
    return ModelShape(
        architecture=architecture,
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_size=FFN,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=VOCAB,
        tied=tied,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        max_position_embeddings=64,
        **FLAGS[architecture],
    )


def megatron_shapes(model: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every parameter of the local layer spec on a single rank."""
    absent = {
        "self_attention.linear_qkv.bias": not model.qkv_bias,
        "self_attention.linear_proj.bias": not model.output_bias,
        "mlp.linear_fc1.bias": not model.mlp_bias,
        "mlp.linear_fc2.bias": not model.mlp_bias,
        "self_attention.q_layernorm.weight": not model.qk_norm,
        "self_attention.k_layernorm.weight": not model.qk_norm,
    }
    return MEGATRON_SHAPES | {
        f"decoder.layers.{layer}.{name}": shape
        for layer in range(LAYERS)
        for name, shape in MEGATRON_LAYER_SHAPES.items()
        if not absent.get(name)
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, bool], Path]:
    """For each case the file that transformers writes."""
    import transformers

    files = {}
    for architecture, tied in CASES:
        family = architecture.removesuffix("ForCausalLM")
        config = getattr(transformers, f"{family}Config")(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            tie_word_embeddings=tied,
            **({"attention_bias": True, "mlp_bias": True} if family == "Llama" else {}),
        )
        directory = tmp_path_factory.mktemp("model")
        getattr(transformers, architecture)(config).save_pretrained(directory)
        files[architecture, tied] = directory / "model.safetensors"
    return files


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(("architecture", "tied"), CASES)
def test_hf_shapes_are_what_transformers_writes(
    written: Mapping[tuple[str, bool], Path], architecture: str, tied: bool
) -> None:
    shapes = hf_shapes(model_shape(architecture, tied=tied))
    assert shapes == shapes_in(written[architecture, tied])


@pytest.mark.parametrize(("architecture", "tied"), CASES)
def test_one_rank_holds_every_tensor_of_the_file(
    written: Mapping[tuple[str, bool], Path], architecture: str, tied: bool
) -> None:
    model = model_shape(architecture, tied=tied)
    shapes = shapes_in(written[architecture, tied])
    elements = dict.fromkeys(shapes, 0)
    for name, shape in megatron_shapes(model).items():
        if tied and name == "output_layer.weight":
            continue
        for piece in pieces_of(name, Shard(shape, 0, 1), model):
            bounds = zip(piece.hf.ranges, shapes[piece.hf_name], strict=True)
            assert all(0 <= start < stop <= n for (start, stop), n in bounds)
            elements[piece.hf_name] += piece.hf.numel
    assert elements == {name: math.prod(shape) for name, shape in shapes.items()}


Q_THEN_K_THEN_V = ("q", "k", "v", "q", "k", "v")


@pytest.mark.parametrize(
    ("architecture", "name", "expected"),
    [
        ("Qwen2", "embedding.word_embeddings.weight", ["model.embed_tokens.weight"]),
        ("Llama", "decoder.final_layernorm.weight", ["model.norm.weight"]),
        ("Qwen3", "output_layer.weight", ["lm_head.weight"]),
        (
            "Qwen2",
            "decoder.layers.1.self_attention.linear_qkv.bias",
            [f"model.layers.1.self_attn.{x}_proj.bias" for x in Q_THEN_K_THEN_V],
        ),
        (
            "Llama",
            "decoder.layers.0.self_attention.linear_qkv.weight",
            [f"model.layers.0.self_attn.{x}_proj.weight" for x in Q_THEN_K_THEN_V],
        ),
        (
            "Qwen3",
            "decoder.layers.1.self_attention.q_layernorm.weight",
            ["model.layers.1.self_attn.q_norm.weight"],
        ),
        (
            "Qwen3",
            "decoder.layers.0.self_attention.k_layernorm.weight",
            ["model.layers.0.self_attn.k_norm.weight"],
        ),
        (
            "Llama",
            "decoder.layers.1.input_layernorm.weight",
            ["model.layers.1.input_layernorm.weight"],
        ),
        (
            "Qwen2",
            "decoder.layers.1.pre_mlp_layernorm.weight",
            ["model.layers.1.post_attention_layernorm.weight"],
        ),
        (
            "Qwen2",
            "decoder.layers.0.self_attention.linear_proj.weight",
            ["model.layers.0.self_attn.o_proj.weight"],
        ),
        (
            "Llama",
            "decoder.layers.1.mlp.linear_fc1.weight",
            ["model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"],
        ),
        (
            "Qwen3",
            "decoder.layers.0.mlp.linear_fc2.weight",
            ["model.layers.0.mlp.down_proj.weight"],
        ),
        (
            "Llama",
            "decoder.layers.0.self_attention.linear_proj.bias",
            ["model.layers.0.self_attn.o_proj.bias"],
        ),
        (
            "Llama",
            "decoder.layers.1.mlp.linear_fc1.bias",
            ["model.layers.1.mlp.gate_proj.bias", "model.layers.1.mlp.up_proj.bias"],
        ),
        (
            "Llama",
            "decoder.layers.1.mlp.linear_fc2.bias",
            ["model.layers.1.mlp.down_proj.bias"],
        ),
    ],
)
def test_names_by_hand(architecture: str, name: str, expected: list[str]) -> None:
    """In the order in which they stand in the Megatron parameter."""
    model = model_shape(f"{architecture}ForCausalLM")
    pieces = pieces_of(name, Shard(megatron_shapes(model)[name], 0, 1), model)
    in_order = sorted(pieces, key=lambda piece: piece.local.ranges)
    assert [piece.hf_name for piece in in_order] == expected


def test_the_layer_number_may_have_several_digits() -> None:
    (piece,) = pieces_of(
        "decoder.layers.107.mlp.linear_fc2.weight",
        Shard((HIDDEN, FFN), 0, 1),
        model_shape("LlamaForCausalLM"),
    )
    assert piece.hf_name == "model.layers.107.mlp.down_proj.weight"


def test_the_output_layer_of_a_tied_model_is_the_embedding() -> None:
    model = model_shape("Qwen2ForCausalLM", tied=True)
    shard = Shard((PADDED_VOCAB, HIDDEN), 0, 1)
    assert pieces_of("output_layer.weight", shard, model) == pieces_of(
        "embedding.word_embeddings.weight", shard, model
    )


@pytest.mark.parametrize(
    ("local_spec", "transformer_engine"),
    [
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ],
)
def test_both_layer_specs_mean_the_same_tensor(local_spec: str, transformer_engine: str) -> None:
    model, shard = model_shape("Qwen3ForCausalLM"), Shard((HIDDEN,), 0, 1)
    assert pieces_of(f"decoder.layers.1.{transformer_engine}", shard, model) == pieces_of(
        f"decoder.layers.1.{local_spec}", shard, model
    )


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("Qwen3ForCausalLM", "decoder.layers.0.self_attention.linear_qkv.bias"),
        ("Qwen2ForCausalLM", "decoder.layers.0.self_attention.q_layernorm.weight"),
        ("Qwen2ForCausalLM", "decoder.layers.3.mlp.router.weight"),
        ("Qwen2ForCausalLM", "decoder.layers.0.mlp.linear_fc1.bias"),
        ("Qwen2ForCausalLM", "decoder.final_layernorm.bias"),
        ("Qwen2ForCausalLM", "module.embedding.word_embeddings.weight"),
        ("Qwen2ForCausalLM", "module.decoder.layers.0.input_layernorm.weight"),
    ],
)
def test_a_parameter_without_a_row_is_named(architecture: str, name: str) -> None:
    with pytest.raises(UserError) as caught:
        pieces_of(name, Shard((8, 8), 0, 1), model_shape(architecture))
    assert name in str(caught.value) and architecture in str(caught.value)
    assert "\n" not in str(caught.value)
