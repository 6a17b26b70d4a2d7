"""Engine and policy hand one GPU's memory to each other, in a whole job."""

from __future__ import annotations

from pathlib import Path

from tests.stack.jobs import START_LIMIT_S
from tests.stack.test_main_job import job, started

__all__ = ["job"]  # the fixture


def test_a_colocated_job_on_one_gpu(job: Path) -> None:
    """Together they may take more than there is: the engine alone may have most of the GPU."""
    overrides = (
        *(
            "trainer.device=cuda",
            "trainer.placement=colocated",
            "rollout.gpu_memory_utilization=0.8",
        ),
        *("model.dtype=bf16", "rollout.dtype=bf16", "policy.tensor_model_parallel_size=1"),
        *("trainer.total_training_steps=3", "trainer.test_freq=2", "checkpoint.save_freq=1"),
    )
    with started(job, "colocated", *overrides) as run:
        printed = run.ends(0, limit_s=START_LIMIT_S)
    assert "first sync verified" in printed and "saves no memory" not in printed
    assert [row["step"] for row in run.metrics()] == [0, 1, 2, 3]
    assert all(row["timing/placement_s"] > 0 for row in run.metrics())
