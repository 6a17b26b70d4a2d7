"""GSM8K in the row schema, from local files or the Hugging Face data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gpg_megatron.data.schema import make_row, read_jsonl
from gpg_megatron.errors import UserError

DATA_SOURCE = "openai/gsm8k"
SUFFIX = 'Let\'s think step by step and output the final answer after "####".'
SPLITS = ("train", "test")
_LOCAL_NAMES = ("gsm8k_{}.jsonl", "{}.jsonl", "main/{}-00000-of-00001.parquet")


def final_answer(solution: str, location: str) -> str:
    """The number after the last "####", without thousands separators.

    Raises:
        UserError: there is none.
    """
    _, mark, tail = solution.rpartition("####")
    answer = tail.strip().replace(",", "")
    if not mark or not answer:
        raise UserError(f'{location}: the answer has no "#### number"; expected one at its end')
    return answer


def load_rows(source: str | None, split: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of one split, the first limit of them.

    source: a folder that holds gsm8k_<split>.jsonl, <split>.jsonl or the data set's own
    main/<split>-00000-of-00001.parquet, with the fields question and answer; None: the
    Hugging Face data set.

    Raises:
        UserError: no such file, a malformed one, or the data set cannot be loaded.
    """
    records = _hugging_face(split) if source is None else _local(Path(source), split)
    rows = [
        _row(record, split, index, location)
        for index, (location, record) in enumerate(islice(records, limit))
    ]
    if not rows:
        raise UserError(f"{source or DATA_SOURCE}: the {split} split has no rows")
    return rows


def _row(record: Any, split: str, index: int, location: str) -> dict[str, Any]:
    for key in ("question", "answer"):
        if not isinstance(record, Mapping) or not isinstance(record.get(key), str):
            raise UserError(f"{location}: no text under {key!r}; expected question and answer")
    return make_row(
        data_source=DATA_SOURCE,
        content=f"{record['question']} {SUFFIX}",
        ability="math",
        ground_truth=final_answer(record["answer"], location),
        extra_info={
            "split": split,
            "index": index,
            "question": record["question"],
            "answer": record["answer"],
        },
    )


def _local(folder: Path, split: str) -> Iterator[tuple[str, Any]]:
    names = [name.format(split) for name in _LOCAL_NAMES]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder}: no {split} split; expected one of {', '.join(names)} in it")
    if found.suffix == ".jsonl":
        return read_jsonl(found)
    try:
        table = pq.read_table(found)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{found}: not a readable parquet file: {error}") from None
    return _numbered(f"{found}: row", table.to_pylist())


def _hugging_face(split: str) -> Iterator[tuple[str, Any]]:
    # Imported here: it takes a second, and local sources need none of it.
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return _numbered(
            f"{DATA_SOURCE} {split} row", load_dataset(DATA_SOURCE, "main", split=split)
        )
    except (DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{DATA_SOURCE}: cannot load the data set: {reason}; "
            "expected a connection to Hugging Face, or --source with a local folder"
        ) from None


def _numbered(prefix: str, records: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{prefix} {number}", record) for number, record in enumerate(records, start=1))
