"""MATH answers: spellings, values, equivalence, and agreement with the reference solutions."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.config.reward import RewardConfig
from gpg_megatron.data.catalog import load_split
from gpg_megatron.reward.form import MAX_ANSWER, normal_form
from gpg_megatron.reward.mathematics import equal, vote
from gpg_megatron.reward.pool import RewardPool
from gpg_megatron.reward.scorers import Verdict, gsm8k, math, math_verify
from tests.unit.test_reward_pool import children, item

SAME = [
    ("\\frac12", "\\frac{1}{2}"),
    ("\\dfrac{1}{2}", "1/2"),
    ("\\tfrac 3 4", "\\frac{3}{4}"),
    ("-3/4", "-\\frac{3}{4}"),
    ("\\sqrt3", "\\sqrt{3}"),
    ("2\\sqrt 3", "2\\sqrt{3}"),
    ("\\left( 1, 2 \\right)", "(1,2)"),
    ("1,000", "1000"),
    ("1{,}000{,}000", "1000000"),
    ("10,\\!000", "10000"),
    ("\\$5", "5"),
    ("50\\%", "50"),
    ("90^\\circ", "90"),
    ("90^{\\circ}", "90 \\text{ degrees}"),
    ("5 \\text{ cm}^2", "5"),
    ("\\text{Evelyn}", "Evelyn"),
    ("\\text{(E)}", "(E)"),
    ("x = 5", "5"),
    ("f(x) = x^2", "x^2"),
    ("x \\in [1, 2]", "[1,2]"),
    (".5", "0.5"),
    ("0.50", "0.5"),
    ("025", "25"),
    ("5.", "5"),
    ("+5", "5"),
    ("\N{MINUS SIGN}5", "-5"),
    ("\\begin{pmatrix} 1 \\\\ -2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\-2\\end{pmatrix}"),
    ("2 x\n+ 1", "2x+1"),
]
DIFFERENT = [
    ("5", "6"),
    ("-5", "5"),
    ("(1,2)", "(2,1)"),
    ("[1,2]", "(1,2)"),
    ("1,2", "12"),
    ("\\frac{1}{2}", "\\frac{2}{1}"),
    ("x^2", "x^3"),
    ("\\sqrt{2}", "2"),
    ("5 \\text{ cm}", "6"),
    ("", "5"),
    ("1,000,00", "100000"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}12\\end{pmatrix}"),
]


@pytest.mark.parametrize(("answer", "truth"), SAME)
def test_what_differs_in_spelling_only(answer: str, truth: str) -> None:
    assert equal(answer, truth) and equal(truth, answer)
    assert vote(answer) == vote(truth)


@pytest.mark.parametrize(("answer", "truth"), DIFFERENT)
def test_what_differs(answer: str, truth: str) -> None:
    assert not equal(answer, truth) and not equal(truth, answer)


@given(st.text(alphabet="\\{}frac sqrt12,.()-+x^$text=", max_size=60))
def test_normalising_ends_and_equal_holds_for_itself(text: str) -> None:
    assert equal(text, text)
    assert vote(text) == vote(text)
    assert len(normal_form(text)) <= 8 * len(text) + 8


def test_an_answer_that_is_too_long_is_wrong() -> None:
    long = "1" * (MAX_ANSWER + 1)
    assert not equal(long, long)
    assert math("\\boxed{" + long + "}", "1").score == 0.0


def test_math_verdicts() -> None:
    right = Verdict(1.0, 1.0, {"math": 1.0, "format": 1.0}, "\\frac{1}{2}")
    assert math("first \\boxed{3}, then \\boxed{\\frac12}", "1/2") == right
    assert math("\\boxed{3}", "4") == Verdict(0.0, 0.0, {"math": 0.0, "format": 1.0}, "3")
    nothing = Verdict(0.0, 0.0, {"math": 0.0, "format": 0.0}, None)
    assert math("the answer is 4", "4") == nothing
    assert math("\\boxed{}", "4") == nothing


@pytest.mark.parametrize(
    ("response", "truth", "score"),
    [
        ("\\boxed{0.5}", "\\frac{1}{2}", 1.0),
        ("\\boxed{\\frac{2}{4}}", "\\frac{1}{2}", 1.0),
        ("\\boxed{2 + x}", "x+2", 1.0),
        ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", 1.0),
        ("\\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        ("\\boxed{\\{2, 1\\}}", "\\{1,2\\}", 1.0),
        ("so the answer is $\\frac{1}{2}$.", "0.5", 1.0),
        ("\\boxed{x+3}", "x+2", 0.0),
        ("\\boxed{(2,1)}", "(1,2)", 0.0),
        ("\\boxed{}", "5", 0.0),
        ("", "5", 0.0),
    ],
)
def test_equivalence(response: str, truth: str, score: float) -> None:
    assert math_verify(response, truth).score == score


# ---- answers that are out to do harm ----------------------------------------------------------

HOSTILE = {
    "exponent tower": "\\boxed{9^{9^{9^{9^{9}}}}}",
    "factorials": "\\boxed{((((99!)!)!)!)!}",
    "huge power": "\\boxed{(x+y+z+1)^{100000000}}",
    "long number": "#### " + "9" * 200 + "\\boxed{" + "9" * 1900 + "}",
    "scientific": "#### 1e999999999 \\boxed{1e999999999}",
    "deep braces": "\\boxed{" + "{" * 900 + "1" + "}" * 900 + "}",
    "deep fractions": "\\boxed{" + "\\frac{1}{" * 150 + "2" + "}" * 150 + "}",
    "deep parentheses": "\\boxed{" + "(" * 900 + "1" + ")" * 900 + "}",
    "megabytes": "\\boxed{1} " * 500_000 + "####" * 500_000,
    "megabytes of braces": "\\boxed{" + "{" * 3_000_000,
    "megabytes in a box": "\\boxed{" + "x+" * 1_500_000 + "1}",
    "megabytes of digits": "9" * 3_000_000,
    "NUL": "\x00" * 1000 + "\\boxed{\x00}\x00####\x00",
    "control and surrogates": "\\boxed{\udcff\ud800\x1b[2J}",
    "code": "\\boxed{__import__('os').system('kill -9 -1')}",
    "integral": "\\boxed{\\int_0^{\\infty} \\sin(x^{x^{x}}) e^{\\tan x} dx}",
    "sum": "\\boxed{\\sum_{n=1}^{10^{12}} \\frac{1}{n^n}}",
    "matrix": "\\boxed{\\begin{pmatrix}" + "1&" * 400 + "1\\end{pmatrix}^{999999}}",
}


@pytest.mark.parametrize(
    ("source", "truth"),
    [
        ("gsm8k", "7"),
        ("math", "7"),
        pytest.param("verify", "\\pi^2", marks=pytest.mark.slow),
    ],
)
def test_hostile_answers_cost_themselves_only(source: str, truth: str) -> None:
    """Each stands between two right answers, which are right still; nothing else is scored 1."""
    right = f"#### {truth} so \\boxed{{{truth}}}"
    responses = [right]
    for response in HOSTILE.values():
        responses += [response, right]
    config = RewardConfig(
        by_source={"verify": "math_verify"},
        # The other scorers need no limit; on a busy machine they take a while.
        timeout_s=1.5 if source == "verify" else 60.0,
        memory_limit_mb=700,
        timeout_score=-1.0,
    )
    with closing(RewardPool(config)) as pool:
        [group] = pool.score([item(responses, truth, source)])
        assert len(children()) == 1
    assert [r.score for r in group.rewards[::2]] == [1.0] * (len(HOSTILE) + 1)
    for name, reward in zip(HOSTILE, group.rewards[1::2], strict=True):
        failed = {"timeout", "memory", "crash"} & reward.parts.keys()
        assert reward.accuracy == 0.0 and reward.score == (-1.0 if failed else 0.0), name
        assert source == "verify" or not failed, f"{name}: {reward.parts}"
        assert "crash" not in failed, f"{name}: {reward.parts}"


# ---- the reference solutions ------------------------------------------------------------------

SPLITS = [("gsm8k", "train"), ("gsm8k", "test"), ("math", "train"), ("math", "test")]
Scorer = Callable[[str, str], Verdict]
OWN: dict[str, tuple[Scorer, str]] = {"gsm8k": (gsm8k, "answer"), "math": (math, "solution")}


def references(folder: Path, name: str, split: str) -> list[tuple[str, str]]:
    """(solution, ground truth) of every row. Rows without a usable answer are not among them:
    test_data_catalog.py lists the two of MATH."""
    rows: Sequence[dict[str, Any]] = load_split(name, str(folder), split).rows
    key = OWN[name][1]
    return [(r["extra_info"][key], r["reward_model"]["ground_truth"]) for r in rows]


def corrupted(name: str, solution: str, truth: str) -> str:
    """The solution with another answer: the first digit one higher, or "+1" where there is none."""
    if name == "gsm8k":
        return solution.rpartition("####")[0] + f"#### {float(truth) + 1:.4f}"
    head = solution[: max(solution.rfind("\\boxed"), solution.rfind("\\fbox"))]
    wrong, n = re.subn(r"\d", lambda d: str((int(d[0]) + 1) % 10), truth, count=1)
    return head + "\\boxed{" + (wrong if n else f"{truth}+1") + "}"


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_every_reference_solution_scores_1_and_a_corrupted_one_0(
    development_data: Path, name: str, split: str
) -> None:
    scorer = OWN[name][0]
    pairs = references(development_data, name, split)
    assert len(pairs) > 1300
    assert [t for s, t in pairs if scorer(s, t) != (1.0, 1.0, *scorer(s, t)[2:])] == []
    assert [t for s, t in pairs if scorer(corrupted(name, s, t), t).score != 0.0] == []


def agreement_of_math_verify(pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """(truths whose solution does not score 1, truths whose corrupted solution does)."""
    # Generous: a busy machine must not look like a disagreement.
    config = RewardConfig(scorer="math_verify", timeout_s=120.0)
    prompts = [item([s, corrupted("math", s, t)], t, "math") for s, t in pairs]
    with closing(RewardPool(config)) as pool:
        groups = pool.score(prompts)
    missed = [g.prompt.ground_truth for g in groups if g.rewards[0].score != 1.0]
    fooled = [g.prompt.ground_truth for g in groups if g.rewards[1].score != 0.0]
    return missed, fooled


def test_math_verify_agrees_on_a_sample(development_data: Path) -> None:
    pairs = references(development_data, "math", "test")
    missed, fooled = agreement_of_math_verify(random.Random(1).sample(pairs, 100))
    assert (missed, fooled) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "test"])
def test_math_verify_agrees_on_every_reference_solution(development_data: Path, split: str) -> None:
    missed, fooled = agreement_of_math_verify(references(development_data, "math", split))
    assert missed == []
    assert fooled == []
