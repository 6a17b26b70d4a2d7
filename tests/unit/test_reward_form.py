"""The tokens and the normal form of answers: by hand, idempotent, total, in linear time."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpg_megatron.reward.form import MAX_ANSWER, normal_form
from gpg_megatron.reward.tokens import tokenize


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("1,234", ["1234"]),
        ("(1,234)", ["(", "1", ",", "234", ")"]),
        ("10,\\!000", ["10000"]),
        ("4.5E33", ["4.5e33"]),
        ("2x", ["2", "x"]),
        ("AB", ["AB"]),
        ("xy", ["x", "y"]),
        ("5 cm", ["5", '"cm']),
        ("5m", ["5", "m"]),
        ("5 m", ["5", '"m']),
        ("Evelyn", ['"evelyn']),
        ("3 1/2", ["3", "\\frac", "{", "1", "}", "{", "2", "}"]),
        ("90^{\\circ}", ["90", "\\deg"]),
        ("\\left. x \\right|", ["x", "|"]),
        ("\\textcolor{red}{5}", ["{", "5", "}"]),
        ("x\N{SUPERSCRIPT TWO}", ["x", "^", "{", "2", "}"]),
        ("\N{MINUS SIGN}5", ["-", "5"]),
    ],
)
def test_tokens(text: str, tokens: list[str]) -> None:
    assert tokenize(text) == tokens


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("\\frac12", "\\frac{1}{2}"),
        ("\\frac125", "\\frac{1}{2} 5"),
        ("\\dfrac{a}b", "\\frac{a}{b}"),
        ("{3 \\over 4}", "\\frac{3}{4}"),
        ("\\sqrt[3]2", "\\sqrt[3]{2}"),
        ("\\sqrt[2]2", "\\sqrt{2}"),
        ("x^2", "x^{2}"),
        ("x^{{2}}", "x^{2}"),
        ("x^-1", "x^{- 1}"),
        ("a_10", "a_{10}"),
        ("{{5}", "5"),
        ("5}", "5"),
        ("x \\leqslant 5", "x \\le 5"),
        ("\\mathbb R", "\\R"),
        ("5\\text{ cm}", "5 \\text{cm}"),
        ("\\frac", "\\frac{}{}"),
        ("", ""),
    ],
)
def test_the_normal_form(text: str, form: str) -> None:
    assert normal_form(text) == form


PIECES = st.sampled_from(
    [
        *"0123456789abmxiAB+-*/^_(){}[],.;:=<>|!%&'$~\\ \n\"#",
        *("\\frac", "\\sqrt", "\\text{", "\\mathrm{", "\\left", "\\pi", "\\pm", "\\begin{pmatrix}"),
        *(
            "\\end{pmatrix}",
            "\\\\",
            "\\,",
            "\\!",
            "\\{",
            "\\}",
            "\\over",
            "\\overline{",
            "cm",
            "and",
        ),
        *("\N{MINUS SIGN}", "\N{SUPERSCRIPT TWO}", "\N{VULGAR FRACTION ONE HALF}", "p.m.", "1,234"),
    ]
)


@example("%A")
@example("5 A")
@example("\\pi A")
@example("0^»o")
@example("(2)m")
@given(st.lists(PIECES, max_size=25).map("".join))
def test_the_normal_form_of_a_normal_form_is_itself(text: str) -> None:
    form = normal_form(text)
    assert normal_form(form) == form


@example("0\x1f«")
@given(st.text(max_size=80))
def test_any_text_has_a_normal_form(text: str) -> None:
    form = normal_form(text)
    assert normal_form(form) == form


@pytest.mark.parametrize(
    "piece", ["{", "(", "\\frac{1}{", "1,", "\\text{", "^", "x_", "\\sqrt[", "\\\\"]
)
def test_it_takes_linear_time(piece: str) -> None:
    text = piece * (MAX_ANSWER // len(piece))
    begin = time.process_time()
    normal_form(text)
    assert time.process_time() - begin < 2.0
