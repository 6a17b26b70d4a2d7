"""gpg-eval for real: a tiny model, one vLLM engine, two data sets, sampled and greedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpg_megatron.config.loading import load_config
from gpg_megatron.evaluation import cli as evaluate_cli
from tests.tiny import make_tiny_model, write_problems


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    model = make_tiny_model(folder / "model")
    first = write_problems(folder / "first.jsonl", ["1 + 1 =", "2 + 2 =", "3 + 3 ="])
    second = write_problems(folder / "second.jsonl", ["9 - 1 ="], data_source="gsm8k")
    options = (
        "--greedy --compare exact_match,math validation.n=4 "
        "data.apply_chat_template=false trainer.device=cpu "
        "rollout.dtype=fp32 rollout.kv_cache_gb=0.1 rollout.enforce_eager=true "
        "data.max_prompt_length=32 rollout.max_response_length=8"
    )
    given = [f"model.path={model}", "--data", str(first), str(second)]
    code = evaluate_cli.main([*given, "--out", str(folder / "out"), *options.split()])
    assert code == 0
    return folder / "out"


def test_the_results(out: Path) -> None:
    result = json.loads((out / "eval.json").read_text())
    assert "validation.n=4" in result["arguments"]["overrides"]
    assert load_config(out / "config.yaml", trains=False).validation.n == 4
    assert set(result["sets"]) == {"arithmetic/tiny", "gsm8k"}
    sampled = result["sets"]["arithmetic/tiny"]["sampled"]
    assert sampled["problems"] == 3
    assert set(sampled["metrics"]) == {"mean@4", "pass@2", "maj@2", "pass@4", "maj@4"}
    assert set(result["sets"]["gsm8k"]["greedy"]["metrics"]) == {"mean@1"}
    # A random model writes no "####".
    assert result["sets"]["gsm8k"]["sampled"]["without_verdict"] == {"no answer": 4}
    # Nor does it write a right answer, so that the scorers have nothing to disagree about.
    assert (out / "compare.jsonl").read_text() == ""


def test_the_generations(out: Path) -> None:
    rows = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    assert [row["mode"] for row in rows] == ["sampled"] * 16 + ["greedy"] * 4
    assert [row["index"] for row in rows[:5]] == [0, 1, 2, 3, 0]
    assert all(1 <= row["length"] <= 8 for row in rows)
