"""Data sets that are known by name: where they are, and how a record becomes a row.

The name of the Hugging Face data set is the data_source of its rows, as in verl.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from itertools import islice
from pathlib import Path
from typing import Any

from gpg_megatron.answers import last_boxed
from gpg_megatron.data.records import Located, numbered, read_file, read_hub
from gpg_megatron.data.schema import make_row
from gpg_megatron.errors import UserError

GSM8K_SUFFIX = 'Let\'s think step by step and output the final answer after "####".'
MATH_SUFFIX = "Let's think step by step and output the final answer within \\boxed{}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """One split."""

    rows: tuple[dict[str, Any], ...]
    unusable: tuple[tuple[str, str], ...]
    """(location, reason) of each record that no row can be made of."""


def gsm8k_reference(solution: str) -> str | None:
    """The number after the last "####", without thousands separators."""
    _, mark, tail = solution.rpartition("####")
    answer = tail.strip().replace(",", "")
    try:
        return answer if mark and Decimal(answer).is_finite() else None
    except InvalidOperation:
        return None


def _stated(value: Any) -> str | None:
    """An answer that stands by itself; a list is joined by commas, a box is opened."""
    if isinstance(value, (list, tuple)):
        value = ", ".join(str(part).strip().strip("$") for part in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        # Answers are whole numbers that some copies store as 27.0.
        value = str(int(value)) if value == int(value) else str(value)
    return last_boxed(value) or value.strip() if isinstance(value, str) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """One named data set."""

    hub: str
    """Of Hugging Face; the data_source of the rows."""
    config: str | None = None
    """Of the hub's data set, where it has several."""
    splits: Mapping[str, str] = field(default_factory=lambda: {"test": "test"})
    """train or test -> the split's name on the hub."""
    local: tuple[str, ...] = ("{name}.jsonl", "{split}.jsonl")
    """Names of a split's file in a local folder. The first found is read."""
    question: tuple[str, ...] = ("problem", "question")
    """Fields that may hold the problem; the first that a record has does."""
    answer: tuple[str, ...] = ("answer", "solution")
    """Fields that may hold the reference answer; the first in which one is found does."""
    extract: Callable[[Any], str | None] = _stated
    """The answer in such a field; None or empty: it has none that can be used."""
    needs: str = "answer"
    """What extract looks for, for messages."""
    suffix: str = MATH_SUFFIX
    extra: tuple[str, ...] = ("solution", "answer", "level", "type", "subject")
    """Fields that are kept in extra_info."""


DATA_SETS: Mapping[str, DataSet] = {
    "gsm8k": DataSet(
        hub="openai/gsm8k",
        config="main",
        splits={"train": "train", "test": "test"},
        local=("{name}_{split}.jsonl", "{split}.jsonl", "main/{split}-00000-of-00001.parquet"),
        question=("question",),
        answer=("answer",),
        extract=lambda text: gsm8k_reference(text) if isinstance(text, str) else None,
        needs='"#### number" at the end of answer',
        suffix=GSM8K_SUFFIX,
        extra=("question", "answer"),
    ),
    "math": DataSet(
        hub="DigitalLearningGmbH/MATH-lighteval",
        splits={"train": "train", "test": "test"},
        local=("{name}_{split}.jsonl", "{split}.jsonl", "data/{split}-00000-of-00001.parquet"),
        question=("problem",),
        answer=("solution",),
        extract=lambda text: last_boxed(text) if isinstance(text, str) else None,
        needs="\\boxed{...} in solution, not empty",
    ),
    "math500": DataSet(hub="HuggingFaceH4/MATH-500"),
    "aime24": DataSet(hub="HuggingFaceH4/aime_2024", splits={"test": "train"}),
    "amc23": DataSet(hub="math-ai/amc23", answer=("answer",)),
    "minerva": DataSet(
        hub="math-ai/minervamath", local=("{name}.jsonl", "minervamath.jsonl", "{split}.jsonl")
    ),
    "olympiadbench": DataSet(
        hub="math-ai/olympiadbench", answer=("final_answer", "answer"), needs="final_answer"
    ),
}


def load_split(name: str, source: str | None, split: str, limit: int | None = None) -> Loaded:
    """One split of a named data set, the first `limit` records of it.

    Args:
        name: a key of DATA_SETS.
        source: a file, or a folder that holds one of the set's local names; None: the
            Hugging Face data set.
        split: a key of its splits.

    Raises:
        UserError: no such file, a malformed one, the data set cannot be loaded, a record
            without a problem, or none with a usable answer.
    """
    data_set = DATA_SETS[name]
    rows: list[dict[str, Any]] = []
    unusable: list[tuple[str, str]] = []
    for index, (location, record) in enumerate(islice(_records(name, source, split), limit)):
        question = _question(record, data_set, location)
        found = (data_set.extract(record.get(key)) for key in data_set.answer)
        answer = next(filter(None, found), None)
        if answer is None:
            unusable.append((location, f"no answer can be extracted; expected {data_set.needs}"))
            continue
        kept = {key: record[key] for key in data_set.extra if isinstance(record.get(key), str)}
        row = make_row(
            data_source=data_set.hub,
            content=f"{question} {data_set.suffix}",
            ability="math",
            ground_truth=answer,
            extra_info={"split": split, "index": index, "question": question, **kept},
        )
        rows.append(row)
    if unusable and not rows:
        location, reason = unusable[0]
        raise UserError(f"{location}: {reason} (and so on: the split has no usable row)")
    if not rows:
        raise UserError(f"{source or data_set.hub}: the {split} split has no rows")
    return Loaded(rows=tuple(rows), unusable=tuple(unusable))


def _records(name: str, source: str | None, split: str) -> Located:
    data_set = DATA_SETS[name]
    if source is None:
        records = read_hub(data_set.hub, data_set.config, data_set.splits[split])
        return numbered(records, f"{data_set.hub} {split}")
    path = Path(source)
    if not path.exists():
        raise UserError(f"--source {source}: no such file or folder")
    if path.is_file():
        return read_file(path)
    names = [file.format(name=name, split=split) for file in data_set.local]
    for file in names:
        if (path / file).is_file():
            return read_file(path / file)
    raise UserError(f"{path}: no {split} split; expected one of {', '.join(names)} in it")


def _question(record: Any, data_set: DataSet, location: str) -> str:
    if isinstance(record, Mapping):
        for key in data_set.question:
            if isinstance(record.get(key), str):
                return str(record[key])
    raise UserError(f"{location}: no text under {' or '.join(map(repr, data_set.question))}")
