"""What reward functions of users can do wrong."""

from __future__ import annotations

from tests.bad_inputs.case import Case, code

ARGUMENTS = "data_source, solution_str, ground_truth, extra_info=None"


def function(name: str, body: str, *arguments: str, parameters: str = ARGUMENTS) -> Case:
    """mine.py holds compute_score with this body."""
    text = f"def compute_score({parameters}):\n    {body}\n"
    return Case(
        name=name,
        brings=code(" ".join([body if parameters is ARGUMENTS else f"def f({parameters})"])),
        arguments=(
            "reward.scorer=custom",
            "reward.custom_function=mine.py:compute_score",
            *arguments,
        ),
        files={"mine.py": text},
    )


CASES = (
    function("arguments of another kind", "return 1.0", parameters="response, answer"),
    function("a function that raises", "return extra_info['answer']"),
    function("a function that returns nothing", "pass"),
    function("a score that is a text", "return 'good'"),
    function("a score that is no number", "return float('nan')"),
    function("a dictionary without a score", "return {'reward': 1.0}"),
    function("a function that ends its process", "import os; os._exit(3)"),
    function("a function without an end", "while True: pass", "reward.timeout_s=0.3"),
    Case(
        name="a file that cannot be imported",
        brings="`import nothing_of_this_name`",
        arguments=("reward.scorer=custom", "reward.custom_function=mine.py:compute_score"),
        files={"mine.py": "import nothing_of_this_name\n"},
    ),
    Case(
        name="a file that is a script",
        brings="`raise SystemExit(0)`",
        arguments=("reward.scorer=custom", "reward.custom_function=mine.py:compute_score"),
        files={"mine.py": "raise SystemExit(0)\n"},
    ),
)
