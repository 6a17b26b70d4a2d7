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
    NO_ROUTING,
    Completion,
    Experts,
    FinishReason,
    LogProbs,
    Prompt,
    Routing,
    SamplingParams,
    Tokens,
    VersionSpan,
)

CANARY_TOKENS = 32
FINISH_REASONS = get_args(FinishReason)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRequest:
    """params.n samples of one prompt."""

    prompt: Prompt
    params: SamplingParams
    with_routing: bool = False
    """The experts that the tokens were sent to come too; with rollout.router_replay only."""

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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sampled:
    """The samples of one request as the engine's actor returns them."""

    lengths: tuple[int, ...]
    """Tokens of each."""
    token_ids: Tokens
    """One sample after the other, as are their log-probs."""
    logprobs: LogProbs
    finish_reasons: tuple[str | None, ...]
    texts: tuple[str, ...]
    versions: tuple[tuple[tuple[str, int, int], ...], ...]
    """Of each sample (label, start, end)."""
    routing: tuple[Routing, ...] = ()
    """Of each sample, where it was asked for."""


def routing_of(
    rows: Sequence[Experts | None], n_prompt: int, lengths: Sequence[int]
) -> tuple[Routing, ...]:
    """Of each sample of a request, from what the engine recorded of it: the rows of its prompt of
    n_prompt tokens and of its response but the last token, or less, or None."""
    known = [NO_ROUTING.prompt if row is None else row for row in rows]
    prompt = max((row[: n_prompt - 1] for row in known), key=len)
    return tuple(
        Routing(prompt=prompt, response=row[n_prompt - 1 : n_prompt - 1 + length])
        for row, length in zip(known, lengths, strict=True)
    )


def from_vllm(outputs: Sequence[Any], routing: tuple[Routing, ...] = ()) -> Sampled:
    """Of vllm.outputs.CompletionOutput with flat log-probs, in the order of their indices."""
    for o in outputs:
        starts = list(o.logprobs.start_indices)
        assert starts == list(range(len(o.token_ids))), "one log-prob per token"
    return Sampled(
        lengths=tuple(len(o.token_ids) for o in outputs),
        token_ids=np.array([token for o in outputs for token in o.token_ids], np.int32),
        logprobs=np.array([value for o in outputs for value in o.logprobs.logprobs], np.float32),
        # Where a request was stopped, its answers end as they would at the length limit.
        finish_reasons=tuple(
            "length" if o.finish_reason == "abort" else o.finish_reason for o in outputs
        ),
        texts=tuple(o.text for o in outputs),
        versions=tuple(
            tuple((s.version, s.start, s.end) for s in o.weight_versions or ()) for o in outputs
        ),
        routing=routing,
    )


def to_completions(request: SamplingRequest, sampled: Sampled) -> list[Completion]:
    """The completions that cross to the other rooms; their arrays are views of one copy.

    vLLM labels spans with the string that an update's commit gave it.
    """
    n_tokens = sum(sampled.lengths)
    assert n_tokens == len(sampled.token_ids) == len(sampled.logprobs), "one log-prob per token"
    # Ray's own lie in its store, and fill it as long as anything refers to them.
    token_ids, logprobs = sampled.token_ids.copy(), sampled.logprobs.copy()
    routing = _copied(sampled.routing) or [NO_ROUTING] * len(sampled.lengths)
    completions, end = [], 0
    for index, length in enumerate(sampled.lengths):
        reason, versions = sampled.finish_reasons[index], sampled.versions[index]
        assert reason in FINISH_REASONS, (
            f"prompt {request.prompt.id}: the engine ended a sample with {reason!r}"
        )
        edges = [0, *(stop for _, _, stop in versions)]
        assert edges[-1] == length, "uncovered tokens"
        assert edges[:-1] == [start for _, start, _ in versions], "spans are not contiguous"
        begin, end = end, end + length
        completions.append(
            Completion(
                prompt_id=request.prompt.id,
                index=index,
                token_ids=token_ids[begin:end],
                logprobs=logprobs[begin:end],
                finish_reason=cast(FinishReason, reason),
                text=sampled.texts[index],
                versions=tuple(
                    VersionSpan(version=int(label), start=start, end=stop)
                    for label, start, stop in versions
                ),
                routing=routing[index],
            )
        )
    return completions


def _copied(routing: Sequence[Routing]) -> list[Routing]:
    """That of the prompt once."""
    shared = [one.prompt.copy() for one in routing[:1]]
    return [Routing(prompt=shared[0], response=one.response.copy()) for one in routing]
