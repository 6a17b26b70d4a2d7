"""Evaluation without engines: metrics per data source, files, and the command's mistakes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from gpg_megatron.config.reward import RewardConfig
from gpg_megatron.evaluation import cli as evaluate_cli
from gpg_megatron.evaluation.evaluate import by_source, evaluate, write_generations
from gpg_megatron.reward.pool import RewardPool
from gpg_megatron.rollout.sampling import SamplingRequest
from gpg_megatron.types import Completion, Prompt, SamplingParams, ScoredGroup
from tests.samples import int32
from tests.tiny import make_tiny_model, write_problems
from tests.unit.test_reward_pool import item


@pytest.fixture(scope="module")
def groups() -> list[ScoredGroup]:
    items = [
        item(["#### 5", "so #### 5.0", "#### 6", "none"], "5", "gsm8k"),
        item(["#### 1", "#### 2", "#### 3", "#### 4"], "5", "gsm8k"),
        item(["\\boxed{\\frac12}", "\\boxed{1/2}", "\\boxed{2}", "2"], "0.5", "math"),
    ]
    with closing(RewardPool(RewardConfig())) as pool:
        return pool.score(items)


def test_metrics_per_data_source(groups: list[ScoredGroup]) -> None:
    found = by_source(groups, [4])
    assert {k: x.value for k, x in found["gsm8k"].items()} == {
        "mean@4": 0.25,
        "pass@4": 0.5,
        "maj@4": 0.5,  # 5 and 5.0 are one answer; no problem 2 is right
    }
    assert found["math"]["mean@4"].value == 0.5  # both halves are 0.5
    assert found["math"]["mean@4"].half_width is None


class Scripted:
    """Stands where the engines are: answers from a table, so that the counts are known."""

    def __init__(self, answers: dict[str, list[str]]) -> None:
        self.answers = answers
        self.requests: list[SamplingRequest] = []

    def generate(self, requests: Sequence[SamplingRequest]) -> list[Completion]:
        self.requests = list(requests)
        return [
            replace(completion, prompt_id=request.prompt.id)
            for request in requests
            for completion in item(self.answers[request.prompt.id])[1]
        ]


def test_in_the_loop(tmp_path: Path) -> None:
    prompts = [
        Prompt(id=x, token_ids=int32((1,)), messages=(), ground_truth="5", data_source="gsm8k")
        for x in "ab"
    ]
    fleet = Scripted({"a": ["#### 5", "#### 5"], "b": ["#### 4", "#### 5"]})
    params = SamplingParams(
        n=2, temperature=0.6, top_p=0.95, top_k=20, max_tokens=9, stop=(), seed=7
    )
    path = tmp_path / "eval" / "step_0.jsonl"
    with closing(RewardPool(RewardConfig())) as pool:
        metrics = evaluate(fleet, pool, prompts, params, path)
    assert metrics == {
        "eval/gsm8k/mean@2": 0.75,
        # Wilson, z^2 = 3.8415: a share of 0.75 in 3 trials; of 1 in 1: (1 - 1 / 4.8415) / 2.
        "eval/gsm8k/mean@2/ci95": pytest.approx(0.353533, abs=1e-5),
        "eval/gsm8k/pass@2": 1.0,
        "eval/gsm8k/pass@2/ci95": pytest.approx(0.396725, abs=1e-5),
        "eval/gsm8k/maj@2": 0.75,
        "eval/gsm8k/maj@2/ci95": pytest.approx(0.353533, abs=1e-5),
    }
    assert len(path.read_text().splitlines()) == 4
    assert [(r.prompt.id, r.params) for r in fleet.requests] == [("a", params), ("b", params)]


def test_generations_are_written_line_by_line(groups: list[ScoredGroup], tmp_path: Path) -> None:
    path = tmp_path / "eval" / "step_3.jsonl"
    write_generations(path, groups)
    write_generations(path, groups)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 12
    assert [row["answer"] for row in rows[:4]] == ["5", "5", "6", None]
    assert rows[1]["response"] == "so #### 5.0" and rows[1]["accuracy"] == 1.0
    assert rows[8]["ground_truth"] == "0.5" and rows[8]["index"] == 0
    write_generations(path, groups[:1], mode="greedy")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 16 and rows[-1]["mode"] == "greedy"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data no.jsonl", "--data no.jsonl: no such file, and no data set; known: gsm8k"),
        ("validation.n=2 validation.temperature=0", "validation.n is 2 with validation.temp"),
        ("--greedy validation.temperature=0", "--greedy with validation.temperature=0"),
        ("validation.top_p=1.5", "validation.top_p is 1.5; expected greater than 0 and at most 1"),
        ("rollout.max_response_length=4096", "= 4160 is more than the model's max_position"),
        ("rollout.tensor_model_parallel_size=3", "rollout.tensor_model_parallel_size=3 does not"),
        ("data.max_prompt_length=3", "two.jsonl:1: the prompt has 7 tokens, more than data.max_"),
        ("data.max_prompt_length=3 data.overlong_prompts=filter", "all 2 prompts are longer"),
        ("model.path=nowhere", "no such directory: nowhere"),
        ("model.path=''", "model.path is not set; expected a Hugging Face directory"),
        ("model.pat=x", "command line: unknown key model.pat; did you mean model.path?"),
        ("reward.scorer=none", "command line: reward.scorer"),
        ("--data math500 --source nowhere", "--source nowhere: no such file or folder"),
        ("--data math500 math500 --source SOURCE", "--data math500: two data sets have this name"),
        (
            "--compare math",
            "--compare math: expected two or more of exact_match, gsm8k, math, math_",
        ),
        (
            "--compare math,hendrycks",
            "--compare math,hendrycks: expected two or more of exact_match",
        ),
        ("--config nowhere.yaml", "config file not found: nowhere.yaml"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    tiny: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    message: str,
) -> None:
    data = write_problems(tmp_path / "two.jsonl", ["1 + 1 =", "2 + 2 ="])
    source = tmp_path / "test.jsonl"
    source.write_text('{"problem": "1 + 1 =", "answer": "2"}\n')
    keys = f"model.path={tiny} data.max_prompt_length=64 rollout.max_response_length=64"
    given = [*keys.split(), "data.apply_chat_template=false", "--data", str(data)]
    given += ["--out", str(tmp_path / "out"), *arguments.replace("SOURCE", str(source)).split()]
    assert evaluate_cli.main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()


def test_results_that_cannot_be_written(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_problems(tmp_path / "one.jsonl", ["1 + 1 ="])
    keys = f"model.path={tiny} data.max_prompt_length=64 rollout.max_response_length=64"
    given = [*keys.split(), "data.apply_chat_template=false", "--data", str(data)]
    assert evaluate_cli.main([*given, "--out", str(data)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: --out {data}: File exists; expected a folder to write to"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))
