"""Which mathematical answers are equal, which differ, and which cannot be told."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.reward import reading
from gpg_megatron.reward.form import nest
from gpg_megatron.reward.mathematics import compare, equal, vote
from gpg_megatron.reward.tokens import tokenize

EQUAL = r"""
    0.5 | \frac{1}{2}
    .5 | 1/2
    1\frac{3}{4} | \frac74
    3 1/2 | 3.5
    0.1\overline{6} | 1/6
    50\% | 0.5
    50\% | 50
    0.5 | 50\%
    50\text{ percent} | 50\%
    4.5\cdot10^{33} | 4.5e33
    -1.6 \times 10^{-19}\text{ C} | -1.6e-19
    10^{11} | 1e11
    \frac{-1}{2} | -\frac12
    1.5 \text{ million} | 1,500,000
    \mbox{four} | 4
    \text{twenty-five} | 25
    5^{th} | \text{fifth}
    \frac{1}{\sqrt{3}} | \frac{\sqrt{3}}{3}
    \sqrt{12} | 2\sqrt3
    2^{1/3} | \sqrt[3]{2}
    2+x | x+2
    -(x-1) | 1-x
    \frac{x}{2}+\frac12 | \frac{x+1}{2}
    (x-2)(x+1) | (x+1)(x-2)
    -4(x-3)(x+3) | 4(3-x)(3+x)
    xy | yx
    e^{-x} | \frac{1}{e^x}
    \sin^2 x | (\sin x)^2
    |x-1| | |1-x|
    x=5 | 5
    5 | x=5
    y=2x+3 | f(x)=2x+3
    y = 3x+1 | 3x-y+1=0
    2x+4y=6 | x+2y=3
    x=1, y=2 | (1,2)
    x = \pm 3 | 3,-3
    1+\sqrt2, 1-\sqrt2 | 1 \pm \sqrt2
    7 \text{ and } -2 | -2, 7
    \{2,1\} | \{1,2\}
    1,2 | \{2,1\}
    100,200 | 200, 100
    [1,\infty) | x \ge 1
    2 < x \le 3 | (2,3]
    x<-1 \text{ or } x>3 | (-\infty,-1)\cup(3,\infty)
    \mathbb{R} | (-\infty,\infty)
    \text{no solution} | \emptyset
    \begin{bmatrix}1\\2\end{bmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
    \begin{pmatrix}1\\2\end{pmatrix} | (1,2)
    1:2 | \frac{1}{2}
    (101)_2 | 101_{\text{two}}
    15\text{ cm}^2 | 15\text{ square centimeters}
    5\text{ miles per hour} | 5\text{ mph}
    5 \frac{\text{m}}{\text{s}} | 5\text{ m/s}
    \text{4:30 p.m.} | 4\!:\!30 \text{ PM}
    \textbf{(D)}\ 12 | D
    \textbf{(D)}\ 12 | 12
    \text{Choice } D | \text{(D)}
    even | \text{Even}
    0.56 = 56\% | 0.56
"""
DIFFERENT = r"""
    0.5 | 50
    0.33 | \frac13
    3.14 | \pi
    1.414 | \sqrt2
    2 \cdot \frac13 | 2\frac13
    \frac125 | \frac{1}{25}
    1.56 = 56\% | 0.56
    AB | BA
    101_3 | 101_2
    101 | 101_3
    y=5 | x=5
    x=-3 | x=3
    5\text{ cm} | 5\text{ m}
    5\text{ cm}^2 | 5\text{ cm}
    5\text{ cents} | \$5
    (2,1) | (1,2)
    [1,2] | (1,2)
    \{1,2\} | \{1,2,3\}
    1,3,5,\ldots | 1,2,\ldots
    3\text{ or }4 | 3
    x > 3 | 3
    x \ge 3 | x > 3
    -\infty | \infty
    2\sqrt3 | 3\sqrt2
    5x | 5y
    x+1 | x-1
    a_1 | a_2
    4:30\text{ a.m.} | 4:30\text{ p.m.}
    B | A
"""
UNKNOWN = r"""
    2+2 | 4
    3 \cdot 4 | 12
    (a+b)^2 | a^2+2ab+b^2
    \sin x | \cos x
    \text{at least } 3 | 3
    \text{Friday} | \text{Monday}
"""


def pairs(text: str) -> list[tuple[str, str]]:
    lines = [line.strip() for line in text.strip().splitlines()]
    return [(answer, truth) for answer, _, truth in (line.partition(" | ") for line in lines)]


@pytest.mark.parametrize(("answer", "truth"), pairs(EQUAL))
def test_equal(answer: str, truth: str) -> None:
    assert compare(answer, truth) is True


@pytest.mark.parametrize(("answer", "truth"), pairs(DIFFERENT))
def test_different(answer: str, truth: str) -> None:
    assert compare(answer, truth) is False


@pytest.mark.parametrize(("answer", "truth"), pairs(UNKNOWN))
def test_unknown(answer: str, truth: str) -> None:
    assert compare(answer, truth) is None
    assert not equal(answer, truth)


NUMBERS = st.fractions(min_value=-1000, max_value=1000, max_denominator=50)


@given(NUMBERS, NUMBERS)
def test_numbers_are_equal_exactly_when_their_values_are(a: Fraction, b: Fraction) -> None:
    first = f"\\frac{{{a.numerator}}}{{{a.denominator}}}"
    second = f"{b.numerator}/{b.denominator}"
    assert compare(first, second) is (a == b)
    assert (vote(first) == vote(second)) is (a == b)


COEFFICIENTS = st.lists(st.integers(-9, 9), min_size=1, max_size=4)


@given(COEFFICIENTS, COEFFICIENTS, st.randoms())
def test_polynomials_are_equal_exactly_when_their_coefficients_are(
    first: list[int], second: list[int], random: object
) -> None:
    def spelled(coefficients: list[int], shuffled: bool) -> str:
        terms = [f"({c})x^{{{i}}}" for i, c in enumerate(coefficients)]
        return "+".join(reversed(terms) if shuffled else terms)

    n = max(len(first), len(second))
    same = first + [0] * (n - len(first)) == second + [0] * (n - len(second))
    assert compare(spelled(first, True), spelled(second, False)) is same


@given(st.text(alphabet="\\{}frac sqrt12,.()-+x^$text=|<&:%", max_size=60), st.sampled_from("1x"))
def test_any_answer_gets_a_verdict(text: str, truth: str) -> None:
    assert compare(text, truth) in (True, False, None)
    assert compare(text, text) is True
    assert vote(text) == vote(text)


@pytest.mark.parametrize(
    ("answer", "truth", "tolerance", "same"),
    [
        # Relative to the truth: 99 is 1/100 away from 100, 100 is 1/99 away from 99.
        ("99", "100", "1/100", True),
        ("100", "99", "1/100", False),
        ("98.99", "100", "1/100", False),
        ("-101", "-100", "1/100", True),
        ("0.3333", "\\frac{1}{3}", "1/10000", True),  # 1/30000 away, of 1/3: exactly 1/10000
        ("0.333", "\\frac{1}{3}", "1/10000", False),
        ("4.51 \\cdot 10^{33}", "4.5e33", "1/100", True),
        ("0", "0.001", "1/100", False),
        ("0.001", "0", "1/100", False),  # nothing is near 0
        ("50.2\\%", "50", "1/100", True),
        ("0.502", "50\\%", "1/100", True),
        ("50.2\\%", "0.5", "1/100", True),
        ("0.51", "50\\%", "1/100", False),
        ("(1.001, 2)", "(1, 2)", "1/100", True),
        ("\\{2, 1.001\\}", "\\{1, 2\\}", "1/100", True),
        ("(1, 2.03)", "(1, 2)", "1/100", False),
        ("1:3", "0.333", "1/100", True),
        ("0.33", "1:3", "1/100", True),
        ("0.32", "1:3", "1/100", False),
        ("1:3", "1000:3003", "1/100", True),
        ("\\frac13 = 0.333", "\\frac13", "1/100", True),
        ("\\frac13 = 0.4", "0.4", "1/100", False),
        ("5.01 cm", "5 cm", "1/100", True),
        ("5.01 cm", "5 m", "1/100", False),
        # Only numbers have a distance.
        ("1.414", "\\sqrt{2}", "1/100", False),
        ("2.001x", "2x", "1/100", False),
    ],
)
def test_numbers_within_a_tolerance(answer: str, truth: str, tolerance: str, same: bool) -> None:
    assert equal(answer, truth, Fraction(tolerance)) is same
    assert not equal(answer, truth)


def test_what_is_read_at_once_is_what_the_grammar_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (
        "0",
        "7",
        "12",
        "007",
        "0.50",
        ".5",
        "9" * 60,
        "\\frac12",
        "\\frac{0}{12}",
        "\\frac{34}{8}",
    )
    items = [nest(tokenize(sign + size)) for sign in ("", "-") for size in sizes]
    at_once = [reading.read_answer(x) for x in items]
    assert all(map(reading._plain, items))
    monkeypatch.setattr(reading, "_plain", lambda _: None)
    # As text, for 2 and Fraction(2, 1) are equal.
    assert list(map(repr, at_once)) == [repr(reading.read_answer(x)) for x in items]
