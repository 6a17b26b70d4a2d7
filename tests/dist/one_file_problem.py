"""What examples/gpg_in_one_file.py and the policy are both given: three rollout batches with
fixed answers and rewards, and the settings of the optimizer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from gpg_megatron.config.sections import (
    Config,
    ModelConfig,
    PolicyConfig,
    RolloutConfig,
    TrainerConfig,
)

TP_SIZE = 2
VOCAB_SIZE = 320
MAX_RESPONSE = 12
# Update -> question -> reward of each answer. Every update has a dead group.
REWARDS = (
    ((1.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0, 0.0), (0.0, 1.0, 1.0, 1.0)),
    ((1.0, 1.0, 1.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
    ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (1.0, 1.0)),
)
ALPHAS = (3 / 2, 2.0, 4.0)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One batch: Q questions with G answers each."""

    prompts: list[list[int]]
    """[Q], token ids of different lengths."""
    answers: list[list[list[int]]]
    """[Q][G], token ids of different lengths."""
    rewards: tuple[tuple[float, ...], ...]
    """[Q][G], 0 or 1."""


def rollouts() -> list[Rollout]:
    """One for each update."""
    rng = random.Random(3)
    return [
        Rollout(
            prompts=[_tokens(rng, 2, 9) for _ in rewards],
            answers=[[_tokens(rng, 1, MAX_RESPONSE) for _ in group] for group in rewards],
            rewards=rewards,
        )
        for rewards in REWARDS
    ]


def _tokens(rng: random.Random, shortest: int, longest: int) -> list[int]:
    return [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(shortest, longest))]


def config_of(model: Path) -> Config:
    """The policy's side: defaults, but for the layout, the micro-batches, lr and adam_eps."""
    return Config(
        model=ModelConfig(path=str(model), dtype="fp32"),
        policy=PolicyConfig(
            tensor_model_parallel_size=TP_SIZE,
            max_tokens_per_micro_batch=20,
            lr=1e-3,
            # Adam divides by the gradient's size: its usual eps would turn the rounding error of
            # a gradient near zero into a step of full length.
            adam_eps=1e-5,
        ),
        rollout=RolloutConfig(max_response_length=MAX_RESPONSE),
        trainer=TrainerConfig(
            total_training_steps=len(REWARDS), train_batch_size=4, mini_batch_size=4, device="cpu"
        ),
    )
