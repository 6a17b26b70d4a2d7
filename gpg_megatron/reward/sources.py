"""Which scorer judges which data source, and whether it can."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from gpg_megatron.config.reward import RewardConfig
from gpg_megatron.errors import UserError
from gpg_megatron.plugins import load_object
from gpg_megatron.reward.gsm8k import exact_number
from gpg_megatron.reward.scorers import SCORERS
from gpg_megatron.types import Prompt

DATA_SOURCES = {
    "arithmetic*": "exact_match",
    "gsm8k": "gsm8k",
    "openai/gsm8k": "gsm8k",
    "math": "math",
    "DigitalLearningGmbH/MATH-lighteval": "math",
    "lighteval/MATH": "math",
    "HuggingFaceH4/MATH-500": "math",
    "HuggingFaceH4/aime_2024": "math",
    "math-ai/amc23": "math",
    "math-ai/minervamath": "math_verify",
    "math-ai/olympiadbench": "math_verify",
}
"""data_source pattern (shell style) -> scorer name, for reward.scorer=auto."""

_AS_ANSWER = {
    "exact_match": "{}",
    "gsm8k": "#### {}",
    "verl_gsm8k": "#### {}",
    **dict.fromkeys(("math", "math_verify", "verl_math"), "\\boxed{{{}}}"),
}
"""Scorer -> how a ground truth is written as an answer."""
_NO_ANSWERS = frozenset(("nan", "none", "null", "n/a", "<na>"))

LISTED = 10
"""Rows with a wrong ground truth in a message."""
SHOWN = 60
"""Characters of a ground truth in a message."""

WITH_FORMAT = ("gsm8k", "math", "math_verify")
"""Scorers whose verdicts have a part "format"."""


def scorer_name(data_source: str, config: RewardConfig) -> str:
    """The name of the scorer that judges rows of this data source: reward.by_source, then
    reward.scorer, then, where that is auto, DATA_SOURCES.

    Raises:
        UserError: no rule fits.
    """
    for pattern, name in config.by_source.items():
        if fnmatchcase(data_source, pattern):
            return name
    if config.scorer != "auto":
        return config.scorer
    for pattern, name in DATA_SOURCES.items():
        if fnmatchcase(data_source, pattern):
            return name
    raise UserError(
        f"no scorer is known for data_source {data_source!r}; known: {', '.join(DATA_SOURCES)}; "
        "or name one with reward.scorer or reward.by_source"
    )


def check_data_sources(sources: Iterable[str], config: RewardConfig) -> None:
    """Raise UserError unless every data source has a scorer that gives what is weighted."""
    needs_format = config.weights.get("format", 0.0) != 0.0 and config.format_pattern is None
    names = {source: scorer_name(source, config) for source in sorted(set(sources))}
    for source, name in names.items():
        if needs_format and name not in (*WITH_FORMAT, "custom"):
            raise UserError(
                f"reward.weights.format: scorer {name} of data_source {source!r} knows no format; "
                f"expected reward.format_pattern"
            )
    if "custom" in names.values():
        assert config.custom_function is not None, "checked when the configuration was loaded"
        function = load_object(config.custom_function, "reward.custom_function")
        if not callable(function):
            raise UserError(f"reward.custom_function: {config.custom_function} is no function")


def check_prompts(prompts: Iterable[Prompt], config: RewardConfig) -> None:
    """check_data_sources for these prompts, and that scorers can read their ground truths.

    Raises:
        UserError: names the data source, or the prompt whose ground truth is unreadable.
    """
    prompts = list(prompts)
    check_data_sources((p.data_source for p in prompts), config)
    checked: dict[tuple[str, str], str | None] = {}
    found = []
    for prompt in prompts:
        case = (scorer_name(prompt.data_source, config), prompt.ground_truth)
        if case not in checked:
            checked[case] = unmet(*case)
        if checked[case]:
            found.append((prompt.id, *case))
    if found:
        first, *others = found
        name, scorer, _ = first
        reason = f"{name}: ground truth {checked[first[1:]]}; scorer {scorer} needs one"
        more = f"; and {len(others)} more: " if others else ""
        raise UserError(reason + more + ", ".join(x[0] for x in others[: LISTED - 1]))


def unmet(scorer: str, ground_truth: str) -> str | None:
    """Why no answer can meet a ground truth; None where the truth itself, as an answer, does.

    Args:
        scorer: a key of SCORERS, or "custom", of which nothing is known.
    """
    text = ground_truth.strip()
    if scorer == "custom":
        return None
    if not text:
        return "is empty"
    if text.casefold() in _NO_ANSWERS and scorer != "exact_match":
        return f"{ground_truth!r} is what a missing value is written as"
    if scorer == "gsm8k":
        try:
            exact_number(ground_truth)
        except ValueError as error:
            return str(error)
    # math-verify is not asked: our own comparison knows that a truth is equal to itself.
    judge = SCORERS["math" if scorer == "math_verify" else scorer]
    if judge(_AS_ANSWER[scorer].format(ground_truth), ground_truth).accuracy != 1.0:
        return f"{ground_truth[:SHOWN]!r} does not score 1 against itself"
    return None
