"""The parity modes against verl's own verdicts.

verl_scores.jsonl was written by verl 0.9.1 (verl/utils/reward_score/gsm8k.py and math_reward.py)
in an environment of its own: one line for each response and truth, with both scores.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpg_megatron.reward.scorers import verl_gsm8k, verl_math

TABLE = Path(__file__).with_name("verl_scores.jsonl")
ROWS = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]


def test_the_table_has_both_verdicts_of_both_scorers() -> None:
    assert len(ROWS) > 600
    assert {row["gsm8k"] for row in ROWS} == {row["math"] for row in ROWS} == {0.0, 1.0}


@pytest.mark.parametrize("name", ["gsm8k", "math"])
def test_verdicts_are_those_of_verl(name: str) -> None:
    scorer = {"gsm8k": verl_gsm8k, "math": verl_math}[name]
    differing = [r for r in ROWS if scorer(r["response"], r["truth"]).score != r[name]]
    assert differing == []


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("\\boxed{\\frac12}", "\\frac{1}{2}", 1.0),
        ("\\boxed{0.25}", "\\frac{1}{4}", 0.0),  # only 0.5 is known as a fraction
        ("\\fbox{5}", "5", 0.0),
        ("\\boxed{5\\text{ cm}}", "5\\text{ m}", 1.0),
    ],
)
def test_verl_math_by_hand(answer: str, truth: str, score: float) -> None:
    assert verl_math(answer, truth).score == score
