"""The run that wrote these files: its configuration and its samples."""

from __future__ import annotations

from pathlib import Path

from gpg_megatron.batching.updates import BatchPlan
from gpg_megatron.config.sections import (
    CheckpointConfig,
    Config,
    ModelConfig,
    PolicyConfig,
    RolloutConfig,
    TrainerConfig,
)
from gpg_megatron.model.flops import TokenCosts
from gpg_megatron.types import TrainSample
from tests.samples import float32, int32

FOLDER = Path(__file__).resolve().parent
MODEL = FOLDER / "model"
STEP = FOLDER / "step_2"


def config(tp_size: int, output_dir: Path, resume: str = str(STEP)) -> Config:
    """Of the run, or of one that goes on under another layout."""
    return Config(
        model=ModelConfig(path=str(MODEL), dtype="fp32"),
        policy=PolicyConfig(tensor_model_parallel_size=tp_size, lr=1e-2),
        rollout=RolloutConfig(n=2, dtype="fp32", max_response_length=8),
        trainer=TrainerConfig(
            total_training_steps=4, train_batch_size=2, output_dir=str(output_dir)
        ),
        checkpoint=CheckpointConfig(resume=resume),
    )


def samples() -> list[TrainSample]:
    """Of each of its updates."""
    return [
        TrainSample(
            prompt_id=str(group),
            group=group,
            index=index,
            prompt_token_ids=int32((1, 2 + group, 3)),
            response_token_ids=int32((5 + index, 7, 9 + group)),
            rollout_logprobs=float32((-4.0, -4.0, -4.0)),
            advantage=0.5 - index,
            version=0,
            live=True,
            score=float(1 - index),
        )
        for group in range(2)
        for index in range(2)
    ]


def plan(config: Config) -> BatchPlan:
    """One update, one micro-batch."""
    return BatchPlan(
        algorithm=config.algorithm,
        n_updates=1,
        max_tokens=64,
        max_response_length=config.rollout.max_response_length,
        dp_rank=0,
        dp_size=1,
        costs=TokenCosts(per_token=1.0, per_loss_token=1.0, per_pair=0.0),
        share_prompts=True,
    )
