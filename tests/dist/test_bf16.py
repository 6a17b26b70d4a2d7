"""bf16 keeps fp32 where it matters: master weights, gradients, and their sum over ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.dist.problem import PROBLEMS, make_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw, by optimizer."""
    folder = tmp_path_factory.mktemp("bf16")
    make_model(PROBLEMS[0], folder / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "tests.dist.bf16_worker", str(folder)]
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("optimizer", ["plain", "distributed"])
def test_small_steps_add_up(seen: list[dict[str, Any]], optimizer: str) -> None:
    """One step is too small for bf16; the master weights remember it."""
    for rank in seen:
        assert rank[optimizer]["step in units of the last place"] < 0.25
        assert rank[optimizer]["moved"] > 0.5
        assert rank[optimizer]["weight dtypes"] == ["torch.bfloat16"]


@pytest.mark.parametrize("optimizer", ["plain", "distributed"])
def test_gradients_are_added_and_reduced_in_fp32(
    seen: list[dict[str, Any]], optimizer: str
) -> None:
    for rank in seen:
        assert rank[optimizer]["gradient dtypes"] == ["torch.float32"]
        assert rank[optimizer]["cosine"] > 0.99


def test_the_weights_are_the_rounded_masters(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["plain"]["master dtypes"] == ["torch.float32"]
        assert rank["plain"]["weights that are not the rounded master"] == []
