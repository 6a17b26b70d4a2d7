"""Scorers by hand-written cases and round trips."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.config import RewardConfig
from gpg_megatron.errors import UserError
from gpg_megatron.reward.scorers import (
    GSM8K_TAIL,
    SCORERS,
    exact_match,
    gsm8k,
    gsm8k_answer,
    parse_number,
)
from gpg_megatron.reward.sources import (
    DATA_SOURCES,
    check_data_sources,
    check_prompts,
    scorer_name,
)
from gpg_megatron.types import Prompt

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k_train.jsonl"


def prompt(ground_truth: str, data_source: str) -> Prompt:
    return Prompt(
        id=f"{data_source}/7",
        token_ids=(1,),
        messages=(),
        ground_truth=ground_truth,
        data_source=data_source,
    )


@pytest.mark.parametrize(
    ("response", "truth", "score"),
    [
        ("42", "42", 1.0),
        (" 42\n", "42", 1.0),
        ("42", " 42 ", 1.0),
        ("042", "42", 0.0),
        ("42.", "42", 0.0),
        ("4 2", "42", 0.0),
        ("", "42", 0.0),
    ],
)
def test_exact_match(response: str, truth: str, score: float) -> None:
    assert exact_match(response, truth) == (score, score, {"exact_match": score})


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("so it is\n#### 42", "42"),
        ("####42", "42"),
        ("####   42  \n", "42"),
        ("#### 42.", "42"),
        ("#### 42.0", "42"),
        ("#### 42.50", "42.5"),
        ("#### .5", "0.5"),
        ("#### -3", "-3"),
        ("#### +3", "3"),
        ("#### \N{MINUS SIGN}3", "-3"),
        ("#### $18", "18"),
        ("#### $ 18", "18"),
        ("#### \\$18", "18"),
        ("#### -$18", "-18"),
        ("#### $-18.25", "-18.25"),
        ("#### € 18", "18"),
        ("#### $42$", "42"),
        ("#### 1,234,567", "1234567"),
        ("#### $1,234.50.", "1234.5"),
        ("#### 42 dollars", "42"),
        ("#### 42kg", "42"),
        ("#### 42%", "42"),
        ("#### **42**", "42"),
        ("#### 42, as asked", "42"),
        ("#### 42 - as asked", "42"),
        ("#### 5-year-olds", "5"),
        ("#### 1\n#### 2", "2"),
        ("#### 2\n#### the end", "2"),
        ("#### 7 #### 8 and more", "8"),
    ],
)
def test_gsm8k_finds_the_number(response: str, number: str) -> None:
    assert gsm8k_answer(response) == Decimal(number)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "42",
        "### 42",
        "#### forty-two",
        "####",
        "#### x = 42",
        "####\n42",
        "#### 1/2",
        "#### 1 / 2",
        "#### 5-7",
        "#### 3 + 4 = 7",
        "#### 3 * 4",
        "#### 2**3",
        "#### 2^3",
        "#### 3:30",
        "#### 1,2",
        "#### 1,2345",
        "#### 1.2.3",
        "#### 4e3",
        "#### --4",
        "#### -$-4",
        "#### 5\n#### 1/2",
        "#### 42" + " " * GSM8K_TAIL,
    ],
)
def test_gsm8k_finds_no_number(response: str) -> None:
    assert gsm8k_answer(response) is None


def test_gsm8k_reads_exactly_the_tail() -> None:
    answer = "#### 42"
    assert gsm8k_answer(answer + "." * (GSM8K_TAIL - len(answer))) == 42
    assert gsm8k_answer(answer + "." * (GSM8K_TAIL - len(answer) + 1)) is None


def test_gsm8k_verdicts() -> None:
    assert gsm8k("#### 1234.0", "1,234") == (1.0, 1.0, {"gsm8k": 1.0, "format": 1.0})
    assert gsm8k("#### 1235", "1,234") == (0.0, 0.0, {"gsm8k": 0.0, "format": 1.0})
    assert gsm8k("it is 1234", "1,234") == (0.0, 0.0, {"gsm8k": 0.0, "format": 0.0})


@pytest.mark.parametrize("text", ["", "x", "1 2", "5 dollars", "1/2", "-", "$", "1,23"])
def test_parse_number_rejects(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        parse_number(text)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-1e9, max_value=1e9))
def test_a_number_is_found_however_it_is_written(value: Decimal) -> None:
    for written in (f"{value}", f"{value:,}", f"$ {value:,}.", f"**{value}** apples", f"{value:+}"):
        assert gsm8k_answer(f"so #### 1 and then\n#### {written}") == value, written
    assert parse_number(f"{value:,}") == value


@given(st.text(alphabet="#$\\-+.,0123456789 \n\t*/^:=ex", max_size=400))
def test_any_response_gets_a_verdict(text: str) -> None:
    for name, scorer in SCORERS.items():
        assert scorer(text, "17").score in (0.0, 1.0), name
        assert scorer("#### " + text, "17").score in (0.0, 1.0), name


def test_the_references_of_the_data_set_score_1() -> None:
    if not DATA.exists():
        pytest.skip("the GSM8K development data is not here")
    rows = [json.loads(line) for line in DATA.open(encoding="utf-8")]
    truths = [row["answer"].rsplit("####", 1)[1].strip() for row in rows]
    assert len(rows) > 7000
    for row, truth in zip(rows, truths, strict=True):
        assert gsm8k(row["answer"], truth).score == 1.0, truth
    wrong = sum(gsm8k(r["answer"], t).score for r, t in zip(rows[1:], truths, strict=False))
    assert wrong < 0.05 * len(rows)


def test_the_data_source_chooses_the_scorer() -> None:
    auto = RewardConfig()
    assert scorer_name("arithmetic", auto) == "exact_match"
    assert scorer_name("arithmetic/max3", auto) == "exact_match"
    assert scorer_name("gsm8k", auto) == "gsm8k"
    assert scorer_name("openai/gsm8k", auto) == "gsm8k"
    assert scorer_name("anything", RewardConfig(scorer="exact_match")) == "exact_match"
    assert set(DATA_SOURCES.values()) <= set(SCORERS)


def test_an_unknown_data_source_is_named() -> None:
    with pytest.raises(UserError, match=r"'lighteval/x'.*known: arithmetic\*, gsm8k"):
        check_data_sources(["gsm8k", "lighteval/x"], RewardConfig())
    check_data_sources(["lighteval/x"], RewardConfig(scorer="gsm8k"))


def test_an_unreadable_ground_truth_is_named() -> None:
    good = [prompt("1,234", "gsm8k"), prompt("word", "arithmetic")]
    check_prompts(good, RewardConfig())
    with pytest.raises(UserError, match="gsm8k/7: ground truth 'word' is not a number"):
        check_prompts([*good, prompt("word", "gsm8k")], RewardConfig())
