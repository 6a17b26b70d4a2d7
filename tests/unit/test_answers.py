"""The last box of a text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpg_megatron.answers import last_boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{5}.", "5"),
        ("\\boxed{1} and \\boxed{ \\frac{1}{2} }", "\\frac{1}{2}"),
        ("\\fbox{7}", "7"),
        ("$\\boxed 5$ is it", "5"),
        ("$\\boxed\\pi$", "\\pi"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{x \\right.}", "\\left\\{x \\right."),
        ("\\boxed{}", ""),
        ("\\boxed {3}", "3"),
        ("\\boxed{1} then \\boxed{2", "2"),
        ("so $\\boxed{\\frac{1}{2}$.", "\\frac{1}{2}"),
        ("\\boxed{1} then \\boxed{2\nand on", None),
        ("\\boxed{\\boxed{3}}", "3"),
        ("\\boxed", None),
        ("\\boxedly{3}", None),
        ("5", None),
        ("", None),
    ],
)
def test_last_boxed(text, answer):
    assert last_boxed(text) == answer


@given(
    content=st.recursive(
        st.text(alphabet="ab1+ ^", max_size=5),
        lambda inner: st.lists(inner, max_size=3).map(lambda x: "{" + "".join(x) + "}"),
        max_leaves=10,
    ),
    before=st.text(max_size=20),
)
def test_whatever_is_balanced_comes_back(content, before):
    assert last_boxed(f"{before} \\boxed{{{content}}} done") == content.strip()


def test_a_million_braces_take_linear_time():
    assert last_boxed("\\boxed{" + "{" * 1_000_000) is None
    assert last_boxed("\\boxed{1}" * 200_000) == "1"
