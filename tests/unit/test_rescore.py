"""gpg-eval --rescore: saved answers, other scorers, no engine and no model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpg_megatron.config.reward import RewardConfig
from gpg_megatron.errors import UserError
from gpg_megatron.evaluation import cli
from gpg_megatron.evaluation.evaluate import write_generations
from gpg_megatron.evaluation.saved import read_generations
from gpg_megatron.reward.pool import RewardPool
from tests.unit.test_reward_pool import item

LINE = {
    "prompt_id": "gsm8k/0",
    "data_source": "gsm8k",
    "ground_truth": "5",
    "index": 0,
    "response": "#### 5",
    "length": 2,
    "finish_reason": "stop",
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two answers, of which gsm8k takes one and exact_match the other."""
    with closing(RewardPool(RewardConfig())) as pool:
        groups = pool.score([item(["#### 5", "5"], "5", "gsm8k", lengths=[3, 1])])
    path = tmp_path / "first" / "generations.jsonl"
    write_generations(path, groups, extra_info=True, mode="sampled")
    return path


def scores(folder: Path) -> list[float]:
    lines = (folder / "generations.jsonl").read_text().splitlines()
    return [json.loads(line)["score"] for line in lines]


def test_other_scorers_judge_the_same_answers(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scores(saved.parent) == [1.0, 0.0]
    again = tmp_path / "again"
    given = ["reward.scorer=exact_match", "--rescore", str(saved), "--out"]
    assert cli.main([*given, str(again)]) == 0
    assert (
        capsys.readouterr()
        .out.splitlines()[0]
        .startswith("gsm8k (1 problems, sampled) mean@2: 0.5000")
    )
    assert scores(again) == [0.0, 1.0]
    summary = json.loads((again / "eval.json").read_text())["sets"]["gsm8k"]["sampled"]
    assert (summary["tokens_mean"], summary["metrics"]["pass@2"]["value"]) == (2.0, 1.0)
    # And once more, as they were.
    assert (
        cli.main(["--rescore", str(again / "generations.jsonl"), "--out", str(tmp_path / "x")]) == 0
    )
    assert (tmp_path / "x" / "generations.jsonl").read_text() == saved.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rescore nowhere.jsonl --out x", "data file not found: nowhere.jsonl"),
        ("--rescore first/generations.jsonl --out first", "--out first holds the answers of"),
        ("--rescore first/generations.jsonl --out x --greedy", "--rescore with --source, --max"),
        ("--rescore first/generations.jsonl --out x reward.scorer=math_", "reward.scorer"),
        ("--rescore first/generations.jsonl --out first/generations.jsonl", "File exists"),
    ],
)
def test_mistakes_are_one_line(
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = saved.read_text()
    assert cli.main(arguments.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert saved.read_text() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"response": None}, "a.jsonl:2: response is missing"),
        ({"index": True}, "a.jsonl:2: index is a bool"),
        ({"length": -1}, "a.jsonl:2: length is -1"),
        ({"length": 10**12}, "a.jsonl:2: length is 1000000000000"),
        ({"finish_reason": "abort"}, "a.jsonl:2: finish_reason is 'abort'"),
        ({"ground_truth": "6"}, "a.jsonl:2: another ground truth of gsm8k/0"),
        ({"prompt_id": "b"}, None),
        ({"mode": "greedy"}, None),
    ],
)
def test_a_line_is_checked(tmp_path: Path, changes: Mapping[str, Any], message: str | None) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(LINE) + "\n" + json.dumps({**LINE, **changes}) + "\n")
    if message is None:
        assert sum(len(items) for items in read_generations(path).values()) == 2
    else:
        with pytest.raises(UserError, match=message):
            read_generations(path)


def test_every_problem_needs_as_many_answers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [LINE, LINE, {**LINE, "prompt_id": "b"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="b has 1 answers and gsm8k/0 has 2"):
        read_generations(path)


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text())


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.sampled_from([*LINE, "mode"]), VALUES), max_size=2))
def test_any_file_is_answers_or_a_users_mistake(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({**LINE, **row}) + "\n" for row in rows))
    try:
        assert read_generations(path)
    except UserError as error:
        assert "\n" not in str(error)
