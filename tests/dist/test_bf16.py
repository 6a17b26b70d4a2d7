"""bf16 keeps fp32 where it matters: master weights, gradients, and their sum over ranks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.dist.problem import PROBLEMS, make_model
from tests.dist.ranks import run_ranks


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw, by optimizer."""
    folder = tmp_path_factory.mktemp("bf16")
    make_model(PROBLEMS[0], folder / "model")
    output = run_ranks(folder, "tests.dist.bf16_worker", 2)
    paths = [folder / f"rank{rank}.json" for rank in range(2)]
    assert all(path.exists() for path in paths), output
    return [json.loads(path.read_text()) for path in paths]


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
