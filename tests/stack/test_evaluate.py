"""gpg-eval for real: a tiny model, one vLLM engine, two data sets, sampled and greedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpg_megatron.evaluation import cli as evaluate_cli
from tests.tiny import make_tiny_model, write_problems


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    model = make_tiny_model(folder / "model")
    first = write_problems(folder / "first.jsonl", ["1 + 1 =", "2 + 2 =", "3 + 3 ="])
    second = write_problems(folder / "second.jsonl", ["9 - 1 ="], data_source="gsm8k")
    options = (
        "--n 4 --greedy --no-chat-template --device cpu --dtype fp32 --kv-cache-gb 0.1 "
        "--max-prompt-length 32 --max-response-length 8 --enforce-eager"
    )
    given = ["--model", str(model), "--data", str(first), str(second), "--out", str(folder / "out")]
    code = evaluate_cli.main([*given, *options.split()])
    assert code == 0
    return folder / "out"


def test_the_results(out: Path) -> None:
    result = json.loads((out / "eval.json").read_text())
    assert result["arguments"]["n"] == 4
    assert set(result["sets"]) == {"arithmetic/tiny", "gsm8k"}
    sampled = result["sets"]["arithmetic/tiny"]["sampled"]
    assert sampled["problems"] == 3
    assert set(sampled["metrics"]) == {"mean@4", "pass@2", "maj@2", "pass@4", "maj@4"}
    assert set(result["sets"]["gsm8k"]["greedy"]["metrics"]) == {"mean@1"}


def test_the_generations(out: Path) -> None:
    rows = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    assert [row["mode"] for row in rows] == ["sampled"] * 16 + ["greedy"] * 4
    assert [row["index"] for row in rows[:5]] == [0, 1, 2, 3, 0]
    assert all(1 <= row["length"] <= 8 for row in rows)
