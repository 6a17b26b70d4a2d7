"""How prompts are answered, as the sections say it, and what comes back.

Shape legend: L response tokens of one completion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast, get_args

import numpy as np

from gpg_megatron.config.sections import RolloutConfig, ValidationConfig
from gpg_megatron.types import (
    Completion,
    FinishReason,
    LogProbs,
    Prompt,
    SamplingParams,
    Tokens,
    VersionSpan,
)

CANARY_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRequest:
    """params.n samples of one prompt."""

    prompt: Prompt
    params: SamplingParams

    def __post_init__(self) -> None:
        assert len(self.prompt.token_ids), f"prompt {self.prompt.id} is empty"


class Sampler(Protocol):
    """Answers requests: a fleet of engines, or what stands for one."""

    def generate(self, requests: Sequence[SamplingRequest]) -> list[Completion]:
        """All samples of all requests, in the requests' order, then by index."""


def training_params(rollout: RolloutConfig, *, seed: int) -> SamplingParams:
    """Of the prompts that are trained on."""
    return SamplingParams(
        n=rollout.n,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_tokens=rollout.max_response_length,
        stop=rollout.stop,
        seed=seed,
    )


def validation_params(
    validation: ValidationConfig, rollout: RolloutConfig, *, seed: int
) -> SamplingParams:
    """Of held-out prompts; responses end as in training. One seed for all prompts, so that two
    evaluations differ by the weights only."""
    return SamplingParams(
        n=validation.n,
        temperature=validation.temperature,
        top_p=validation.top_p,
        top_k=validation.top_k,
        max_tokens=rollout.max_response_length,
        stop=rollout.stop,
        seed=seed,
    )


def canary_params(rollout: RolloutConfig, *, seed: int) -> SamplingParams:
    """Of a short sample of the whole distribution, whose log-probs the policy can repeat."""
    params = training_params(rollout, seed=seed)
    limit = min(CANARY_TOKENS, params.max_tokens)
    return replace(params, n=1, max_tokens=limit, top_p=1.0, top_k=-1)


def greedy(params: SamplingParams) -> SamplingParams:
    """The same with the most likely token everywhere, once."""
    return replace(params, n=1, temperature=0.0, top_p=1.0, top_k=-1)


def stream_seed(request: SamplingRequest) -> int:
    """The engine's 31-bit seed for a request.

    vLLM seeds sample i of a request with seed + i, so consecutive seeds of neighbouring prompts
    would share random streams; hashing seed and prompt id keeps them apart.
    """
    text = f"{request.params.seed}/{request.prompt.id}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One sample of one request as the engine's actor returns it."""

    token_ids: Tokens
    logprobs: LogProbs
    finish_reason: str | None
    text: str
    versions: tuple[tuple[str, int, int], ...]
    """(label, start, end)."""


def from_vllm(output: Any) -> Sampled:
    """Of a vllm.outputs.CompletionOutput with flat log-probs."""
    flat = output.logprobs
    assert list(flat.start_indices) == list(range(len(output.token_ids))), "one log-prob per token"
    return Sampled(
        token_ids=np.array(output.token_ids, np.int32),
        logprobs=np.array(flat.logprobs, np.float32),
        # Where a request was stopped, its answers end as they would at the length limit.
        finish_reason="length" if output.finish_reason == "abort" else output.finish_reason,
        text=output.text,
        versions=tuple((s.version, s.start, s.end) for s in output.weight_versions or ()),
    )


def to_completion(request: SamplingRequest, index: int, sampled: Sampled) -> Completion:
    """The completion that crosses to the other rooms, with arrays of its own.

    vLLM labels spans with the string that an update's commit gave it.
    """
    assert sampled.finish_reason in get_args(FinishReason), (
        f"prompt {request.prompt.id}: the engine ended a sample with {sampled.finish_reason!r}"
    )
    spans = tuple(
        VersionSpan(version=int(label), start=start, end=end)
        for label, start, end in sampled.versions
    )
    edges = [0] + [span.end for span in spans]
    assert edges[-1] == len(sampled.token_ids) == len(sampled.logprobs), "uncovered tokens"
    assert edges[:-1] == [span.start for span in spans], "version spans are not contiguous"
    return Completion(
        prompt_id=request.prompt.id,
        index=index,
        # Copies: what Ray hands over lies in its store, and fills it as long as it is referred to.
        token_ids=sampled.token_ids.copy(),
        logprobs=sampled.logprobs.copy(),
        finish_reason=cast(FinishReason, sampled.finish_reason),
        text=sampled.text,
        versions=spans,
    )
