"""The flagship's scripts for small models: raw data, environment and overrides."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

from tests.stack.jobs import STEP_KEYS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("openai/gsm8k", "DigitalLearningGmbH/MATH-lighteval")
N_TRAIN, N_TEST = 24, 8
"""Rows of each data set."""
_ANSWERS = {"gsm8k": r"#### \d$", "math": r"\\boxed\{\d\}"}
# As a user would reduce the recipe: sizes, not methods.
OVERRIDES = (
    "trainer.total_training_steps=2",
    "trainer.train_batch_size=16",
    "trainer.mini_batch_size=8",
    "rollout.max_response_length=4",
    "rollout.kv_cache_gb=0.25",
    "policy.max_tokens_per_micro_batch=8192",
)


def write_raw_data(source: Path, folder: Path) -> Path:
    """The first rows of each file whose answer is a digit, which a model can hit by chance."""
    folder.mkdir()
    for name, pattern in _ANSWERS.items():
        for split, count in (("train", N_TRAIN), ("test", N_TEST)):
            field = "answer" if name == "gsm8k" else "solution"
            with (source / f"{name}_{split}.jsonl").open(encoding="utf-8") as file:
                rows = [line for line in file if re.search(pattern, json.loads(line)[field])]
            (folder / f"{name}_{split}.jsonl").write_text("".join(rows[:count]), encoding="utf-8")
    return folder


def environment(model: Path, raw: Path, folder: Path, output: Path, **more: str) -> dict[str, str]:
    """What a user exports, and nothing else of this process's."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {
        **kept,
        "PYTHONDONTWRITEBYTECODE": "1",
        "GPG_PYTHON": sys.executable,
        "DEVICE": "cpu",
        "MODEL_PATH": str(model),
        "DATA_SOURCE": str(raw),
        "DATA_DIR": str(folder / "data"),
        "OUTPUT_DIR": str(output),
        **more,
    }


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of a run directory's metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").open()]


def check_metrics(rows: list[dict[str, Any]], *, tolerance: float = 1e-4) -> None:
    """Two steps with everything in them, agreement after the syncs, both data sets evaluated."""
    before, *steps = rows
    assert [row["step"] for row in (before, *steps)] == [0, 1, 2]
    # Two updates a step, less those in which no group has a right answer.
    made = [2 - row["policy/updates_skipped"] for row in steps]
    assert [row["version"] for row in steps] == list(accumulate(made)) and min(made) >= 1
    for row in steps:
        assert row.keys() >= STEP_KEYS
        for key, value in row.items():
            assert value is not None and math.isfinite(value), key
        assert 0.0 <= row["mismatch/logprob_mean"] <= row["mismatch/logprob_max"] <= tolerance
        assert row["reward/accuracy"] > 0.0, "a digit is right now and then"
        assert row["policy/grad_norm"] > 0.0
    for row in (before, steps[-1]):
        for source in SOURCES:
            assert 0.0 <= row[f"eval/{source}/mean@1"] <= 1.0
