"""docs/bad-inputs.md: every row is tried, and says what is really printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_inputs.case import Case, code, make_folder, printed
from tests.bad_inputs.page import PAGE, all_cases, page


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("bad_inputs") / "good")


@pytest.fixture(scope="module")
def rows() -> dict[str, str]:
    """Name of a case -> its row."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if line[:2] == "| "}


@pytest.mark.parametrize("case", [*all_cases()], ids=lambda case: case.name)
def test_the_page_says_what_is_printed(
    case: Case, good: Path, tmp_path: Path, rows: dict[str, str]
) -> None:
    line = printed(case, good, tmp_path / "run_folder")
    assert rows[case.name] == f"| {case.name} | {case.brings} | {code(line)} |"


def test_the_page_has_these_rows_and_no_others() -> None:
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)
    text = PAGE.read_text(encoding="utf-8")
    left = page(dict.fromkeys(names, ""))
    assert [line.split(" | ")[0] for line in text.splitlines()] == [
        line.split(" | ")[0] for line in left.splitlines()
    ]
