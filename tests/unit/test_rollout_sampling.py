"""The pure parts of the rollout: spreading, seeds, conversion, resources, logs."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.errors import UserError
from gpg_megatron.rollout.engine import EngineSpec, sanitize_environment
from gpg_megatron.rollout.failures import with_log
from gpg_megatron.rollout.ray_session import check_resources
from gpg_megatron.rollout.sampling import (
    Sampled,
    SamplingRequest,
    from_vllm,
    spread,
    stream_seed,
    to_completion,
)
from gpg_megatron.types import Prompt, VersionSpan


def _request(i: int = 0, *, length: int = 3, n: int = 2, max_tokens: int = 4, seed: int = 1):
    prompt = Prompt(
        id=f"d/{i}",
        token_ids=tuple(range(length)),
        messages=(),
        ground_truth="",
        data_source="d",
    )
    return SamplingRequest(
        prompt=prompt,
        n=n,
        temperature=1.0,
        top_p=1.0,
        top_k=-1,
        max_tokens=max_tokens,
        stop=(),
        seed=seed,
    )


def test_spread_by_hand() -> None:
    """Costs 103, 13, 13, 13, 63: the long one alone, then always the emptier engine."""
    requests = [_request(i, n=1, max_tokens=m) for i, m in enumerate((100, 10, 10, 10, 60))]
    assert spread(requests, 2) == [[0], [4, 1, 2, 3]]


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 8), st.integers(1, 99)), max_size=30),
    st.integers(1, 5),
)
def test_spread_gives_each_request_once_and_balances(sizes, engines: int) -> None:
    requests = [_request(i, length=p, n=n, max_tokens=m) for i, (p, n, m) in enumerate(sizes)]
    parts = spread(requests, engines)
    assert sorted(i for part in parts for i in part) == list(range(len(requests)))
    costs = [p + n * m for p, n, m in sizes]
    loads = [sum(costs[i] for i in part) for part in parts]
    # Moving any one request from the fullest to the emptiest engine would not help.
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_stream_seed_is_fixed_and_keeps_streams_apart() -> None:
    assert stream_seed(_request(3, seed=7)) == stream_seed(_request(3, seed=7))
    seeds = [stream_seed(_request(i, seed=s)) for i in range(20) for s in range(20)]
    assert len(set(seeds)) == 400
    assert all(0 <= s < 1 << 31 for s in seeds)
    # vLLM adds the sample's index: ranges of 8 samples must not touch each other.
    assert all(abs(a - b) >= 8 for i, a in enumerate(seeds) for b in seeds[:i])


def test_from_vllm_keeps_tokens_logprobs_and_spans() -> None:
    output = SimpleNamespace(
        token_ids=[5, 6],
        logprobs=SimpleNamespace(start_indices=[0, 1], logprobs=[-0.5, -1.5]),
        finish_reason="stop",
        text="ab",
        weight_versions=[SimpleNamespace(version="3", start=0, end=2)],
    )
    assert from_vllm(output) == Sampled(
        token_ids=(5, 6),
        logprobs=(-0.5, -1.5),
        finish_reason="stop",
        text="ab",
        versions=(("3", 0, 2),),
    )


def _sampled(**changes) -> Sampled:
    values = {
        "token_ids": (5, 6, 7),
        "logprobs": (-0.5, -1.5, -2.5),
        "finish_reason": "length",
        "text": "abc",
        "versions": (("3", 0, 1), ("4", 1, 3)),
    }
    return Sampled(**{**values, **changes})


def test_completion_carries_the_version_of_every_token() -> None:
    completion = to_completion(_request(2), 1, _sampled())
    assert (completion.prompt_id, completion.index) == ("d/2", 1)
    assert completion.versions == (
        VersionSpan(version=3, start=0, end=1),
        VersionSpan(version=4, start=1, end=3),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"versions": ()},
        {"versions": (("3", 0, 2),)},
        {"versions": (("3", 0, 1), ("4", 2, 3))},
        {"logprobs": (-0.5,)},
        {"finish_reason": "abort"},
        {"finish_reason": None},
    ],
)
def test_a_sample_that_is_not_whole_is_refused(changes) -> None:
    with pytest.raises(AssertionError):
        to_completion(_request(), 0, _sampled(**changes))


def test_resources_that_fit() -> None:
    check_resources([{"CPU": 2.0}], num_engines=2, gpus_per_engine=0)
    check_resources(
        [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}], num_engines=3, gpus_per_engine=2
    )


@pytest.mark.parametrize(
    ("nodes", "gpus", "words"),
    [
        ([{"CPU": 1.0}], 0, "2 engines of 1 CPU are asked for, room for 1"),
        ([{"CPU": 8.0}], 2, "room for 0"),
        ([{"CPU": 8.0, "GPU": 3.0}, {"CPU": 8.0, "GPU": 1.0}], 2, "3 GPU; 8 CPU, 1 GPU"),
    ],
)
def test_resources_that_do_not_fit_are_named(nodes, gpus: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_resources(nodes, num_engines=2, gpus_per_engine=gpus)


def test_the_error_ends_with_the_last_lines_of_the_log(tmp_path) -> None:
    log = tmp_path / "engine_0.log"
    assert with_log("it failed", log) == "it failed"
    log.write_text("\n".join(f"line {i}" for i in range(100)) + "\n\n")
    lines = with_log("it failed", log).splitlines()
    assert lines[:2] == ["it failed", f"last lines of {log}:"]
    assert lines[2:] == [f"  line {i}" for i in range(85, 100)]


def _spec(tmp_path, tp: int = 1) -> EngineSpec:
    return EngineSpec(
        random_weights=False,
        model_path="m",
        device="cpu",
        dtype="float32",
        tensor_parallel_size=tp,
        max_model_len=8,
        max_num_seqs=1,
        gpu_memory_utilization=0.5,
        kv_cache_bytes=1,
        enforce_eager=True,
        gives_memory_back=False,
        worker_extension="a.B",
        weight_transfer=None,
        cpu_threads=3,
        scratch=str(tmp_path),
    )


def test_the_policy_ranks_environment_does_not_reach_the_engine(tmp_path, monkeypatch) -> None:
    leaking = {
        "RANK": "0",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
        "GROUP_RANK": "0",
        "ROLE_RANK": "0",
        "TORCHELASTIC_RUN_ID": "x",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "OMP_NUM_THREADS": "1",
    }
    environment = {**leaking, "HOME": "/home/me"}
    monkeypatch.setattr(os, "environ", environment)
    sanitize_environment(_spec(tmp_path))
    assert set(environment) & set(leaking) == {"OMP_NUM_THREADS"}
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["HOME"] == "/home/me"
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert environment["TMPDIR"] == str(tmp_path / "tmp")
