"""Engines and policy must agree about log-probabilities, or the engines have other weights.

Two right programs differ because they round in different places. An error of the logits moves the
log-prob of a token of probability p by about its share of 1 - p: d log p_i = d l_i - sum p_v d l_v.
So what is judged is sum |engine - policy| / sum (1 - p), which depends neither on how sure the
model is nor on which tokens were drawn. Its limit is FACTOR times what it is between the policy
and the policy rounded in other places.

Shape legend: N response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from gpg_megatron.errors import RunError
from gpg_megatron.types import Completion, Prompt, TrainSample

FACTOR = 3.0
"""SmolLM2-135M, engine against policy over the policy against itself: 0.7 in bf16, 1.0 with one
side in fp32."""
FLOOR = 1e-4
"""Nats, added to the limit: what fp32 is judged by."""
FAR = 30.0
"""How many times the limit of an unlikely token a single one may be off: the largest of millions
says little, and expert routers jump."""


class MismatchError(RunError):
    """Engine and policy disagree about log-probabilities: the engine has other weights."""

    everywhere = True


def canary_sample(prompt: Prompt, completion: Completion) -> TrainSample:
    """A completion of the engines as the policy takes it."""
    return TrainSample(
        prompt_id=prompt.id,
        group=0,
        index=0,
        prompt_token_ids=prompt.token_ids,
        response_token_ids=completion.token_ids,
        rollout_logprobs=completion.logprobs,
        advantage=1.0,
        version=0,
        live=True,
        score=1.0,
        routing=completion.routing,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """Engine against policy, over some tokens."""

    mean: float
    """Of |engine - policy|, nats."""
    largest: float
    unlikely: float
    """Mean of 1 - p of the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Of the mean of |engine - policy|, nats."""

    floor: float
    slope: float
    """Added to the floor for each unit of 1 - p."""

    def of(self, found: Distance) -> float:
        """For tokens as unlikely as these."""
        return self.floor + self.slope * found.unlikely

    @property
    def far(self) -> float:
        """For any single token."""
        return FAR * (self.floor + self.slope)


def distance(engine_N: torch.Tensor, policy_N: torch.Tensor) -> Distance:
    """Of log-probs of the same tokens, at least one."""
    gap_N = (engine_N - policy_N).abs().double()
    return Distance(
        mean=gap_N.mean().item(),
        largest=gap_N.max().item(),
        unlikely=-torch.expm1(engine_N.double()).mean().item(),
    )


def step_distance(metrics: Mapping[str, float]) -> Distance | None:
    """That of an update's metrics; None: it computed nothing."""
    if "mismatch/logprob_mean" not in metrics:
        return None
    return Distance(
        mean=metrics["mismatch/logprob_mean"],
        largest=metrics["mismatch/logprob_max"],
        unlikely=metrics["mismatch/unlikely_mean"],
    )


def measured_limit(policy_N: torch.Tensor, rounded: Sequence[torch.Tensor]) -> Limit:
    """The limit for a model whose log-probs are policy_N and, rounded elsewhere, `rounded`."""
    moved = torch.stack([(policy_N - other_N).abs() for other_N in rounded]).double().mean()
    unlikely = -torch.expm1(policy_N.double()).mean()
    return Limit(floor=FLOOR, slope=FACTOR * (moved / unlikely.clamp(min=1e-6)).item())


def judge(found: Distance, limit: Limit, when: str, detail: str = "") -> None:
    """
    Args:
        when: the beginning of the message.
        detail: its end.

    Raises:
        MismatchError: the mean or a single token exceeds its limit, or is no number.
    """
    for name, gap, most in (
        ("in the mean", found.mean, limit.of(found)),
        ("at one token", found.largest, limit.far),
    ):
        if not gap <= most:
            raise MismatchError(
                f"{when}: the engines' log-probs differ from the policy's by {gap:.2g} {name}, "
                f"the limit is {most:.2g} ({_origin(limit)}){detail and '; '}{detail}; the "
                f"engines have other weights or compute something else"
            )


def _origin(limit: Limit) -> str:
    if limit.slope:
        return f"measured: {FACTOR:g} times what rounding does to the policy's own"
    return "from bridge.canary_tolerance"


def worst_token(pairs: Sequence[tuple[Prompt, Completion]], gaps: torch.Tensor) -> str:
    """Where the largest gap is, and how many are nearly as large; gaps [all response tokens]."""
    index = int(gaps.nan_to_num(nan=torch.inf).argmax())
    similar = int((gaps > gaps[index] / 3).sum())
    for prompt, completion in pairs:
        if index < len(completion.token_ids):
            return (
                f"worst at prompt {prompt.id}, token {index}, where the engine says "
                f"{completion.logprobs[index]:.6f}; {similar} of {len(gaps)} tokens are similar"
            )
        index -= len(completion.token_ids)
    raise AssertionError("a gap for each response token")
