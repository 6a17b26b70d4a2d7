"""The pure parts of the rollout: dispatch, seeds, conversion, resources, logs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpg_megatron.config.sections import RolloutConfig, ValidationConfig
from gpg_megatron.errors import UserError
from gpg_megatron.rollout.engine import sanitize_environment
from gpg_megatron.rollout.failures import with_log
from gpg_megatron.rollout.ray_session import check_resources
from gpg_megatron.rollout.sampling import (
    Sampled,
    SamplingRequest,
    canary_params,
    from_vllm,
    greedy,
    routing_of,
    stream_seed,
    to_completions,
    training_params,
    validation_params,
)
from gpg_megatron.rollout.spec import EngineSpec
from gpg_megatron.types import NO_ROUTING, Prompt, SamplingParams, VersionSpan
from tests.samples import float32, int32, plain


def _request(
    i: int = 0, *, length: int = 3, n: int = 2, max_tokens: int = 4, seed: int = 1
) -> SamplingRequest:
    prompt = Prompt(
        id=f"d/{i}",
        token_ids=int32(range(length)),
        messages=(),
        ground_truth="",
        data_source="d",
    )
    params = SamplingParams(
        n=n, temperature=1.0, top_p=1.0, top_k=-1, max_tokens=max_tokens, stop=(), seed=seed
    )
    return SamplingRequest(prompt=prompt, params=params)


ROLLOUT = RolloutConfig(
    n=8, temperature=0.9, top_p=0.8, top_k=50, max_response_length=100, stop=("\n\n",)
)


def test_params_come_from_the_sections() -> None:
    """Held-out answers end where training's do; everything else is the section's own."""
    training = SamplingParams(
        n=8, temperature=0.9, top_p=0.8, top_k=50, max_tokens=100, stop=("\n\n",), seed=3
    )
    assert training_params(ROLLOUT, seed=3) == training
    validation = ValidationConfig(n=4, temperature=0.6, top_p=0.95, top_k=20)
    held_out = replace(training, n=4, temperature=0.6, top_p=0.95, top_k=20)
    assert validation_params(validation, ROLLOUT, seed=3) == held_out
    assert greedy(held_out) == replace(held_out, n=1, temperature=0.0, top_p=1.0, top_k=-1)


@pytest.mark.parametrize(("longest", "tokens"), [(100, 32), (20, 20)])
def test_the_canary_is_short_and_of_the_whole_distribution(longest: int, tokens: int) -> None:
    found = canary_params(replace(ROLLOUT, max_response_length=longest), seed=3)
    assert found == SamplingParams(
        n=1, temperature=0.9, top_p=1.0, top_k=-1, max_tokens=tokens, stop=("\n\n",), seed=3
    )


def test_stream_seed_is_fixed_and_keeps_streams_apart() -> None:
    assert stream_seed(_request(3, seed=7)) == stream_seed(_request(3, seed=7))
    seeds = [stream_seed(_request(i, seed=s)) for i in range(20) for s in range(20)]
    assert len(set(seeds)) == 400
    assert all(0 <= s < 1 << 31 for s in seeds)
    # vLLM adds the sample's index: ranges of 8 samples must not touch each other.
    assert all(abs(a - b) >= 8 for i, a in enumerate(seeds) for b in seeds[:i])


def test_from_vllm_keeps_tokens_logprobs_and_spans() -> None:
    outputs = [
        SimpleNamespace(
            token_ids=[5, 6][:n],
            logprobs=SimpleNamespace(start_indices=[0, 1][:n], logprobs=[-0.5, -1.5][:n]),
            finish_reason="stop",
            text="ab"[:n],
            weight_versions=[SimpleNamespace(version="3", start=0, end=n)],
        )
        for n in (2, 1)
    ]
    assert plain(from_vllm(outputs)) == plain(
        Sampled(
            lengths=(2, 1),
            token_ids=int32((5, 6, 5)),
            logprobs=float32((-0.5, -1.5, -0.5)),
            finish_reasons=("stop", "stop"),
            texts=("ab", "a"),
            versions=((("3", 0, 2),), (("3", 0, 1),)),
        )
    )


SAMPLED = Sampled(
    lengths=(0, 3),
    token_ids=int32((5, 6, 7)),
    logprobs=float32((-0.5, -1.5, -2.5)),
    finish_reasons=("stop", "length"),
    texts=("", "abc"),
    versions=((), (("3", 0, 1), ("4", 1, 3))),
)


def test_completion_carries_the_version_of_every_token() -> None:
    empty, completion = to_completions(_request(2), SAMPLED)
    assert (completion.prompt_id, completion.index) == ("d/2", 1)
    assert (completion.text, completion.token_ids.tolist()) == ("abc", [5, 6, 7])
    assert (len(empty.token_ids), empty.versions) == (0, ())
    assert completion.versions == (
        VersionSpan(version=3, start=0, end=1),
        VersionSpan(version=4, start=1, end=3),
    )


def test_the_rows_of_a_sample_are_cut_at_the_last_token_of_the_prompt() -> None:
    """A prompt of 3 tokens. The last of a response was never computed; the second sample was
    stopped early, of the third the engine knows nothing."""
    rows = np.arange(5, dtype=np.uint8).reshape(5, 1, 1)
    whole, short, none = routing_of([rows, rows[:3] + 10, None], 3, (3, 3, 1))
    assert whole.prompt.flatten().tolist() == [0, 1]
    assert whole.prompt is short.prompt is none.prompt
    assert whole.response.flatten().tolist() == [2, 3, 4]
    assert short.response.flatten().tolist() == [12]
    assert len(none.response) == 0
    # A row more than there are tokens: the request ran on after its end.
    (longer,) = routing_of([rows], 3, (2,))
    assert longer.response.flatten().tolist() == [2, 3]


def test_what_crosses_is_a_copy_and_that_of_the_prompt_is_one() -> None:
    rows = np.arange(5, dtype=np.uint8).reshape(5, 1, 1)
    routing = routing_of([rows, rows], 3, (0, 3))
    a, b = to_completions(_request(2), replace(SAMPLED, routing=routing))
    assert a.routing.prompt is b.routing.prompt
    assert not np.shares_memory(b.routing.response, rows)
    assert b.routing.response.flatten().tolist() == [2, 3, 4]
    (_, bare) = to_completions(_request(2), SAMPLED)
    assert bare.routing is NO_ROUTING


@pytest.mark.parametrize(
    "changes",
    [
        {"versions": ((), ())},
        {"versions": ((), (("3", 0, 2),))},
        {"versions": ((), (("3", 0, 1), ("4", 2, 3)))},
        {"logprobs": float32((-0.5,))},
        {"finish_reasons": ("stop", "abort")},
        {"finish_reasons": (None, "length")},
    ],
)
def test_a_sample_that_is_not_whole_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        to_completions(_request(), replace(SAMPLED, **changes))


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
def test_resources_that_do_not_fit_are_named(
    nodes: list[dict[str, float]], gpus: int, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        check_resources(nodes, num_engines=2, gpus_per_engine=gpus)


def test_the_error_ends_with_the_last_lines_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "engine_0.log"
    assert with_log("it failed", log) == "it failed"
    log.write_text("\n".join(f"line {i}" for i in range(100)) + "\n\n")
    lines = with_log("it failed", log).splitlines()
    assert lines[:2] == ["it failed", f"last lines of {log}:"]
    assert lines[2:] == [f"  line {i}" for i in range(85, 100)]


def test_the_policy_ranks_environment_does_not_reach_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment = {**leaking, "HOME": "/home/me"}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)))
    spec = EngineSpec(
        rollout=RolloutConfig(num_engines=2),
        model_path="m",
        device="cpu",
        max_model_len=8,
        max_num_seqs=1,
        max_num_batched_tokens=8,
        worker_extension="a.B",
        scratch=tmp_path,
    )
    sanitize_environment(spec)
    assert set(environment) & set(leaking) == {"OMP_NUM_THREADS"}
    assert environment["OMP_NUM_THREADS"] == "3"  # 7 cores for 2 engines of one worker
    assert environment["HOME"] == "/home/me"
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert environment["TMPDIR"] == str(tmp_path / "tmp")
