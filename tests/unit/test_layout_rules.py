"""The parallel sizes of a configuration against a model: what fits, and the legal values."""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from typing import Any

import pytest

from gpg_megatron.config.sections import Config, DataConfig, PolicyConfig, RolloutConfig
from gpg_megatron.errors import UserError
from gpg_megatron.model.layout_rules import (
    check_engine_packages,
    check_engine_type,
    check_layout,
)
from gpg_megatron.model.shape import padded_vocab_size
from gpg_megatron.shapes import ModelShape
from tests.unit.test_hf_config import EXPERTS, NETS, SHAPE


def layout(
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    ep: int = 1,
    cp: int = 1,
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
def test_tensor_parallel_refusals(
    section: Any, heads: Any, kv_heads: Any, ffn: Any, size: Any, words: Any
) -> None:
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
def test_legal_tensor_parallel_sizes(
    section: Any, heads: Any, kv_heads: Any, ffn: Any, size: Any
) -> None:
    shape = model(num_heads=heads, num_kv_heads=kv_heads, ffn_size=ffn, head_dim=12)
    assert problem(tp_config(section, size), shape) is None


@SECTIONS
@pytest.mark.parametrize(
    ("heads", "kv_heads", "ffn"), [(14, 2, 4864), (9, 3, 1536), (12, 2, 8960), (28, 4, 18944)]
)
def test_sizes_called_legal_are_those_accepted(
    section: Any, heads: Any, kv_heads: Any, ffn: Any
) -> None:
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
def test_tensor_parallel_refusals_of_experts(
    section: Any, experts: Any, size: Any, words: Any
) -> None:
    moe = dataclasses.replace(EXPERTS, **experts)
    message = problem(tp_config(section, size), model(num_kv_heads=4, moe=moe))
    assert message == (
        f"{section}.tensor_model_parallel_size={size} does not divide the model's {words}; "
        f"legal: [1, 2]"
    )


@SECTIONS
def test_the_dense_size_of_a_model_with_experts_is_not_used(section: Any) -> None:
    shape = model(num_kv_heads=4, ffn_size=3, moe=EXPERTS)
    assert problem(tp_config(section, 4), shape) is None


def test_layers_without_experts_are_cut_too() -> None:
    moe = dataclasses.replace(EXPERTS, dense_layers=(1,))
    message = problem(tp_config("policy", 4), model(num_kv_heads=4, ffn_size=6, moe=moe))
    assert message is not None and "does not divide the model's intermediate_size 6;" in message


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


def test_the_layers_and_the_pipeline_stages() -> None:
    assert problem(layout(pp=4), model(num_layers=30)) is None
    message = problem(layout(pp=4), model(num_layers=3))
    assert message is not None and message.startswith("policy.pipeline_model_parallel_size=4 ")


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
def test_padded_vocab_size(vocab: Any, tp: Any, expected: Any) -> None:
    assert padded_vocab_size(model(vocab_size=vocab), tp) == expected


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen2MoeForCausalLM"])
def test_heads_of_a_size_that_the_engine_does_not_read(architecture: Any) -> None:
    assert problem(layout(), model(architecture=architecture, head_dim=12)) is None
    assert problem(layout(), model(architecture=architecture, head_dim=16)) == (
        f"model.path: head_dim in config.json is 16; for {architecture} the engine knows only "
        f"hidden_size / num_attention_heads = 12"
    )


HYBRID = model(architecture="Qwen3_5ForCausalLM", num_layers=3, output_gate=True, delta=NETS)


def test_gated_delta_nets_are_cut_by_key_head_and_never_along_a_sequence() -> None:
    """Two key heads, four heads of attention."""
    assert problem(layout(tp=2, engine_tp=2), HYBRID) is None
    for section in ("policy", "rollout"):
        message = problem(tp_config(section, 4), HYBRID)
        assert message == (
            f"{section}.tensor_model_parallel_size=4 does not divide the model's "
            "linear_num_key_heads 2; legal: [1, 2]"
        )
    message = problem(layout(cp=2), HYBRID)
    assert message is not None and message.startswith("policy.context_parallel_size=2, but ")


def test_a_package_that_the_engine_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    check_engine_packages(SHAPE)
    with pytest.raises(UserError, match="vLLM's code of Qwen3_5ForCausalLM needs torchvision"):
        check_engine_packages(HYBRID)


def test_the_engine_has_gated_delta_nets_on_a_cpu_in_bf16_only() -> None:
    config = layout()
    fp32 = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, dtype="fp32"))
    check_engine_type(fp32, HYBRID, "cuda")
    check_engine_type(fp32, SHAPE, "cpu")
    check_engine_type(config, HYBRID, "cpu")
    with pytest.raises(UserError, match="in bf16 only; expected bf16"):
        check_engine_type(fp32, HYBRID, "cpu")


def test_router_replay_needs_experts_and_on_a_cpu_tokens_that_were_not_guessed() -> None:
    config = layout()
    replayed = dataclasses.replace(
        config, rollout=dataclasses.replace(config.rollout, router_replay=True)
    )
    assert problem(replayed, model(architecture="Qwen3MoeForCausalLM", moe=EXPERTS)) is None
    message = "rollout.router_replay is true, but Qwen3ForCausalLM has no experts; expected false"
    assert problem(replayed, SHAPE) == message
    guessing = dataclasses.replace(replayed.rollout, engine_args={"speculative_config": {}})
    for on_cpu in (False, True):
        both = dataclasses.replace(replayed, rollout=guessing)
        try:
            check_engine_type(both, SHAPE, "cpu" if on_cpu else "cuda")
            assert not on_cpu
        except UserError as error:
            assert on_cpu and "rollout.router_replay" in str(error)
