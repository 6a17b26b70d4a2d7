"""Where several scorers disagree about the same answers, and where one has no verdict."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from gpg_megatron.config.reward import RewardConfig
from gpg_megatron.errors import UserError, writing
from gpg_megatron.reward.pool import FAILURES, RewardPool
from gpg_megatron.reward.scorers import SCORERS
from gpg_megatron.reward.sources import check_prompts
from gpg_megatron.types import Prompt, Reward, ScoredGroup

SHOWN = 20
"""Rows of the printed table."""
NO_ANSWER = "no answer"

Answered = Mapping[str, Sequence[ScoredGroup]]
"""Mode -> its answers."""


def scorers_to_compare(
    names: str | None, config: RewardConfig, prompts: Sequence[Prompt]
) -> list[str]:
    """The scorers that are named, at least two and separated by commas; none for None.

    Raises:
        UserError: a name is unknown or stands alone, or a scorer cannot judge these prompts.
    """
    if names is None:
        return []
    known = [*SCORERS, *(["custom"] if config.custom_function else [])]
    chosen = list(dict.fromkeys(names.split(",")))
    if len(chosen) < 2 or not set(chosen) <= set(known):
        raise UserError(f"--compare {names}: expected two or more of {', '.join(known)}")
    for scorer in chosen:
        check_prompts(prompts, _alone(config, scorer))
    return chosen


def _alone(config: RewardConfig, scorer: str) -> RewardConfig:
    """The section with one scorer for all data sources, whose score is nothing but its own."""
    return replace(config, by_source={"*": scorer}, weights={"answer": 1.0})


def judge(answered: Answered, scorers: Sequence[str], config: RewardConfig) -> list[dict[str, Any]]:
    """What each scorer says about each answer, in order.

    Returns:
        for each answer: mode, data_source, prompt_id, index, ground_truth, response, and
        verdicts: scorer -> {answer, accuracy, without}; without says why there is no verdict,
        "timeout", "memory", "crash" or NO_ANSWER, else it is None.
    """
    rows: list[dict[str, Any]] = [
        {
            "mode": mode,
            "data_source": group.prompt.data_source,
            "prompt_id": group.prompt.id,
            "index": completion.index,
            "ground_truth": group.prompt.ground_truth,
            "response": completion.text,
            "verdicts": {},
        }
        for mode, groups in answered.items()
        for group in groups
        for completion in group.completions
    ]
    items = [(g.prompt, g.completions) for groups in answered.values() for g in groups]
    for scorer in scorers:
        with closing(RewardPool(_alone(config, scorer))) as pool:
            rewards = [reward for group in pool.score(items) for reward in group.rewards]
        for row, reward in zip(rows, rewards, strict=True):
            row["verdicts"][scorer] = {
                "answer": reward.answer,
                "accuracy": reward.accuracy,
                "without": without_verdict(reward),
            }
    return rows


def without_verdict(reward: Reward) -> str | None:
    """Why there is no verdict on an answer; None where there is one."""
    for failure in FAILURES & reward.parts.keys():
        return failure
    return NO_ANSWER if reward.answer is None and not reward.accuracy else None


def disagreements(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers that are right for one scorer and wrong, or without a verdict, for another."""
    return [row for row in rows if len({v["accuracy"] for v in row["verdicts"].values()}) > 1]


def report(rows: Sequence[dict[str, Any]], path: Path) -> list[str | Table]:
    """Write all disagreements, one JSON object a line; what is to be printed about them."""
    found = disagreements(rows)
    # ASCII escapes: a response may hold halves of surrogate pairs.
    with writing(path):
        path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    lines: list[str | Table] = [
        f"scorers disagree about {len(found)} of {len(rows)} answers: {path}"
    ]
    if found:
        lines.append(_table(found[:SHOWN]))
    if len(found) > SHOWN:
        lines.append(f"{len(found) - SHOWN} more are in the file")
    return lines + list(_missing(rows))


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    """One row for each answer; below a scorer's name its verdict and what it read."""
    table = Table()
    for name in ("data set", "prompt", "#", "truth", *rows[0]["verdicts"]):
        table.add_column(name, overflow="fold")
    for row in rows:
        verdicts = [_cell(verdict) for verdict in row["verdicts"].values()]
        place = f"{row['data_source']}, {row['mode']}"
        cells = (place, row["prompt_id"], str(row["index"]), row["ground_truth"], *verdicts)
        # As Text, for rich would take a list in square brackets for a style.
        table.add_row(*(Text(_printable(cell)) for cell in cells))
    return table


def _cell(verdict: Mapping[str, Any]) -> str:
    said = verdict["without"] or ("right" if verdict["accuracy"] else "wrong")
    return said if verdict["answer"] is None else f"{said}: {verdict['answer']}"


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _missing(rows: Iterable[dict[str, Any]]) -> list[str]:
    """One line for each data source and scorer that has answers without a verdict."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        for scorer, verdict in row["verdicts"].items():
            if verdict["without"]:
                counts[row["data_source"], scorer][verdict["without"]] += 1
    return [
        f"{source}, {scorer}, without a verdict: {listed(reasons)}"
        for (source, scorer), reasons in counts.items()
    ]


def listed(reasons: Mapping[str, int]) -> str:
    """Numbers of answers by what kept them from a verdict."""
    return ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items()))
