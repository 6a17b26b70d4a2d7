"""What says that a run has collapsed: trainer.stop_on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpg_megatron.config.rules import STOP_SIGNS
from gpg_megatron.errors import RunError
from gpg_megatron.types import StepResult, TrainSample


class Collapsed(RunError):
    """A sign is beyond its limit."""

    everywhere = True


def signs(
    accuracy: float, samples: Sequence[TrainSample], results: Sequence[StepResult]
) -> dict[str, float]:
    """The signs of one step that it has.

    Args:
        accuracy: mean of the answers that the step drew.
        samples: that it learns from.
        results: of its updates.

    Returns:
        entropy: mean of -log-prob of the samples' tokens in the engine, nats, which is the entropy
            of the sampling distribution on average; kl: the largest of the updates'
            KL(engine || policy), by k3, nats; accuracy.
    """
    n_tokens = sum(len(sample.rollout_logprobs) for sample in samples)
    found = {"accuracy": accuracy}
    if n_tokens:
        found["entropy"] = -math.fsum(math.fsum(x.rollout_logprobs) for x in samples) / n_tokens
    distances = [r.metrics["mismatch/kl_k3"] for r in results if "mismatch/kl_k3" in r.metrics]
    if distances:
        found["kl"] = max(distances)
    return found


def verdict(step: int, found: Mapping[str, float], limits: Mapping[str, float]) -> str:
    """What is beyond its limit, in words; empty: nothing. A value that is no number is."""
    for name, limit in limits.items():
        is_most, value = STOP_SIGNS[name], found.get(name, limit)
        if not (value <= limit if is_most else value >= limit):
            side = "most" if is_most else "least"
            return (
                f"step {step}: the run has collapsed: {name} is {value:.4g}, at {side} {limit:g} "
                "is allowed (trainer.stop_on)"
            )
    return ""


def where_to_go_on(checkpoint: Path | None) -> str:
    """The end of the last line. checkpoint: the newest that is complete."""
    if checkpoint is None:
        return "no checkpoint was saved before (checkpoint.save_freq)"
    return f"the last good checkpoint is {checkpoint}"
