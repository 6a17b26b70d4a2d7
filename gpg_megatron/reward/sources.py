"""Which scorer judges which data source."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from gpg_megatron.config import RewardConfig
from gpg_megatron.errors import UserError
from gpg_megatron.reward.scorers import parse_number
from gpg_megatron.types import Prompt

DATA_SOURCES = {
    "arithmetic*": "exact_match",
    "gsm8k": "gsm8k",
    "openai/gsm8k": "gsm8k",
}
"""data_source pattern (shell style) -> scorer name, for reward.scorer=auto."""


def scorer_name(data_source: str, config: RewardConfig) -> str:
    """The name of the scorer that judges rows of this data source.

    Raises:
        UserError: reward.scorer is auto and the data source is unknown.
    """
    if config.scorer != "auto":
        return config.scorer
    for pattern, name in DATA_SOURCES.items():
        if fnmatchcase(data_source, pattern):
            return name
    raise UserError(
        f"no scorer is known for data_source {data_source!r}; known: {', '.join(DATA_SOURCES)}; "
        "or name one with reward.scorer"
    )


def check_data_sources(sources: Iterable[str], config: RewardConfig) -> None:
    """Raise UserError unless every data source has a scorer."""
    for source in sorted(set(sources)):
        scorer_name(source, config)


def check_prompts(prompts: Iterable[Prompt], config: RewardConfig) -> None:
    """check_data_sources for these prompts, and that scorers can read their ground truths.

    Raises:
        UserError: names the data source, or the prompt whose ground truth is unreadable.
    """
    prompts = list(prompts)
    check_data_sources((p.data_source for p in prompts), config)
    for prompt in prompts:
        if scorer_name(prompt.data_source, config) != "gsm8k":
            continue
        try:
            parse_number(prompt.ground_truth)
        except ValueError as error:
            raise UserError(f"{prompt.id}: ground truth {error}; scorer gsm8k needs one") from None
