"""What vLLM is started with, and what a user may add to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from benchmarks.large_layouts import QWEN2_7B
from gpg_megatron.config.loading import config_yaml, load_config
from gpg_megatron.config.sections import Config, DataConfig, RolloutConfig
from gpg_megatron.errors import UserError
from gpg_megatron.placement.memory import (
    EngineLimits,
    EngineMemory,
    engine_limits,
    engine_memory,
)
from gpg_megatron.rollout.engine_args import TAKEN, check_engine_args, engine_args, vllm_fields
from gpg_megatron.rollout.spec import EngineSpec
from tests.unit.test_memory import config_of

FURTHER: dict[str, Any] = {
    "kv_cache_dtype": "fp8",
    "async_scheduling": True,
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
}


def spec_of(device: Literal["cpu", "cuda"], **keys: Any) -> EngineSpec:
    return EngineSpec(
        rollout=RolloutConfig(engine_args=keys),
        model_path="m",
        device=device,
        max_model_len=64,
        max_num_seqs=8,
        max_num_batched_tokens=128,
        worker_extension="a.B",
        weight_transfer="bridge",
        scratch=Path("/x"),
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_users_arguments_reach_vllm_as_they_are(device: Literal["cpu", "cuda"]) -> None:
    plain, more = engine_args(spec_of(device)), engine_args(spec_of(device, **FURTHER))
    assert more == {**plain, **FURTHER}
    assert (plain["max_num_seqs"], plain["max_num_batched_tokens"]) == (8, 128)


def test_states_are_not_kept_for_prompts_that_are_not_cut() -> None:
    for device, kept in (("cpu", False), ("cuda", True)):
        spec = replace(spec_of(device), has_states=True)  # type: ignore[arg-type]
        assert engine_args(spec)["enable_prefix_caching"] is kept
        assert engine_args(replace(spec, has_states=False))["enable_prefix_caching"] is True


def test_latent_attention_does_without_a_kernel_that_is_wrong_on_a_cpu() -> None:
    off = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
    for device, more in (("cpu", off), ("cuda", {})):
        spec = spec_of(device)  # type: ignore[arg-type]
        others = engine_args(spec)
        others.pop("block_size", None)
        assert engine_args(replace(spec, is_latent=True)) == others | more


def test_on_a_cpu_the_blocks_that_answers_share_are_small() -> None:
    assert engine_args(spec_of("cpu"))["block_size"] == 32
    assert engine_args(spec_of("cpu", block_size=128))["block_size"] == 128
    for spec in (
        spec_of("cuda"),
        replace(spec_of("cpu"), is_latent=True),
        replace(spec_of("cpu"), has_states=True),
    ):
        assert "block_size" not in engine_args(spec)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_engines_say_where_they_send_their_tokens(device: Literal["cpu", "cuda"]) -> None:
    """On a CPU the recorder does, which sees only what is computed."""
    plain = spec_of(device)
    replayed = replace(plain, rollout=replace(plain.rollout, router_replay=True))
    key = {"cpu": "enable_prefix_caching", "cuda": "enable_return_routed_experts"}[device]
    assert engine_args(replayed) == engine_args(plain) | {key: device == "cuda"}


def test_they_come_from_the_file_and_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "data: {train_files: [a]}\nmodel: {path: m}\n"
        "rollout: {engine_args: {async_scheduling: true}}"
    )
    more = "{kv_cache_dtype: fp8, speculative_config: {method: ngram, num_speculative_tokens: 3}}"
    config = load_config(file, [f"rollout.engine_args={more}"])
    assert config.rollout.engine_args == FURTHER
    file.write_text(config_yaml(config))
    assert load_config(file) == config


def test_the_table_of_taken_keys_is_vllms() -> None:
    assert TAKEN.keys() <= vllm_fields()
    assert FURTHER.keys() <= vllm_fields() - TAKEN.keys()
    check_engine_args(RolloutConfig(engine_args=FURTHER))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("max_num_seqs", "rollout.engine_args.max_num_seqs cannot be set here: it is rollout.max_"),
        ("logprobs_mode", "cannot be set here: engine and policy must agree on it"),
        ("pipeline_parallel_size", "cannot be set here: an engine has rollout.tensor_model_par"),
        ("kv_cache_dtyp", "kv_cache_dtyp: vLLM does not know it; did you mean kv_cache_dtype?"),
        ("qqq", "qqq: vLLM does not know it; expected a field of its EngineArgs"),
    ],
)
def test_other_keys_are_refused_by_name(key: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        check_engine_args(RolloutConfig(engine_args={key: 1}))
    assert message in str(refused.value)


def limits(kv_tokens: int, *, on_gpu: bool = True, **keys: Any) -> EngineLimits:
    """With sequences of 1,024 + 1,024 tokens."""
    engine = EngineMemory(reserved=0, parameters=0, kv_cache=kv_tokens * 8, kv_bytes_per_token=8)
    config = Config(data=DataConfig(max_prompt_length=1024), rollout=RolloutConfig(**keys))
    return engine_limits(config, engine, on_gpu=on_gpu)


@pytest.mark.parametrize(
    ("kv_tokens", "n_seqs", "n_tokens"),
    [
        (0, 256, 2048),
        (100_000, 256, 2048),  # 48 sequences of full length, 3,125 tokens
        (300_000, 256, 8192),  # 146; 9,375
        (1_000_000, 488, 16384),  # 488; 31,250
        (9_000_000, 1024, 16384),  # 4,394
    ],
)
def test_limits_follow_from_the_cache(kv_tokens: int, n_seqs: int, n_tokens: int) -> None:
    expected = EngineLimits(max_num_seqs=n_seqs, max_num_batched_tokens=n_tokens)
    assert limits(kv_tokens) == expected


def test_keys_that_are_set_win() -> None:
    both = limits(10**6, max_num_seqs=7, max_num_batched_tokens=70)
    assert both == EngineLimits(max_num_seqs=7, max_num_batched_tokens=70)
    assert limits(10**6, max_num_batched_tokens=300).max_num_seqs == 300
    assert limits(10**5, max_num_seqs=3000).max_num_batched_tokens == 3000


def test_on_cpu_they_do_not_depend_on_the_cache() -> None:
    for kv_tokens in (10**3, 10**7):
        assert limits(kv_tokens, on_gpu=False) == EngineLimits(
            max_num_seqs=256, max_num_batched_tokens=8192
        )
    with pytest.raises(UserError, match="max_num_batched_tokens is 2000; on CPU vLLM does not cut"):
        limits(10**6, on_gpu=False, max_num_batched_tokens=2000)
    long = limits(10**6, on_gpu=False, max_response_length=9000)
    assert long.max_num_batched_tokens == 10_024


def test_a_cache_of_fp8_holds_twice_as_many_tokens() -> None:
    config = config_of()
    low = replace(
        config, rollout=replace(config.rollout, engine_args={"kv_cache_dtype": "fp8_e4m3"})
    )
    bf16, fp8 = (
        engine_memory(c, QWEN2_7B, n_parameters=10**9, device_bytes=80 * 2**30)
        for c in (config, low)
    )
    assert bf16.kv_bytes_per_token == 2 * fp8.kv_bytes_per_token
