"""docs/bad-inputs.md: `python -m tests.bad_inputs.page` tries every case and writes the page."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.bad_inputs import models, rewards, rows, runs, sampling, settings
from tests.bad_inputs.case import Case, code, make_folder, printed

PAGE = Path(__file__).resolve().parents[2] / "docs" / "bad-inputs.md"
SECTIONS: Mapping[str, tuple[Case, ...]] = {
    "Configuration and arguments": settings.CASES,
    "Rows of data": rows.DATA_CASES,
    "Tokenizer and chat template": rows.TOKENIZER_CASES,
    "Reward functions": rewards.CASES,
    "Sampling": sampling.CASES,
    "Models": models.CASES,
    "Runs, checkpoints and hosts": runs.RUN_CASES,
    "Conversion": runs.CONVERT_CASES,
}
HEAD = """\
# Bad inputs, and what they print

A mistake that can be known before the start is one line on stderr and exit code 2: what is wrong,
where, and mostly what would be right. Nothing is started and nothing written. The tests try every
row below (`tests/bad_inputs/`), and `python -m tests.bad_inputs.page` writes this page from them.
"""


def page(lines: Mapping[str, str]) -> str:
    """The whole page. lines: name of a case -> what it prints."""
    parts = [HEAD]
    for title, cases in SECTIONS.items():
        rows = [f"| {case.name} | {case.brings} | {code(lines[case.name])} |" for case in cases]
        table = ["| what is wrong | brought | printed |", "|---|---|---|", *rows]
        parts.append("\n".join([f"## {title}", *table, ""]))
    return "\n".join(parts)


def all_cases() -> Iterator[Case]:
    """In the order of the page."""
    for cases in SECTIONS.values():
        yield from cases


def main() -> None:
    """Write the page."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        good = make_folder(folder / "good")
        lines = {x.name: printed(x, good, folder / str(i)) for i, x in enumerate(all_cases())}
    PAGE.write_text(page(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
