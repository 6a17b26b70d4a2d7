"""Every object that crosses from one room into another.

    Prompt -> Completion -> ScoredGroup -> TrainSample -> TrainBatch (+ Anchors) -> StepResult

All of them are frozen, slotted and keyword-only, and a field exists only once it is true:
nothing here is None until later. Those with arrays compare by identity.

Shape legend: L tokens of a response, G responses of a group, T tokens and S segments of a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

Tokens = npt.NDArray[np.int32]
LogProbs = npt.NDArray[np.float32]
Experts = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
"""Numbers of experts, [tokens, layers, experts per token]. All layers of the model count,
and those of one without experts mean nothing."""
UNROUTED = -1
"""In the place of an expert that is not known."""
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""The names of the configuration -> what parameters are stored and computed in."""
FinishReason = Literal["stop", "length"]
PolicyPart = Literal["parameters", "gradients", "optimizer"]
"""What a policy rank holds between its updates. optimizer: moments and fp32 master weights."""
EnginePart = Literal["weights", "kv_cache"]
"""What an engine worker holds; the names are vLLM's tags."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """One problem, rendered and tokenised."""

    id: str
    """Unique among the prompts of training or of validation; the same in every epoch."""
    token_ids: Tokens
    """What the engine is given, special tokens included."""
    messages: tuple[Mapping[str, str], ...]
    """The chat messages {role, content} that token_ids were rendered from."""
    ground_truth: str
    """The reference answer, as the scorer of data_source expects it."""
    data_source: str
    """Chooses the scorer and groups the evaluation metrics."""
    extra_info: Any = field(default_factory=dict)
    """The row's own, for reward functions of users; {} where the row has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a prompt is answered: in training, in validation, by the canary and by gpg-eval."""

    n: int
    """Samples."""
    temperature: float
    """0: the most likely token."""
    top_p: float
    """1.0: off."""
    top_k: int
    """-1: off."""
    max_tokens: int
    """Of one response."""
    stop: tuple[str, ...]
    """Strings that end a response. The stop string stays part of it; that of a special token is a
    token of it and not in its text."""
    seed: int
    """The same seed, prompt and weights give the same samples. Prompts of one batch may have
    equal or consecutive seeds: their random streams do not overlap."""

    def __post_init__(self) -> None:
        assert self.n >= 1 and self.max_tokens >= 1 and self.temperature >= 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Tokens [start, end) of a completion were sampled from one weight version."""

    version: int
    """Optimizer steps done by the weights that sampled these tokens."""
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routing:
    """The experts to which an engine sent the tokens of one sample.

    Rows are missing at the end where the engine said no more, all of them where it said nothing.
    """

    prompt: Experts
    """Of the tokens of the prompt but the last, as one sample of the group had them: the same array
    for all."""
    response: Experts
    """Row t is that of the position that predicts token t of the response."""


NO_ROUTING = Routing(prompt=np.empty((0, 0, 0), np.uint8), response=np.empty((0, 0, 0), np.uint8))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Completion:
    """One sampled answer."""

    prompt_id: str
    index: int
    """Position in its group, 0 .. G-1."""
    token_ids: Tokens
    """[L] response tokens, the end-of-sequence token included when it was sampled."""
    logprobs: LogProbs
    """[L] natural, under the sampling distribution (after temperature), as the engine has them."""
    finish_reason: FinishReason
    text: str
    """The response decoded without special tokens."""
    versions: tuple[VersionSpan, ...]
    """Contiguous, covering [0, L)."""
    routing: Routing = NO_ROUTING


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """The verdict on one completion."""

    score: float
    """What the policy gradient uses."""
    accuracy: float
    """1.0 right, 0.0 wrong; decides whether a group is dead. Equals score for 0/1 scorers."""
    parts: Mapping[str, float]
    """Named components for the metrics, for example {"exact_match": 1.0}."""
    answer: str | None = None
    """What the scorer read as the answer, equal answers in one spelling; None: it found none."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredGroup:
    """One prompt with its G completions and their rewards."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: tuple[Reward, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainSample:
    """One prompt + response with the scalar that multiplies its log-probabilities."""

    prompt_id: str
    group: int
    """Index of its group within the rollout batch."""
    index: int
    """Index of the sample within its group."""
    prompt_token_ids: Tokens
    response_token_ids: Tokens
    """[L]; every one of them carries loss."""
    rollout_logprobs: LogProbs
    """[L] from the engine."""
    advantage: float
    """alpha * (r_i - baseline) / F_norm; exactly 0.0 for a sample that carries no gradient.
    Where alpha counts over less than the rollout batch, each update multiplies in its own."""
    version: int
    """The oldest weight version that sampled a token of the response."""
    live: bool
    """Its group has answers of different worth."""
    score: float
    """r_i."""
    routing: Routing = NO_ROUTING


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """S segments packed without padding into one row of T tokens.

    A segment is a sequence, prompt and response, or a part of sequences that share their
    prompt: the prompt without its last token, which is computed once and carries no loss, and
    then for each response the prompt's last token and the response without its last token.
    Every position of such a response also attends to the whole prompt segment.

    Position t predicts token t+1: labels, mask, weights and log-probs are already shifted.
    """

    input_ids_T: torch.Tensor
    """int64 [T]."""
    position_ids_T: torch.Tensor
    """int64 [T]; counted within the sequence, so a response goes on where its prompt ended."""
    labels_T: torch.Tensor
    """int64 [T]; token t+1 of the same sequence, 0 where a sequence ends."""
    cu_seqlens_S1: torch.Tensor
    """int32 [S+1]; segment s occupies [cu_seqlens[s], cu_seqlens[s+1])."""
    prompt_S: torch.Tensor
    """int32 [S]; the segment that holds the prompt of segment s, -1 where it is not shared."""
    loss_mask_T: torch.Tensor
    """bool [T]; True where labels_T is a response token."""
    advantages_T: torch.Tensor
    """float32 [T]; the advantage of the sequence, 0 where the mask is False."""
    weights_T: torch.Tensor
    """float32 [T]; aggregation weight 1/denominator of the token over the whole global
    batch, 0 where the mask is False. The loss is -sum(logprob * advantage * weight)."""
    rollout_logprobs_T: torch.Tensor
    """float32 [T]; 0 where the mask is False."""
    responses_T: torch.Tensor
    """int64 [T]; the response, from 0, that the label belongs to; 0 where the mask is False."""
    experts_T: torch.Tensor
    """int16 [T, layers, experts per token]; UNROUTED where they are unknown. [T, 0, 0]: all are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """What one data-parallel rank computes in one optimizer step."""

    micro_batches: Sequence[MicroBatch]
    """This rank's part, each packed when it is asked for; the same number on every rank. Empty
    when no sample of the global batch carries gradient: the step is skipped."""
    n_computed_tokens: int
    """Prompt and response tokens that go through the network, all ranks."""
    n_skipped_tokens: int
    """Prompt and response tokens of samples without gradient, all ranks."""
    n_shared_tokens: int
    """Tokens of the other samples that were not computed, because samples share a prompt."""
    n_loss_tokens: int
    """Positions that predict a response token, all ranks."""
    unrouted: float
    """Share of the computed positions that a log-prob depends on whose experts are not known."""
    flops: float
    """Floating-point operations that the computed tokens need, all ranks; see flops.TokenCosts."""
    alpha: float
    """What the update's own alpha multiplied the advantages by; the mean over its micro-steps."""
    whole_alpha: float
    """All of alpha in this update, that of the rollout batch included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchors:
    """Log-probs that stay fixed while a rollout batch is learned from, for one TrainBatch: fp32
    [masked-in positions] for each micro-batch of this rank; none where the objective needs none."""

    old: tuple[torch.Tensor, ...] = ()
    """Of the policy before the first update of the rollout batch."""
    reference: tuple[torch.Tensor, ...] = ()
    """Of the model that training began with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one optimizer step did. The same on every rank."""

    version: int
    """Optimizer steps done so far, this one included."""
    updated: bool
    """False when the step was skipped (no live sample, a non-finite gradient, or is_held)."""
    loss: float
    grad_norm: float
    lr: float
    metrics: Mapping[str, float]
    """Further metrics under their names in metrics.jsonl."""
    is_held: bool = False
    """The policy had moved too far from what sampled the answers (algorithm.target_kl)."""

    @property
    def is_bad(self) -> bool:
        """Skipped because the loss or the gradient is not finite."""
        return not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPosition:
    """Where one policy rank stands in the parallel grid."""

    rank: int
    """Among all policy ranks."""
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
