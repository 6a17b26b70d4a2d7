"""A real model in bf16, whose single tokens differ by a third of a nat between right programs,
trains without being refused.

    SMOLLM2=DIR tests/run_slow.sh tests/stack/test_smollm2_bf16.py

DIR is the Hugging Face directory of SmolLM2-135M-Instruct; SMOLLM2_STEPS steps, 50 of them
without it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from gpg_megatron.data.cli import main as make_data
from tests.stack.jobs import running_job

STEPS = int(os.environ.get("SMOLLM2_STEPS", "50"))
START_LIMIT_S = 1800
STEP_LIMIT_S = 300
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "smollm2_135m_max3_cpu.yaml"


@pytest.mark.slow
@pytest.mark.timeout(START_LIMIT_S + STEPS * STEP_LIMIT_S)
@pytest.mark.skipif("SMOLLM2" not in os.environ, reason="SMOLLM2 names no model directory")
def test_fifty_steps_in_bf16_are_not_refused(tmp_path: Path) -> None:
    make_data(["arithmetic", "--task", "max3", "--out", str(tmp_path)])
    output = tmp_path / "run"
    overrides = (
        f"model.path={os.environ['SMOLLM2']}",
        "model.dtype=bf16",
        "rollout.dtype=bf16",
        "policy.pipeline_model_parallel_size=1",
        f"data.train_files=[{tmp_path / 'train.parquet'}]",
        "data.val_files=[]",
        "validation.before_train=false",
        "trainer.train_batch_size=2",
        "rollout.n=4",
        f"trainer.total_training_steps={STEPS}",
        f"trainer.output_dir={output}",
    )
    command = [sys.executable, "-m", "gpg_megatron.start.train", "--config", str(CONFIG)]
    with running_job([*command, *overrides], output=output, log=tmp_path / "log") as job:
        printed = job.ends(0, limit_s=START_LIMIT_S + STEPS * STEP_LIMIT_S)
        print(printed)
        rows = [row for row in job.metrics() if row["step"]]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    means = [row.get("mismatch/logprob_mean", row.get("mismatch/canary_mean")) for row in rows]
    print(means)
    assert all(0.0 < mean < 0.2 for mean in means if mean is not None)
    assert max(mean for mean in means if mean is not None) > 1e-3, "it was bf16"
