"""Several scorers on the same answers: who disagrees, and who has no verdict."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gpg_megatron.config.reward import RewardConfig
from gpg_megatron.errors import UserError
from gpg_megatron.evaluation import compare
from gpg_megatron.types import Reward, ScoredGroup
from tests.unit.test_reward_pool import item

SLOW = "a"
CUSTOM = f"""
import os, time

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str == "none":
        os._exit(3)
    if solution_str == "\\\\boxed{{{SLOW}}}":
        time.sleep(600)
    return {{"score": 1.0, "answer": "[/red]"}}
"""


def answers(truth: str, responses: list[str], source: str) -> ScoredGroup:
    """A group that no scorer has seen."""
    prompt, completions = item(responses, truth, source)
    unseen = Reward(score=0.0, accuracy=0.0, parts={})
    return ScoredGroup(
        prompt=prompt, completions=tuple(completions), rewards=(unseen,) * len(completions)
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("custom") / "mine_compared.py"
    path.write_text(CUSTOM)
    products = ["\\boxed{x^2 + x}", "\\boxed{x(x+1)}", "none", f"\\boxed{{{SLOW}}}"]
    answered = {
        "sampled": [answers("x(x+1)", products, "math")],
        "greedy": [answers("\\frac12", ["so \\boxed{1/2}"], "my/halves")],
    }
    config = RewardConfig(
        by_source={"*": "custom"},
        custom_function=f"{path}:compute_score",
        # Parts that not every scorer, and no comparison, has.
        weights={"answer": 1.0, "format": 0.5, "overlong": 1.0},
        timeout_s=1.0,
    )
    return compare.judge(answered, ["math", "math_verify", "custom"], config)


def test_each_answer_is_judged_by_each_scorer(rows: list[dict[str, Any]]) -> None:
    assert [(row["mode"], row["data_source"], row["index"]) for row in rows] == [
        *(("sampled", "math", i) for i in range(4)),
        ("greedy", "my/halves", 0),
    ]
    accuracies = {
        scorer: [row["verdicts"][scorer]["accuracy"] for row in rows]
        for scorer in ("math", "math_verify", "custom")
    }
    assert accuracies == {
        "math": [0.0, 1.0, 0.0, 0.0, 1.0],  # expanded is not known to be equal
        "math_verify": [1.0, 1.0, 0.0, 0.0, 1.0],
        "custom": [1.0, 1.0, 0.0, 0.0, 1.0],
    }
    assert [row["verdicts"]["math"]["without"] for row in rows] == [
        *(None, None, "no answer", None, None)
    ]
    assert [row["verdicts"]["custom"]["without"] for row in rows] == [
        *(None, None, "crash", "timeout", None)
    ]
    assert rows[4]["verdicts"]["math"]["answer"] == "\\frac{1}{2}"


def test_the_report(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "compare.jsonl"
    first, table, *missing = compare.report(rows, path)
    assert first == f"scorers disagree about 1 of 5 answers: {path}"
    [written] = [json.loads(line) for line in path.read_text().splitlines()]
    assert written == rows[0] and written["response"] == "\\boxed{x^2 + x}"
    printed = Console(width=120, file=io.StringIO(), record=True)
    printed.print(table)
    line = next(x for x in printed.export_text().splitlines() if "math, sampled" in x)
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells[:4] == ["math, sampled", "math/0", "0", "x(x+1)"]
    assert cells[4].startswith("wrong: ") and cells[5].startswith("right: ")
    assert cells[6] == "right: [/red]"
    assert missing == [
        "math, math, without a verdict: 1 no answer",
        "math, math_verify, without a verdict: 1 no answer",
        "math, custom, without a verdict: 1 crash, 1 timeout",
    ]


def test_only_the_first_rows_are_printed(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "compare.jsonl"
    _, table, more = compare.report([rows[0] | {"ground_truth": "\udc80"}] * 23, path)
    assert not isinstance(table, str) and table.row_count == 20
    assert more == "3 more are in the file"
    assert len(path.read_text().splitlines()) == 23


def test_scorers_that_agree_need_no_table(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "compare.jsonl"
    assert compare.report(rows[4:], path) == [f"scorers disagree about 0 of 1 answers: {path}"]
    assert path.read_text() == ""


def test_the_names_of_scorers() -> None:
    prompts = [item([], "x", "math")[0]]
    config = RewardConfig(weights={"format": 1.0})
    assert compare.scorers_to_compare(None, config, prompts) == []
    assert compare.scorers_to_compare("math,exact_match", config, prompts) == [
        *("math", "exact_match")
    ]
    for names in ("math", "math,math", "math,", "math,custom", ""):
        with pytest.raises(UserError, match="expected two or more of exact_match, gsm8k, math"):
            compare.scorers_to_compare(names, config, prompts)
    with pytest.raises(UserError, match="'x' is not a number; scorer gsm8k needs one"):
        compare.scorers_to_compare("math,gsm8k", config, prompts)
