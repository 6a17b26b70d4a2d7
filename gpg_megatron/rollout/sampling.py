"""Requests to the engines and what comes back, as plain values.

Shape legend: L response tokens of one completion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from gpg_megatron.types import Completion, FinishReason, Prompt, VersionSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRequest:
    """n samples of one prompt."""

    prompt: Prompt
    n: int
    temperature: float
    top_p: float
    """1.0: off."""
    top_k: int
    """-1: off."""
    max_tokens: int
    stop: tuple[str, ...]
    """The stop string stays part of the response."""
    seed: int
    """The same seed, prompt and weights give the same samples. Requests of one batch may have
    consecutive seeds: their random streams do not overlap."""

    def __post_init__(self) -> None:
        assert self.n >= 1 and self.max_tokens >= 1 and self.temperature >= 0
        assert self.prompt.token_ids, f"prompt {self.prompt.id} is empty"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One sample of one request as the engine's actor returns it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str | None
    text: str
    versions: tuple[tuple[str, int, int], ...]
    """(label, start, end)."""


def stream_seed(request: SamplingRequest) -> int:
    """The engine's 31-bit seed for a request.

    vLLM seeds sample i of a request with seed + i, so consecutive seeds of neighbouring prompts
    would share random streams; hashing seed and prompt id keeps them apart.
    """
    text = f"{request.seed}/{request.prompt.id}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1


def largest_first(requests: Sequence[SamplingRequest]) -> list[int]:
    """Indices of the requests by their token limits, the largest first; ties in their order."""
    return sorted(range(len(requests)), key=lambda i: (-_cost(requests[i]), i))


def _cost(request: SamplingRequest) -> int:
    return len(request.prompt.token_ids) + request.n * request.max_tokens


def spread(requests: Sequence[SamplingRequest], num_engines: int) -> list[list[int]]:
    """Indices of the requests for each engine, balanced by their token limits.

    Largest first, each to the engine with the least so far; ties go to the lower index.
    """
    load = [0] * num_engines
    parts: list[list[int]] = [[] for _ in range(num_engines)]
    for i in largest_first(requests):
        engine = load.index(min(load))
        parts[engine].append(i)
        load[engine] += _cost(requests[i])
    return parts


def from_vllm(output: Any) -> Sampled:
    """Plain values of a vllm.outputs.CompletionOutput with flat log-probs."""
    flat = output.logprobs
    assert list(flat.start_indices) == list(range(len(output.token_ids))), "one log-prob per token"
    return Sampled(
        token_ids=tuple(output.token_ids),
        logprobs=tuple(flat.logprobs),
        finish_reason=output.finish_reason,
        text=output.text,
        versions=tuple((s.version, s.start, s.end) for s in output.weight_versions or ()),
    )


def to_completion(request: SamplingRequest, index: int, sampled: Sampled) -> Completion:
    """The completion that crosses to the other rooms.

    vLLM labels spans with the string that set_version gave it.
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
        token_ids=sampled.token_ids,
        logprobs=sampled.logprobs,
        finish_reason=cast(FinishReason, sampled.finish_reason),
        text=sampled.text,
        versions=spans,
    )
