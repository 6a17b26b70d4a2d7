"""Engines and policy must agree about log-probabilities, or the engines have other weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpg_megatron.errors import RunError
from gpg_megatron.types import Completion, MicroBatch, Prompt, StepResult, TrainSample

STEP_FACTOR = 10.0


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
    )


def check_canary(
    pairs: Sequence[tuple[Prompt, Completion]],
    batch: MicroBatch,
    logprobs: torch.Tensor,
    limit: float,
) -> float:
    """Compare the first samples of the engines with the policy's log-probs.

    Args:
        batch: all of the pairs, packed.
        logprobs: [response tokens of batch], the policy's.

    Returns:
        the largest difference, nats.

    Raises:
        MismatchError: it exceeds the limit, or is no number.
    """
    gaps = (logprobs - batch.rollout_logprobs_T[batch.loss_mask_T]).abs()
    gap = gaps.max().item()
    if not gap <= limit:
        raise MismatchError(
            f"after the first sync the engines' log-probs differ from the policy's by "
            f"{gap:.2g} (limit {limit:g}, bridge.canary_tolerance; {_worst(pairs, gaps)}); "
            f"refusing to train"
        )
    return gap


def check_mismatch(step: int, result: StepResult, limit: float) -> None:
    """Rollouts that are all of the present weights against the policy's first update.

    The limit is that of the first sync on the mean, and STEP_FACTOR times as much on a single
    token: the error of a log-prob grows with how unlikely the token is, and a run samples many.

    Raises:
        MismatchError
    """
    for name, most in (("mean", limit), ("max", STEP_FACTOR * limit)):
        gap = result.metrics.get(f"mismatch/logprob_{name}", 0.0)
        if gap > most:
            raise MismatchError(
                f"step {step}: the rollouts' log-probs differ from the policy's by {gap:.2g} "
                f"({name} over the tokens; limit {most:g}, from bridge.canary_tolerance); the "
                f"last sync went wrong"
            )


def _worst(pairs: Sequence[tuple[Prompt, Completion]], gaps: torch.Tensor) -> str:
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
